"""Ratios of two sums over blocks of text or samples, such as a mean loss, and how far they can be trusted.

The units that are drawn are blocks (or samples), not tokens: tokens of one block are not independent. A ratio
R = Σy / Σx over n units, y the loss and x the tokens of one, has the standard error of the ratio estimator (Cochran,
Sampling Techniques, 3rd ed. 1977, chapter 6): unit i contributes (y_i − R·x_i) / Σx, and the variance is n / (n − 1)
times the sum of the squares of these. To first order a bootstrap over the blocks gives the same; this needs no random
numbers, and what units contribute can be subtracted unit by unit. So the difference of two models on the same blocks
has an interval that leaves out how difficult the blocks are, which is most of what either's own interval consists of.
Intervals are Student's, with n − 1 degrees of freedom.

They say what other blocks drawn as these were would give, the models being as they are. They do not cover the seeds of
training: another run of the same recipe may differ by more. Nor do they cover other documents than those read: blocks
that follow each other in one long document are alike in what it is about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Estimate", "student_quantile"]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number, and what each unit contributes to its error.

    Attributes:
        value: the estimate.
        errors: fp64 [N], the contributions of the units; they sum up to 0.
        units: n, how many of them count; the others have nothing in the denominator, and contribute 0.
        added: pairs of units that the interval has more, one better and one worse, whose squares are half of what a
            difference of shares can have. Agresti and Min (Statistics in Medicine 24, 2005) add one to differences of
            shares, which otherwise would seem exact where all samples agree.
    """

    value: float
    errors: np.ndarray
    units: int
    added: int = 0

    @classmethod
    def ratio(cls, numerators: ArrayLike, denominators: ArrayLike) -> Estimate | None:
        """Σ numerators / Σ denominators of units, [N] each, as of losses and tokens; None if the latter are all 0."""
        above, below = (np.asarray(values, dtype=np.float64) for values in (numerators, denominators))
        total = below.sum()
        if not total:
            return None
        value = float(above.sum() / total)
        return cls(value, (above - value * below) / total, int(np.count_nonzero(below)))

    @classmethod
    def mean(cls, estimates: Sequence[Estimate], *, same_units: bool) -> Estimate:
        """The mean of several, of the same units in the same order, or else each of units of its own."""
        weighted = [estimate.errors / len(estimates) for estimate in estimates]
        errors = np.sum(weighted, axis=0) if same_units else np.concatenate(weighted)
        units = estimates[0].units if same_units else sum(estimate.units for estimate in estimates)
        return cls(math.fsum(estimate.value for estimate in estimates) / len(estimates), errors, units)

    def __sub__(self, other: Estimate) -> Estimate:
        """The paired difference, both being of the same units in the same order."""
        return Estimate(self.value - other.value, self.errors - other.errors, self.units)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval; None where fewer than two units count."""
        more = 2 * self.added
        units = self.units + more
        if units < 2:
            return None
        between = self.added + self.units * more / units * self.value**2 if more else 0.0
        squares = self.units**2 * float(np.square(self.errors).sum()) + between
        half = student_quantile(units - 1) * math.sqrt(squares / (units * (units - 1)))
        centre = self.value * self.units / units
        return centre - half, centre + half

    def to_dict(self) -> dict[str, Any]:
        """Value and interval, ready for JSON."""
        return {"value": self.value, "interval": None if self.interval is None else list(self.interval)}


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution with so many degrees of freedom, at least 1; within 0.2 %.

    Exact for 1 and 2, else the expansion in 1/freedom of Abramowitz and Stegun (1964), 26.7.5.
    """
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
