"""Which tokenizers an evaluation takes, and what continues a prompt."""

from pathlib import Path

import pytest
from listener import config
from templates import tokenizer_with
from tokenizers import Regex
from tokenizers.normalizers import Replace
from torch import nn

from holdfast.cli import main
from holdfast.data.recall import RecallSample
from holdfast.data.text import byte_tokenizer
from holdfast.evaluation.limits import check_prompts, check_tokenizer, check_tokens
from holdfast.evaluation.recall import evaluate_recall
from passes import ModelFactory


def test_a_token_before_every_text_is_welcome_and_one_behind_it_is_not() -> None:
    check_tokenizer(byte_tokenizer(), config())
    check_tokenizer(tokenizer_with("END $A"), config())
    for template in ("$A END", "END $A END"):
        with pytest.raises(ValueError, match=r"tokenizer of runs/x puts '<\|eos\|>' behind every text"):
            check_tokenizer(tokenizer_with(template), config(), name="runs/x")


def test_only_a_token_that_the_model_does_not_know_is_refused() -> None:
    known = config().vocab_size
    check_tokens([0, known - 1], byte_tokenizer(), config())
    check_tokens([], byte_tokenizer(), config())
    with pytest.raises(ValueError, match=rf"is token {known} of the tokenizer, and runs/x knows tokens up to "):
        check_tokens([0, known, known + 1], byte_tokenizer(), config(), name="runs/x")


def test_generate_reads_what_the_model_knows_and_refuses_what_it_does_not(
    small_model: ModelFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_model(vocab_size=200).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "plain", "--max-new-tokens", "1"]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path), "plain<|eos|>", "--max-new-tokens", "1"]) == 2
    told = capsys.readouterr()
    assert "'<|eos|>' is token 258 of the tokenizer" in told.err
    assert told.err.count("\n") == 1
    assert not told.out


def test_no_prompt_is_asked_with_a_token_behind_it() -> None:
    class Model(nn.Module):
        config = config()

    with pytest.raises(ValueError, match="behind every text"):
        evaluate_recall(Model(), tokenizer_with("$A END"), [RecallSample("It is", ("so",))], progress=False)


def test_a_prompt_may_be_of_any_language() -> None:
    """A tokenizer that writes nothing of English puts nothing behind a text either."""
    tokenizer = tokenizer_with("END $A")
    tokenizer.backend_tokenizer.normalizer = Replace(Regex("[ -~]"), "")
    assert tokenizer("The key is 7.").input_ids == [tokenizer.eos_token_id]
    check_prompts(tokenizer)


def test_no_prompt_is_continued_with_a_token_behind_it(
    small_model: ModelFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_model("gated_deltanet", vocab_size=259).save_pretrained(tmp_path)
    tokenizer_with("END $A").save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "Kelp", "--max-new-tokens", "2"]) == 0
    assert "Kelp" in capsys.readouterr().out
    tokenizer_with("$A END").save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "Kelp", "--max-new-tokens", "2"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"tokenizer of {tmp_path} puts '<|eos|>' behind every text" in shown.err
