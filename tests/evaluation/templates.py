"""Tokenizers that put a token before or behind every text, for tests of what takes them and what does not."""

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from holdfast.data.text import byte_tokenizer


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """One of bytes whose post-processor puts the end token where the template says."""
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template.replace("END", end), special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer
