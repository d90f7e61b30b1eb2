"""Recall: what counts as an answer, and how long a continuation is."""

import dataclasses
from pathlib import Path

import pytest
from listener import Listener, MergingListener

from holdfast.data.recall import RecallSample
from holdfast.evaluation.recall import contains_an_answer, evaluate_recall
from holdfast.evaluation.sample_log import SampleLog

SAMPLES = [
    RecallSample(
        f"{'x' * number}One of the special magic hues for sea is: Blue-{number}. The special magic hue for sea is",
        (f"Green-{number}", f"{'bLUE' if number % 3 else 'Red'}-{number}"),
    )
    for number in range(9)
]


def evaluate(model: Listener, samples: list[RecallSample] = SAMPLES, **options: object):
    return evaluate_recall(model, model.tokenizer, samples, progress=False, **options)


def test_an_answer_in_the_first_line_counts() -> None:
    result = evaluate(Listener())
    assert (result.contains.count, result.contains.correct) == (9, 6)
    assert result.longest == len(SAMPLES[-1].prompt)
    assert result.tokens == sum(len(sample.prompt) for sample in SAMPLES) / 9
    assert evaluate(Listener(garble=lambda text: f" It is{text}!")).contains.correct == 6
    assert evaluate(Listener(garble=lambda text: f" none\n{text}")).contains.correct == 0
    assert evaluate(Listener(), new_tokens=6).contains.correct == 0  # cut off before the number
    assert evaluate(Listener(), new_tokens=7).contains.correct == 6


def test_what_stands_before_the_line_break_in_its_token_counts(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "log", {})
    assert evaluate(MergingListener(), log=log).contains.correct == 6
    assert sorted(record["given"] for record in log.records.values()) == [f" Blue-{number}" for number in range(9)]


def test_questions_of_one_passage_are_taken_together() -> None:
    """All of a passage are right, or all wrong."""
    together = [dataclasses.replace(sample, passage=int(number % 3 == 0)) for number, sample in enumerate(SAMPLES)]
    alone, grouped = evaluate(Listener()).contains, evaluate(Listener(), together).contains
    assert (alone.effective, alone.correct) == (9, grouped.correct)
    assert grouped.effective < 3
    assert grouped.interval[0] < alone.interval[0] < alone.interval[1] < grouped.interval[1]


def test_a_log_does_not_mix_samples_that_were_drawn_otherwise(tmp_path: Path) -> None:
    first, second = SAMPLES[0:9:2], SAMPLES[1:9:2]
    evaluate(Listener(), first, log=SampleLog(tmp_path / "log", {}))
    found = evaluate(Listener(), second, log=SampleLog(tmp_path / "log", {}))
    assert found == evaluate(Listener(), second)
    assert found.resumed == 0


def test_letter_case_is_no_matter_and_nothing_is_a_pattern() -> None:
    assert contains_an_answer("The answer is PARIS.", ["rome", "Paris"])
    assert not contains_an_answer("abc", ["a.c"])
    assert not contains_an_answer("", ["x"])


def test_the_result_does_not_depend_on_the_batch_size() -> None:
    assert evaluate(Listener(), batch_size=1) == evaluate(Listener(), batch_size=4) == evaluate(Listener())


def test_an_interrupted_run_goes_on_and_other_samples_are_asked_anew(tmp_path: Path) -> None:
    model = Listener()
    first = evaluate(model, SAMPLES[:4], log=SampleLog(tmp_path / "log", {}))
    assert first.resumed == 0
    model.calls.clear()
    assert evaluate(model, SAMPLES[:4], log=SampleLog(tmp_path / "log", {})).contains == first.contains
    assert model.calls == []
    more = evaluate(model, log=SampleLog(tmp_path / "log", {}))
    assert (more.resumed, more.contains) == (4, evaluate(Listener()).contains)
    shifted = evaluate(model, SAMPLES[1:], log=SampleLog(tmp_path / "log", {}))  # other samples at the same places
    assert (shifted.resumed, shifted.contains) == (0, evaluate(Listener(), SAMPLES[1:]).contains)


def test_what_does_not_fit_is_refused() -> None:
    model = Listener(max_position_embeddings=130)
    with pytest.raises(ValueError, match=r"tokens are more than the 130 .*--beyond"):
        evaluate(model)
    assert model.calls == []
    assert evaluate(model, beyond=True).contains.correct == 6
    small = Listener(vocab_size=128)
    with pytest.raises(ValueError, match="is token 195 of the tokenizer, and the model knows tokens up to 127"):
        evaluate(small, [*SAMPLES, RecallSample("Der Käse ist", ("alt",))])
    assert small.calls == []
    assert evaluate(small).contains.correct == 6
    with pytest.raises(ValueError, match="at least one sample"):
        evaluate(model, [])
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(model, new_tokens=0)
