"""Shares of right answers, with how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Share", "draw_shares", "wilson_interval"]


@dataclass(frozen=True)
class Share:
    """How many of `count` answers were right; what follows is None where there is no answer.

    Attributes:
        count: answers. Where several answers of one sample were averaged, samples: those of one sample are not
            independent, and each then adds its mean.
        correct: right ones; a fraction where means were added.
    """

    count: int
    correct: float

    @property
    def accuracy(self) -> float | None:
        """Share of right answers, 0 to 1."""
        return self.correct / self.count if self.count else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of the accuracy."""
        return wilson_interval(self.correct, self.count) if self.count else None

    def to_dict(self) -> dict[str, Any]:
        """Counts and what follows from them, ready for JSON."""
        interval = None if self.interval is None else list(self.interval)
        return {"count": self.count, "correct": self.correct, "accuracy": self.accuracy, "interval": interval}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Share:
        """Inverse of `to_dict`."""
        return cls(count=data["count"], correct=data["correct"])


def draw_shares(axes: Any, x: Sequence[float], shares: Sequence[Share], label: str) -> None:
    """Draw accuracies into matplotlib's `axes` as a line over `x`, their 95 % intervals as a band around it.

    Every share has answers.
    """
    low, high = zip(*(share.interval or (0.0, 1.0) for share in shares), strict=True)
    (line,) = axes.plot(x, [share.accuracy for share in shares], marker="o", markersize=4, label=label)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def wilson_interval(successes: float, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); `z` is the normal quantile, by default that of 95 %.

    Raises:
        ValueError: not 0 ≤ successes ≤ trials, or no trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials is no proportion; give 0 ≤ successes ≤ trials.")
    share = successes / trials
    shrink = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)
