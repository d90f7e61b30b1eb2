"""Who decides what the store keeps: the trained scorer, and others at the same budget.

Each scorer of `SCORERS` gives every pair a score above 0, of which only the order counts: the store holds the best
`budget` pairs at every step. So all are compared at the same memory, on a trained model and without further training.
`scoring` puts one into a model:

    with scoring(model, "value_norm", budget=64):
        result = evaluate_needle(model, task)

docs/evaluation.md adds a scorer of one's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from matplotlib.ticker import ScalarFormatter
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from holdfast.configuration import HybridConfig
from holdfast.evaluation.arguments import check_kind, check_log, check_model
from holdfast.evaluation.sample_log import SampleLog
from holdfast.mixers import GatedDeltaNet, LearnedEviction
from holdfast.mixers.layout import TokenLayout
from holdfast.mixers.learned_eviction import LearnedEvictionOptions
from holdfast.modeling import HybridForCausalLM
from holdfast.ops.gated_delta_rule import gated_delta_rule
from holdfast.pictures import picture

__all__ = ["SCORERS", "Scorer", "compare_scorers", "plot_comparison", "scoring", "trained_network"]

Result = TypeVar("Result")

SMALLEST = torch.finfo(torch.float32).tiny
_QUERIES = 256  # of a tile of accumulated attention


class Scorer(ABC):
    """Scores the pairs of one layer of learned eviction, in one pass over whole sequences.

    Args:
        layer: the layer that keeps or drops.
        before: the nearest layer of Gated DeltaNet before it, if there is one.
    """

    def __init__(self, layer: LearnedEviction, before: GatedDeltaNet | None) -> None:
        self.layer = layer

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, features: Tensor, layout: TokenLayout) -> Tensor:
        """Score every pair.

        Only scores above 0 compete for slots; a pair with 0 or less is not worth one, and is dropped when it leaves the
        window even where slots are free. Among those above 0 the order alone counts.

        Args:
            q: queries after RoPE, [B, T, H, D].
            k: keys after RoPE, [B, T, Hkv, D].
            features: keys before RoPE and values, [B, T, Hkv, 2D]; `halves` takes them apart.
            layout: where the tokens stand, and which are pads.

        Returns:
            Scores [B, T, Hkv], fp32; finite but at pads.
        """

    def watch(self) -> list[RemovableHandle]:
        """Hooks that the scorer needs while it is in the model."""
        return []

    @staticmethod
    def require_whole_rows(layout: TokenLayout) -> None:
        """Refuse pads and packed documents, for scorers that look from token to token."""
        if layout.real is not None or layout.cu_seqlens is not None:
            raise ValueError("this scorer reads rows of whole sequences; give them without pads and not packed.")

    def halves(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values, fp32 [B, T, Hkv, D] each."""
        keys, values = features.float().chunk(2, dim=-1)
        return keys, values


class Trained(Scorer):
    """The scorer that the model was trained with, without its threshold: a CNN (LTE), or an MLP (`trained_network`)."""

    def __call__(self, q: Tensor, k: Tensor, features: Tensor, layout: TokenLayout) -> Tensor:
        return self.layer.score(features, layout) + self.layer.router.threshold


class AccumulatedAttention(Scorer):
    """The attention that a key has received when it leaves the window, summed over queries and the heads of its group.

    After H2O (Zhang et al., arXiv 2306.14048), with weights that are normalised over the window. O(T · w) time.
    """

    def __call__(self, q: Tensor, k: Tensor, features: Tensor, layout: TokenLayout) -> Tensor:
        self.require_whole_rows(layout)
        window, length, scale = self.layer.options.window, k.shape[1], k.shape[-1] ** -0.5
        grouped = q.unflatten(2, (k.shape[2], -1)).float()  # [B, T, Hkv, G, D]
        received = k.new_zeros(k.shape[:3], dtype=torch.float32)
        for first in range(0, length, _QUERIES):
            queries = slice(first, min(first + _QUERIES, length))
            keys = slice(max(0, first - window), queries.stop)
            logits = torch.einsum("bihgd,bjhd->bhgij", grouped[:, queries], k[:, keys].float()) * scale
            age = torch.arange(queries.start, queries.stop, device=k.device)[:, None]
            age = age - torch.arange(keys.start, keys.stop, device=k.device)
            weights = logits.masked_fill((age < 0) | (age > window), -torch.inf).softmax(-1)
            received[:, keys] += weights.sum((2, 3)).transpose(1, 2)
        return received.clamp(min=SMALLEST)


class WriteMagnitude(Scorer):
    """β‖e‖ of the preceding layer of Gated DeltaNet: how much it had to change its state for a token.

    e = v − kᵀS is the error of the decayed state before the write; the norms are averaged over the heads. O(T) time.
    """

    def __init__(self, layer: LearnedEviction, before: GatedDeltaNet | None) -> None:
        super().__init__(layer, before)
        if before is None:
            raise ValueError("write_magnitude needs a layer of Gated DeltaNet before the one that evicts.")
        self.before = before
        self.magnitude: Tensor | None = None

    def watch(self) -> list[RemovableHandle]:
        return [self.before.register_forward_pre_hook(self._measure, with_kwargs=True)]

    def _measure(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("hidden", "layout"), args, strict=False)) | kwargs
        self.require_whole_rows(given["layout"])
        _, k, v, decay, beta = self.before.recurrence(given["hidden"], given["layout"])
        # The state after token t, read with the key of token t + 1: all that is known of it before it is written.
        following = torch.cat([k[:, 1:], torch.zeros_like(k[:, :1])], dim=1)
        read, _ = gated_delta_rule(following, k, v, decay, beta, scale=1.0)
        known = torch.cat([torch.zeros_like(v[:, :1]), read[:, :-1]], dim=1)
        error = v.float() - decay.exp().unsqueeze(-1) * known.float()
        self.magnitude = (beta * error.norm(dim=-1)).mean(-1)

    def __call__(self, q: Tensor, k: Tensor, features: Tensor, layout: TokenLayout) -> Tensor:
        assert self.magnitude is not None
        return self.magnitude.unsqueeze(-1).expand(k.shape[:3]).clamp(min=SMALLEST)


class KeyNorm(Scorer):
    """‖k‖, small ones first to stay: they were found to attract attention (Devoto et al., arXiv 2406.11430)."""

    def __call__(self, q: Tensor, k: Tensor, features: Tensor, layout: TokenLayout) -> Tensor:
        return 1 / self.halves(features)[0].norm(dim=-1).clamp(min=SMALLEST)


class ValueNorm(Scorer):
    """‖v‖, large ones first to stay."""

    def __call__(self, q: Tensor, k: Tensor, features: Tensor, layout: TokenLayout) -> Tensor:
        return self.halves(features)[1].norm(dim=-1).clamp(min=SMALLEST)


class Recency(Scorer):
    """The latest pairs stay, as if the window were longer by the budget."""

    def __call__(self, q: Tensor, k: Tensor, features: Tensor, layout: TokenLayout) -> Tensor:
        return (layout.token_positions + 1).float().unsqueeze(-1).expand(k.shape[:3])


class Random(Scorer):
    """Scores drawn anew in each pass, from PyTorch's generator."""

    def __call__(self, q: Tensor, k: Tensor, features: Tensor, layout: TokenLayout) -> Tensor:
        return torch.rand(k.shape[:3], device=k.device).clamp(min=SMALLEST)


SCORERS: dict[str, type[Scorer]] = {
    "trained": Trained,
    "accumulated_attention": AccumulatedAttention,
    "write_magnitude": WriteMagnitude,
    "key_norm": KeyNorm,
    "value_norm": ValueNorm,
    "recency": Recency,
    "random": Random,
}
"""Scorers by name; a further one is a class and an entry here, which may be made from elsewhere.

An MLP has to be trained as the CNN has: it is the trained scorer of a model whose `conv_size` is (1, 1, 1).
"""


def trained_network(config: HybridConfig) -> str:
    """What the trained scorer of a model with learned eviction is.

    Returns:
        "MLP" where its convolutions read one token only, else "CNN, R = 13" with the tokens that it reads.
    """
    options = cast(LearnedEvictionOptions, config.options_for("learned_eviction"))
    if options.receptive_field == 1:
        return "MLP"
    return f"CNN, R = {options.receptive_field}" + (", causal" if options.scorer_causal else "")


@contextlib.contextmanager
def scoring(model: HybridForCausalLM, scorer: str, budget: int) -> Iterator[None]:
    """Let `scorer` decide what the model's stores keep, `budget` pairs per head; afterwards all is as it was.

    For passes without a cache. Sinks stay, and count.

    Args:
        model: with at least one layer of learned eviction.
        scorer: a name in `SCORERS`.
        budget: slots of each store, sinks included.

    Raises:
        TypeError: an argument is no model, no name or no number.
        ValueError: the scorer is unknown, the model has no such layer or not what the scorer needs, or the budget is
            smaller than the number of sinks; and by a pass inside, if what the scorer returns are no scores.

    Warns:
        UserWarning: of a pass inside, if no pair of a layer scores above 0, so that its store holds only sinks.
    """
    check_model(model, hybrid=True)
    check_kind("scorer", scorer, str, "its name in SCORERS, where one of your own goes first")
    check_kind("budget", budget, Integral, "a number of slots")
    if scorer not in SCORERS:
        raise ValueError(f"no scorer is named {scorer!r}; there are {', '.join(SCORERS)}.")
    layers = _layers(model)
    if not layers:
        raise ValueError("the model has no layer of learned eviction, so nothing is scored.")
    scorers = [SCORERS[scorer](layer, before) for layer, before in layers]
    options = [layer.options for layer, _ in layers]
    changed = [dataclasses.replace(option, budget=budget) for option in options]
    handles: list[RemovableHandle] = []
    try:
        for (layer, _), mine, option in zip(layers, scorers, changed, strict=True):
            layer.substitute, layer.options = _checked(scorer, mine), option
            handles += mine.watch()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for (layer, _), option in zip(layers, options, strict=True):
            layer.substitute, layer.options = None, option


def _checked(name: str, scorer: Scorer) -> Callable[[Tensor, Tensor, Tensor, TokenLayout], Tensor]:
    """The scorer, refused where what it returns are no scores."""

    def score(q: Tensor, k: Tensor, features: Tensor, layout: TokenLayout) -> Tensor:
        scores = scorer(q, k, features, layout)
        _check_scores(name, scores, k, layout)
        return scores

    return score


def _check_scores(name: str, scores: Any, k: Tensor, layout: TokenLayout) -> None:
    expected = f"return fp32 scores {list(k.shape[:3])}, one for every pair"
    if not isinstance(scores, Tensor):
        raise ValueError(f"scorer {name!r} returned {type(scores).__name__}, not a tensor; {expected}.")
    if scores.shape != k.shape[:3] or scores.dtype != torch.float32:
        kind = str(scores.dtype).removeprefix("torch.")
        raise ValueError(f"scorer {name!r} returned {kind} {list(scores.shape)}; {expected}.")
    real = scores if layout.real is None else scores[layout.real]
    if not torch.isfinite(real).all():
        raise ValueError(f"scorer {name!r} returned scores that are infinite or NaN, which have no order.")
    # A scorer with a threshold may rightly find nothing in a layer, so it is told, not refused: nothing else shows it.
    if real.numel() and not (real > 0).any():
        warnings.warn(
            f"scorer {name!r} gave no pair of a layer a score above 0, and only scores above 0 compete for slots: the "
            "store holds nothing but sinks.",
            stacklevel=2,
        )


def _layers(model: HybridForCausalLM) -> list[tuple[LearnedEviction, GatedDeltaNet | None]]:
    """The layers that evict, each with the nearest linear layer before it."""
    found, before = [], None
    for block in model.model.layers:
        if isinstance(block.attn, GatedDeltaNet):
            before = block.attn
        elif isinstance(block.attn, LearnedEviction):
            found.append((block.attn, before))
    return found


def compare_scorers(
    model: HybridForCausalLM,
    measure: Callable[[], Result],
    *,
    scorers: Sequence[str] | None = None,
    budgets: Sequence[int],
    seed: int = 0,
    log: SampleLog | None = None,
) -> Iterator[tuple[str, int, Result]]:
    """Measure the model with each scorer at each budget.

    Args:
        model: with at least one layer of learned eviction.
        measure: what to measure; it reads the model without a cache, such as `evaluate_needle` does. With a log it must
            return a plain value.
        scorers: names in `SCORERS`; None: all that are there by now, those of one's own too.
        budgets: slots per head.
        seed: of PyTorch's generator before each measurement, for the random scorer.
        log: where results are kept and, after an interruption, found again; None keeps none. Records are named by
            scorer and budget; the model, the seed and what is measured are for the log to tell apart.

    Yields:
        Scorer, budget and what `measure` returned, one by one.

    Raises:
        TypeError, ValueError: as `scoring`, and where `measure` is no function, or scorers and budgets are no lists.
    """
    check_kind("measure", measure, Callable, "a function without arguments that measures the model")
    check_kind("budgets", budgets, Sequence, "a list of numbers")
    if scorers is not None:
        check_kind("scorers", scorers, Sequence, "a list of names in SCORERS, or None for all")
    check_log(log)
    log = SampleLog(None, {}) if log is None else log
    names = tuple(SCORERS) if scorers is None else scorers
    for budget in budgets:
        for scorer in names:
            name = f"{scorer}/{budget}"
            if name not in log.records:
                torch.manual_seed(seed)
                with scoring(model, scorer, budget):
                    log.append({name: {"result": measure()}})
            yield scorer, budget, log.records[name]["result"]


def plot_comparison(
    values: Mapping[str, Mapping[int, Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    what: str,
    intervals: Mapping[str, Mapping[int, tuple[float, float]]] | None = None,
) -> Path:
    """Draw what was measured against the budget: a line per scorer, the mean over models, in a band from least to most,
    or in that of given intervals.

    Args:
        values: by scorer and budget, a value per model.
        path: file to write; its ending gives the format (png, svg, pdf). Replaced only when the picture is complete.
        what: name of the values.
        intervals: to draw as bands, by scorer and budget, as of one model, which has neither a least nor a most.

    Returns:
        The path written.

    Raises:
        ValueError: `values` is empty.
    """
    if not values:
        raise ValueError("values is empty; give at least one scorer.")
    with picture(path, (8, 4)) as figure:
        axes = figure.add_subplot()
        for scorer, by_budget in values.items():
            budgets = list(by_budget)
            means = [statistics.mean(by_budget[budget]) for budget in budgets]
            (line,) = axes.plot(budgets, means, marker="o", markersize=4, label=scorer.replace("_", " "))
            bands = by_budget if intervals is None else intervals[scorer]
            low, high = ([extreme(bands[budget]) for budget in budgets] for extreme in (min, max))
            axes.fill_between(budgets, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("slots of the store per head")
        axes.set_ylabel(what)
        if all(0 <= value <= 1 for of in values.values() for found in of.values() for value in found):
            axes.set_ylim(-0.02, 1.02)  # shares: a scale of their own would make noise look like differences
        figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return Path(path)
