"""Which tokenizers an evaluation takes."""

import pytest
from listener import config
from tokenizers.processors import TemplateProcessing

from holdfast.data.recall import RecallSample
from holdfast.data.text import byte_tokenizer
from holdfast.evaluation.limits import check_tokenizer
from holdfast.evaluation.recall import evaluate_recall


def tokenizer_with(template: str) -> object:
    """One of bytes whose post-processor puts the end token where the template says."""
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template.replace("END", end), special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer


def test_a_token_before_every_text_is_welcome_and_one_behind_it_is_not() -> None:
    check_tokenizer(byte_tokenizer(), config())
    check_tokenizer(tokenizer_with("END $A"), config())
    for template in ("$A END", "END $A END"):
        with pytest.raises(ValueError, match=r"tokenizer of runs/x puts '<\|eos\|>' behind every text"):
            check_tokenizer(tokenizer_with(template), config(), name="runs/x")
        check_tokenizer(tokenizer_with(template), config(), english=False)  # no prompt is asked


def test_no_prompt_is_asked_with_a_token_behind_it() -> None:
    class Model:
        config = config()

    with pytest.raises(ValueError, match="behind every text"):
        evaluate_recall(Model(), tokenizer_with("$A END"), [RecallSample("It is", ("so",))], progress=False)
