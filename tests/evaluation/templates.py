"""Tokenizers that put a token before or behind every text, for tests of what takes them and what does not."""

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from holdfast.data.text import byte_tokenizer


def tokenizer_with(template: str, end: str | None = None) -> PreTrainedTokenizerFast:
    """One of bytes whose post-processor puts the end token, or a new one, where the template says."""
    tokenizer = byte_tokenizer()
    if end is not None:
        tokenizer.add_special_tokens({"eos_token": end})
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template.replace("END", end), special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer
