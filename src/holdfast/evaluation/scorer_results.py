"""What a model finds with one scorer at one budget, sample by sample, and means and differences of it.

Means are over models (seeds of one recipe) and over tasks, differences to another scorer at the same budget. Both are
taken sample by sample, or block by block of text, so that their intervals leave out what all scorers find hard. They
are over samples and blocks, the models being as they are: they do not cover other seeds of training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from holdfast.evaluation.inference import perplexity
from holdfast.evaluation.intervals import Share, effective_count
from holdfast.evaluation.perplexity_result import PerplexityResult, exp_interval
from holdfast.evaluation.ratios import Estimate

__all__ = ["Accuracies", "Losses", "Place", "SampleAnswers", "mean_share"]

Place = tuple[str, int]
"""A scorer and a budget."""


@dataclass(frozen=True)
class SampleAnswers:
    """Right answers of a model to samples of a task.

    Attributes:
        drawn: a name of the samples; where two have the same, sample i of one is sample i of the other.
        answers: to each sample.
        right: of these.
    """

    drawn: str
    answers: tuple[int, ...]
    right: tuple[int, ...]

    @property
    def share(self) -> Share:
        """Of right answers, those of one sample taken together."""
        return mean_share([self])

    @property
    def estimate(self) -> Estimate:
        """The accuracy, with what each sample contributes to its error.

        Raises:
            ValueError: there is no answer.
        """
        if (found := Estimate.ratio(self.right, self.answers)) is None:
            raise ValueError("there are no answers; give samples that have some.")
        return found

    def to_dict(self) -> dict[str, Any]:
        """The share and what it follows from, ready for JSON."""
        by_sample = {"drawn": self.drawn, "answers": list(self.answers), "right": list(self.right)}
        return {**self.share.to_dict(), "by_sample": by_sample}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SampleAnswers:
        """Inverse of `to_dict`."""
        found = data["by_sample"]
        return cls(found["drawn"], tuple(found["answers"]), tuple(found["right"]))


@dataclass(frozen=True)
class Accuracies:
    """The mean accuracy of models, and over tasks.

    Attributes:
        found: by task, and then by scorer and budget, the answers of each model.
    """

    found: Mapping[str, Mapping[Place, Sequence[SampleAnswers]]]

    def share(self, at: Place) -> Share:
        """The mean over models, with all their answers to one sample taken together, and over tasks, whose samples have
        nothing to do with each other."""
        shares = [mean_share(places[at]) for places in self.found.values()]
        if len(shares) == 1:
            return shares[0]
        count = sum(share.count for share in shares)
        mean = statistics.fmean(share.accuracy or 0.0 for share in shares)
        return Share(count, mean * count, effective=math.fsum(share.effective or share.count for share in shares))

    def value(self, at: Place) -> float:
        """The accuracy."""
        return self.share(at).accuracy or 0.0

    def interval(self, at: Place) -> tuple[float, float] | None:
        """Of the accuracy, 95 %."""
        return self.share(at).interval

    def difference(self, at: Place, reference: Place) -> Estimate:
        """How much greater the accuracy is than that at `reference`, sample by sample."""
        means = []
        for places in self.found.values():
            pairs = zip(places[at], places[reference], strict=True)
            same = _alike(each.drawn for each in places[at])
            means.append(Estimate.mean([one.estimate - other.estimate for one, other in pairs], same_units=same))
        return replace(Estimate.mean(means, same_units=False), added=1)


@dataclass(frozen=True)
class Losses:
    """The mean loss of models on text, block by block where they read the same blocks.

    Attributes:
        found: by scorer and budget, the result of each model.
    """

    found: Mapping[Place, Sequence[PerplexityResult]]

    def mean(self, at: Place) -> Estimate:
        """The mean over models of the mean negative log-likelihood."""
        return Estimate.mean([_loss(result) for result in self.found[at]], same_units=self._same_blocks(at))

    def value(self, at: Place) -> float:
        """The perplexity: exp of the mean loss."""
        return perplexity(self.mean(at).value)

    def interval(self, at: Place) -> tuple[float, float] | None:
        """Of the perplexity, 95 %."""
        return exp_interval(self.mean(at).interval)

    def difference(self, at: Place, reference: Place) -> Estimate:
        """How much greater the mean loss is than that at `reference`, block by block."""
        pairs = zip(self.found[at], self.found[reference], strict=True)
        return Estimate.mean([_loss(one) - _loss(other) for one, other in pairs], same_units=self._same_blocks(at))

    def interval_beside(self, at: Place, reference: Place) -> tuple[float, float] | None:
        """Of the perplexity, 95 %, as it lies beside that at `reference`, taken as it is; None for the reference."""
        base = self.mean(reference).value
        if at == reference or (ends := self.difference(at, reference).interval) is None:
            return None
        return exp_interval((base + ends[0], base + ends[1]))

    def _same_blocks(self, at: Place) -> bool:
        return _alike(tuple(each.block for each in result.by_block) for result in self.found[at])


def mean_share(found: Sequence[SampleAnswers]) -> Share:
    """The mean accuracy of models on one task, with all their answers to one sample taken together."""
    step = 0 if _alike(each.drawn for each in found) else max(len(each.answers) for each in found)
    numbers = [index * step + np.arange(len(each.answers)).repeat(each.answers) for index, each in enumerate(found)]
    count, right = sum(map(len, numbers)), np.concatenate([_spread(each) for each in found])
    mean = statistics.fmean(each.estimate.value for each in found)
    correct = sum(found[0].right) if len(found) == 1 else mean * count
    return Share(count, correct, effective=effective_count(np.concatenate(numbers), right))


def _spread(found: SampleAnswers) -> np.ndarray:
    """A 1 or 0 for every answer, those of a sample side by side."""
    return np.concatenate(
        [np.arange(answers) < right for answers, right in zip(found.answers, found.right, strict=True)]
    ).astype(float)


def _loss(result: PerplexityResult) -> Estimate:
    if result.loss is None:
        raise ValueError("the result has no sums by block; measure again.")
    return result.loss


def _alike(values: Iterable[Any]) -> bool:
    return len(set(values)) == 1
