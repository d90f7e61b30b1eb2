"""Shares of right answers, with how far they can be trusted.

Several answers of one sample are not independent: a model that lost the beginning of a text is wrong about all that was
told there. Their interval is Wilson's on the effective number of answers (see `effective_count`), which is the number
of answers where every sample has one, and that of samples where all answers of a sample are right or wrong together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Share", "draw_shares", "effective_count", "pooled", "wilson_interval"]


@dataclass(frozen=True)
class Share:
    """How many of `count` answers were right; what follows is None where there is no answer.

    Attributes:
        count: answers. Where several answers of one sample were averaged, samples: each then adds its mean.
        correct: right ones; a fraction where means were added.
        effective: as many independent answers tell as much; None: all are independent.
    """

    count: int
    correct: float
    effective: float | None = field(default=None, kw_only=True)

    @property
    def accuracy(self) -> float | None:
        """Share of right answers, 0 to 1."""
        return self.correct / self.count if self.count else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of the accuracy, on the effective number of answers."""
        if not self.count:
            return None
        trials = self.count if self.effective is None else self.effective
        return wilson_interval(min(self.correct * (trials / self.count), trials), trials)

    def to_dict(self) -> dict[str, Any]:
        """Counts and what follows from them, ready for JSON."""
        interval = None if self.interval is None else list(self.interval)
        counts = {"count": self.count, "correct": self.correct, "effective": self.effective}
        return {**counts, "accuracy": self.accuracy, "interval": interval}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Share:
        """Inverse of `to_dict`; of what was written before there were effective numbers too."""
        return cls(count=data["count"], correct=data["correct"], effective=data.get("effective"))


def pooled(shares: Sequence[Share]) -> Share:
    """All answers of several shares together, of different samples each."""
    effective = None
    if any(share.effective is not None for share in shares):
        effective = sum(share.count if share.effective is None else share.effective for share in shares)
    return Share(sum(share.count for share in shares), sum(share.correct for share in shares), effective=effective)


def draw_shares(axes: Any, x: Sequence[float], shares: Sequence[Share], label: str) -> None:
    """Draw accuracies into matplotlib's `axes` as a line over `x`, their 95 % intervals as a band around it.

    Every share has answers.
    """
    low, high = zip(*(share.interval or (0.0, 1.0) for share in shares), strict=True)
    (line,) = axes.plot(x, [share.accuracy for share in shares], marker="o", markersize=4, label=label)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def effective_count(samples: ArrayLike, right: ArrayLike) -> float | None:
    """As many independent answers tell as much about the accuracy as these, of which some belong to one sample.

    It is the number of answers over their design effect (Kish 1965): how many times as large the variance of the
    accuracy is between samples, as a ratio of two sums over them, as between independent answers. Two samples of the
    mean size, one all right and one all wrong, are added, as Agresti and Coull (1998) add answers: else nothing could
    be said of answers that are all right. It is never more than there are answers, and never less than where those of a
    sample are right or wrong together.

    Args:
        samples: for each answer a number that tells its sample from others, integers [N].
        right: for each answer whether it is right, [N].

    Returns:
        The number, exactly N where every sample has one answer; None without answers.
    """
    _, which = np.unique(np.asarray(samples), return_inverse=True)
    sizes = np.bincount(which).astype(float)
    count = len(which)
    if count == 0 or len(sizes) == count:
        return float(count) or None
    found = np.bincount(which, weights=np.asarray(right, dtype=float))
    together = count**2 / np.square(sizes).sum()
    mean = sizes.mean()
    sizes, found = np.append(sizes, [mean, mean]), np.append(found, [mean, 0.0])
    answers, clusters = sizes.sum(), len(sizes)
    share = found.sum() / answers
    between = clusters / (clusters - 1) * np.square(found - share * sizes).sum() / answers**2
    independent = share * (1 - share) / (answers - 1)
    return float(np.clip(count * independent / between, together, count))


def wilson_interval(successes: float, trials: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); `z` is the normal quantile, by default that of 95 %.

    Raises:
        ValueError: not 0 ≤ successes ≤ trials, or fewer trials than one.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials is no proportion; give 0 ≤ successes ≤ trials.")
    share = successes / trials
    shrink = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # Exactly 0 and 1 where nothing or everything succeeded: rounding would leave some 1e-17 of it.
    return (
        max(0.0, centre - half) if successes > 0 else 0.0,
        min(1.0, centre + half) if successes < trials else 1.0,
    )
