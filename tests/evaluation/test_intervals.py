"""Intervals of shares: several answers of one sample are not several samples."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.evaluation.intervals import Share, effective_count, wilson_interval


def share(samples: np.ndarray, right: np.ndarray) -> Share:
    return Share(len(right), int(right.sum()), effective=effective_count(samples, right))


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_one_answer_of_each_sample_is_wilsons_interval(right: list[bool]) -> None:
    found = share(np.arange(len(right))[::-1], np.array(right))
    assert found.interval == Share(len(right), sum(right)).interval == wilson_interval(sum(right), len(right))


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=80))
def test_the_effective_number_is_no_more_than_there_are_answers(answers: list[tuple[int, bool]]) -> None:
    samples, right = (np.array(column) for column in zip(*answers, strict=True))
    found = share(samples, right)
    assert found.effective is not None
    sizes = np.bincount(samples)
    assert len(answers) ** 2 / (sizes**2).sum() - 1e-9 <= found.effective <= len(answers)
    low, high = found.interval or (1, 0)
    assert 0 <= low <= (found.accuracy or 0) <= high <= 1
    assert Share.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_answers_that_are_right_or_wrong_together_count_as_one() -> None:
    rng = np.random.default_rng(0)
    of_samples = rng.random(200) < 0.6
    found = share(np.arange(200).repeat(16), of_samples.repeat(16))
    assert found.effective == pytest.approx(200, rel=0.03)
    assert found.interval == pytest.approx(wilson_interval(of_samples.sum(), 200), abs=2e-3)


@pytest.mark.parametrize("wrong", [0, 1])
def test_answers_that_are_nearly_all_right_count_as_samples(wrong: int) -> None:
    """Nothing shows then how alike those of one sample are: neither may one wrong answer make all independent."""
    right = np.arange(100 * 8) >= wrong
    assert effective_count(np.arange(100).repeat(8), right) == pytest.approx(100, rel=0.2)


ALIKE: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "independent": lambda rng: np.full(60, 0.7),
    "alike": lambda rng: rng.beta(1.4, 0.6, 60),
    "together": lambda rng: (rng.random(60) < 0.7).astype(float),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_intervals_hold_the_truth_as_often_as_they_say(kind: str) -> None:
    rng, held, plain = np.random.default_rng(1), 0, 0
    samples = np.arange(60).repeat(rng.integers(1, 9, 60))
    for _ in range(600):
        right = rng.random(len(samples)) < ALIKE[kind](rng)[samples]
        low, high = share(samples, right).interval or (1, 0)
        held += low <= 0.7 <= high
        low, high = Share(len(right), int(right.sum())).interval or (1, 0)
        plain += low <= 0.7 <= high
    assert 0.93 <= held / 600 <= 0.99
    assert kind == "independent" or plain / 600 < 0.9


def test_bounds_at_the_ends_are_exact() -> None:
    for trials in (1, 3, 7, 19, 512, 1000, 12.5):
        assert wilson_interval(0, trials)[0] == 0
        assert wilson_interval(trials, trials)[1] == 1
    assert Share(7, 7, effective=3.3).interval[1] == 1


def test_no_answers_have_no_interval() -> None:
    assert effective_count([], []) is None
    assert Share(0, 0).interval is None
    assert Share.from_dict({"count": 4, "correct": 1}) == Share(4, 1)  # as older files have it
