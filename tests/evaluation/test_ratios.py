"""Ratios of sums over blocks: errors by their definition, and intervals that hold the truth as often as they say."""

import math

import numpy as np
import pytest

from holdfast.evaluation.ratios import Estimate, student_quantile


def ratio(above: np.ndarray, below: np.ndarray) -> Estimate:
    found = Estimate.ratio(above, below)
    assert found is not None
    return found


def test_quantiles_are_those_of_tables() -> None:
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 30: 2.0423, 1000: 1.9623}
    for freedom, quantile in known.items():
        assert student_quantile(freedom) == pytest.approx(quantile, rel=2e-3)


def test_of_equal_blocks_it_is_the_interval_of_a_mean() -> None:
    losses = np.random.default_rng(0).normal(3, 1, 12)
    found = ratio(losses * 7, np.full(12, 7))
    half = student_quantile(11) * losses.std(ddof=1) / math.sqrt(12)
    assert found.value == pytest.approx(losses.mean())
    assert found.interval == pytest.approx((losses.mean() - half, losses.mean() + half))


def test_intervals_over_blocks_hold_the_truth_and_those_over_tokens_do_not() -> None:
    rng, held, as_tokens, wide, paired_held, paired = np.random.default_rng(1), 0, 0, [], 0, []
    for _ in range(400):
        tokens = rng.integers(20, 60, 25)
        hardness = rng.normal(0, 0.5, 25)  # of a block, the same for both models
        one, other = (
            np.array(
                [(mean + hard + rng.normal(0, 1, size)).sum() for hard, size in zip(hardness, tokens, strict=True)]
            )
            for mean in (3.0, 3.1)
        )
        low, high = ratio(one, tokens).interval or (0, 0)
        held += low <= 3.0 <= high
        wide.append(high - low)
        half = 1.96 * math.sqrt(1.25 / tokens.sum())  # as if all tokens were independent
        as_tokens += abs(one.sum() / tokens.sum() - 3.0) <= half
        low, high = (ratio(other, tokens) - ratio(one, tokens)).interval or (0, 0)
        paired_held += low <= 0.1 <= high
        paired.append(high - low)
    assert 0.92 <= held / 400 <= 0.98
    assert as_tokens / 400 < 0.75
    assert 0.92 <= paired_held / 400 <= 0.98
    assert np.mean(paired) < 0.5 * np.mean(wide)


def test_agrees_with_a_bootstrap_over_blocks() -> None:
    rng = np.random.default_rng(2)
    tokens = rng.integers(5, 90, 80)
    losses = tokens * rng.gamma(4, 1, 80)
    draws = rng.integers(0, 80, (4000, 80))
    drawn = losses[draws].sum(1) / tokens[draws].sum(1)
    low, high = ratio(losses, tokens).interval or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * drawn.std(), rel=0.08)


def test_blocks_without_tokens_do_not_count() -> None:
    full = ratio(np.array([3.0, 5.0, 4.0]), np.array([2, 2, 1]))
    gaps = ratio(np.array([3.0, 0.0, 5.0, 4.0, 0.0]), np.array([2, 0, 2, 1, 0]))
    assert gaps.interval == pytest.approx(full.interval)
    assert ratio(np.array([0.0, 5.0]), np.array([0, 2])).interval is None  # one block says nothing of others
    assert Estimate.ratio([0, 0], [0, 0]) is None


def test_means_of_the_same_and_of_other_units() -> None:
    rng = np.random.default_rng(3)
    found = [ratio(rng.normal(2, 1, 40), np.ones(40)) for _ in range(4)]
    together, apart = (Estimate.mean(found, same_units=same) for same in (True, False))
    assert together.value == apart.value == pytest.approx(np.mean([each.value for each in found]))
    # Of one model four times nothing is learned; of four independent texts half as wide an interval.
    low, high = found[0].interval or (0, 0)
    assert Estimate.mean([found[0]] * 4, same_units=True).interval == pytest.approx((low, high))
    ends = Estimate.mean([found[0]] * 4, same_units=False).interval or (0, 0)
    assert ends[1] - ends[0] == pytest.approx((high - low) / 2, rel=0.04)


@pytest.mark.parametrize(("better", "worse", "count"), [(0, 0, 50), (7, 2, 50), (50, 0, 50), (1, 1, 400)])
def test_differences_of_shares_are_agresti_and_mins(better: int, worse: int, count: int) -> None:
    one, other = np.zeros(count), np.zeros(count)
    one[:better] = 1
    other[count - worse :] = 1
    difference = ratio(one, np.ones(count)) - ratio(other, np.ones(count))
    found = Estimate(difference.value, difference.errors, difference.units, added=1).interval or (0, 0)
    total = count + 2
    mean = (better - worse) / total
    variance = (better + worse + 1 - (better - worse) ** 2 / total) / total**2
    half = 1.96 * math.sqrt(variance)
    assert sum(found) / 2 == pytest.approx(mean)
    assert (found[1] - found[0]) / 2 == pytest.approx(half, rel=0.05)  # Student's, and n − 1
