"""Means over models and tasks, and paired differences between scorers."""

import dataclasses
import json

import numpy as np
import pytest

from holdfast.evaluation.intervals import Share, effective_count
from holdfast.evaluation.perplexity import BlockSums, PerplexityResult
from holdfast.evaluation.scorer_results import Accuracies, Losses, SampleAnswers, mean_share

GOOD, BAD = ("trained", 8), ("random", 8)


def answers(
    rng: np.random.Generator, share: float | np.ndarray, *, drawn: str = "a", samples: int = 60
) -> SampleAnswers:
    asked = rng.integers(1, 6, samples)
    return SampleAnswers(drawn, tuple(asked.tolist()), tuple(rng.binomial(asked, share).tolist()))


def losses(nll: np.ndarray, names: str = "text") -> PerplexityResult:
    blocks = tuple(BlockSums(f"{names} {index}", (10,), (float(sum_),)) for index, sum_ in enumerate(nll))
    return PerplexityResult(len(nll), 10 * len(nll), float(nll.mean() / 10), (), by_block=blocks)


def test_one_models_share_is_that_of_its_answers() -> None:
    found = answers(np.random.default_rng(0), 0.7)
    right = [index < n for asked, n in zip(found.answers, found.right, strict=True) for index in range(asked)]
    numbers = np.arange(60).repeat(found.answers)
    assert found.share == Share(len(right), sum(right), effective=effective_count(numbers, right))
    assert SampleAnswers.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.estimate.value == pytest.approx(found.share.accuracy)


def test_the_same_answers_of_two_models_tell_no_more_than_those_of_one() -> None:
    rng = np.random.default_rng(1)
    found = answers(rng, rng.beta(1, 0.5, 60))  # those of a sample are alike
    alone, twice = found.share, mean_share([found, found])
    assert twice.accuracy == pytest.approx(alone.accuracy)
    assert (twice.count, twice.effective) == (2 * alone.count, pytest.approx(alone.effective, rel=0.15))
    # Of other samples they would be as many again.
    apart = mean_share([found, dataclasses.replace(found, drawn="b")])
    assert apart.effective == pytest.approx(2 * (alone.effective or 0), rel=0.15)


def test_the_mean_of_models_and_tasks_is_that_of_their_accuracies() -> None:
    rng = np.random.default_rng(2)
    models = [answers(rng, share, drawn=str(share), samples=size) for share, size in ((0.3, 40), (0.9, 90))]
    tasks = {"one": {GOOD: models}, "two": {GOOD: [answers(rng, 0.5), answers(rng, 0.5)]}}
    alone = [Accuracies({name: places}).value(GOOD) for name, places in tasks.items()]
    assert alone[0] == pytest.approx(np.mean([model.share.accuracy for model in models]))
    together = Accuracies(tasks)
    assert together.value(GOOD) == pytest.approx(np.mean(alone))
    low, high = together.interval(GOOD) or (1, 0)
    assert low < together.value(GOOD) < high


def test_differences_are_taken_sample_by_sample() -> None:
    rng, held, paired, alone = np.random.default_rng(3), 0, [], []
    for _ in range(300):
        hard = rng.beta(0.6, 0.6, 80)  # of a sample, the same for both scorers
        found = {
            at: [SampleAnswers("a", (1,) * 80, tuple(rng.binomial(1, np.clip(hard + more, 0, 1)).tolist()))]
            for at, more in ((GOOD, 0.0), (BAD, -0.1))
        }
        expected = float(np.mean(np.clip(hard, 0, 1) - np.clip(hard - 0.1, 0, 1)))
        accuracies = Accuracies({"task": found})
        difference = accuracies.difference(GOOD, BAD)
        assert difference.value == pytest.approx(accuracies.value(GOOD) - accuracies.value(BAD))
        low, high = difference.interval or (1, 0)
        held += low <= expected <= high
        paired.append(high - low)
        alone += [ends[1] - ends[0] for at in found if (ends := accuracies.interval(at))]
    assert held / 300 > 0.93
    assert np.mean(paired) < 1.2 * np.mean(alone)  # independent ones would have 1.41 times as wide a difference
    none = Accuracies({"task": {GOOD: [answers(rng, 0.5)]}}).difference(GOOD, GOOD)
    assert none.value == 0
    assert (none.interval or (0, 0))[1] > 0.01  # samples that agree are not the whole truth


def test_losses_of_models_on_the_same_and_on_other_blocks() -> None:
    rng = np.random.default_rng(4)
    hard = rng.normal(30, 5, 50)
    good, bad = ([losses(hard + more + rng.normal(0, 0.5, 50)) for _ in range(2)] for more in (0.0, 1.0))
    same = Losses({GOOD: good, BAD: bad})
    mean = np.mean([result.mean_nll for result in good])
    assert same.value(GOOD) == pytest.approx(np.exp(mean))
    low, high = same.interval(GOOD) or (0, 0)
    single, _ = good[0].perplexity_interval or (0, 0)
    assert low == pytest.approx(single, rel=0.05)  # the second model has read the same blocks
    difference = same.difference(BAD, GOOD)
    ends = difference.interval or (0, 0)
    assert ends[0] < 0.1 < ends[1]
    assert ends[1] - ends[0] < 0.3 * (np.log(high) - np.log(low))
    beside = same.interval_beside(BAD, GOOD) or (0, 0)
    assert beside == pytest.approx(tuple(same.value(GOOD) * np.exp(ends)))
    assert same.interval_beside(GOOD, GOOD) is None
    other = Losses({GOOD: [good[0], losses(rng.normal(30, 5, 50), "other text")]})
    wide = other.interval(GOOD) or (0, 0)
    assert np.log(wide[1] / wide[0]) == pytest.approx(np.log(high / low) / np.sqrt(2), rel=0.2)
    with pytest.raises(ValueError, match="no sums by block"):
        Losses({GOOD: [dataclasses.replace(good[0], by_block=())]}).value(GOOD)
