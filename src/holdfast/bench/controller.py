"""The budget controller against heads that answer to λ as a formula says: which interval and which tolerance serve."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.bench.settings import ControllerStudySettings
from holdfast.data.progress import track
from holdfast.machine import describe_machine
from holdfast.pictures import picture
from holdfast.training import BudgetController, ControllerConfig

__all__ = ["SimulatedHeads", "plot_controller_study", "study_controller"]

_NEAR = 0.1  # of the budget: what counts as keeping it
_FURTHEST_SHOWN = 40  # per cent: a head further from its budget has not reached it
_PLACES = ("output", "plot")  # settings that say where results go, and nothing of what they are


class SimulatedHeads(nn.Module):
    """Heads whose scorers drift towards what λ leaves them, [N, n] of them: N time constants, n heads each.

    With y the log-odds of a pair to be kept, y ← y + (y*(λ) − y)/τ and y* = −log(λ/λ₀): at λ = λ₀ a head comes to keep
    half of its pairs. log λ₀, how much a head values its pairs, goes on a random walk as the model learns, and what is
    counted in a step varies with the batch.

    Args:
        time_constants: τ in steps, one per row.
        heads: per row.
        positions: pairs that a head could keep.
        valued: λ₀ at the start.
        walk: standard deviation of log λ₀ after 1,000 steps.
        noise: relative standard deviation of a count.
        seed: of walk and noise.
    """

    l1_lambda: Tensor
    num_kept: Tensor

    def __init__(
        self,
        time_constants: tuple[float, ...],
        heads: int,
        *,
        positions: int,
        valued: float,
        walk: float,
        noise: float,
        seed: int,
    ) -> None:
        super().__init__()
        shape = (len(time_constants), heads)
        self.register_buffer("l1_lambda", torch.zeros(shape))
        self.register_buffer("num_kept", torch.zeros(shape))
        self.positions, self.noise, self.step_of_walk = positions, noise, walk / math.sqrt(1000)
        self._rate = 1 / torch.tensor(time_constants)[:, None]
        self._log_odds = torch.full(shape, 6.0)  # training starts by keeping everything
        self._log_valued = torch.full(shape, math.log(valued))
        self._generator = torch.Generator().manual_seed(seed)

    def step(self) -> tuple[Tensor, Tensor]:
        """One step of training: pairs kept on average, and as counted in this batch; [N, n] each."""
        walk, luck = torch.randn(2, *self._log_odds.shape, generator=self._generator)
        self._log_valued += self.step_of_walk * walk
        wanted = (self._log_valued - self.l1_lambda.clamp(min=1e-12).log()).clamp(max=6.0)
        self._log_odds += self._rate * (wanted - self._log_odds)
        kept = self.positions * torch.sigmoid(self._log_odds)
        return kept, (kept * (1 + self.noise * luck)).clamp(0, self.positions)


@dataclass(frozen=True)
class ControllerCase:
    """What one setting of the rule did to heads of one time constant; medians over the heads.

    Attributes:
        interval, tolerance, factors, proportional: of the rule; the factors are α and the divisor.
        time_constant: τ of the heads, in steps.
        reached: the first step at which a head keeps within a tenth of the budget; None: never.
        within: share of the steps of the last half in which it does.
        error: median distance from the budget in the last half, as a share of it.
        lowest: fewest pairs over the budget once it was reached: how far the rule overshoots.
    """

    interval: int
    tolerance: tuple[float, float]
    factors: tuple[float, float]
    proportional: bool
    time_constant: float
    reached: int | None
    within: float
    error: float
    lowest: float


def study_controller(settings: ControllerStudySettings, *, progress: bool = True) -> dict[str, Any]:
    """Run the rule itself with every interval, tolerance and pair of factors on the same simulated heads.

    Returns:
        `settings`, `machine` and `cases`, ready for JSON.
    """
    cases: list[ControllerCase] = []
    grid = list(itertools.product(settings.intervals, settings.tolerances, settings.factors, settings.proportional))
    for interval, tolerance, factors, proportional in track(grid, "simulating", progress=progress):
        rule = ControllerConfig(
            settings.budget,
            increase=factors[0],
            decrease=factors[1],
            interval=interval,
            tolerance=tolerance,
            proportional=proportional,
        )
        kept = _simulate(settings, rule)
        for row, time_constant in enumerate(settings.time_constants):
            measured = _measure(kept[:, row] / settings.budget)
            cases.append(ControllerCase(interval, tolerance, factors, proportional, time_constant, *measured))
    return {
        "benchmark": "controller",
        "settings": {name: value for name, value in dataclasses.asdict(settings).items() if name not in _PLACES},
        "machine": describe_machine(),
        "cases": [dataclasses.asdict(case) for case in cases],
    }


def _simulate(settings: ControllerStudySettings, config: ControllerConfig) -> Tensor:
    """Pairs kept at every step, [steps, N, n]."""
    heads = SimulatedHeads(
        settings.time_constants,
        settings.heads,
        positions=settings.positions,
        valued=settings.valued,
        walk=settings.walk,
        noise=settings.noise,
        seed=settings.seed,
    )
    controller = BudgetController(heads, config=config)
    course = torch.empty(settings.steps, len(settings.time_constants), settings.heads)
    for step in range(settings.steps):
        course[step], counted = heads.step()
        controller.step(counted)
    return course


def _measure(ratio: Tensor) -> tuple[int | None, float, float, float]:
    """`reached`, `within`, `error` and `lowest` of kept over budget [steps, n]."""
    near = (ratio - 1).abs() <= _NEAR
    later = slice(len(ratio) // 2, None)
    first = torch.where(near.any(0), near.float().argmax(0), len(ratio))
    once = torch.arange(len(ratio))[:, None] >= first
    lowest = ratio.masked_fill(~once, math.inf).amin(0).median()
    reached = int(first.median())
    within, error = near[later].float().mean(0).median(), (ratio[later] - 1).abs().median(0).values.median()
    return (reached if reached < len(ratio) else None), float(within), float(error), float(lowest.clamp(max=1))


def plot_controller_study(study: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw a study: when heads reach their budget, and how far they are from it later, by interval.

    Args:
        study: from `study_controller`, or its JSON.
        path: file to write; its ending gives the format (png, svg, pdf).
    """
    constants, tolerances, factors, kinds = (
        list(dict.fromkeys(map(_hashable, (case[name] for case in study["cases"]))))
        for name in ("time_constant", "tolerance", "factors", "proportional")
    )
    with picture(path, (3.4 * len(constants), 5.4)) as figure:
        panels = figure.subplots(2, len(constants), sharex=True, sharey="row", squeeze=False)
        lines = list(itertools.product(enumerate(tolerances), enumerate(factors), kinds))
        for (at, constant), ((colour, tolerance), (style, factor), kind) in itertools.product(
            enumerate(constants), lines
        ):
            wanted = {"time_constant": constant, "tolerance": tolerance, "factors": factor, "proportional": kind}
            found = [case for case in study["cases"] if all(_hashable(case[key]) == wanted[key] for key in wanted)]
            intervals = [case["interval"] for case in found]
            look: dict[str, Any] = {"color": f"C{colour}", "linestyle": ("-", "--", ":")[style % 3]}
            look["marker"] = "s" if kind else "."
            look["label"] = f"{tolerance[0]:g} to {tolerance[1]:g}, × {factor[0]:g} or ÷ {factor[1]:g}"
            look["label"] += ", proportional" * kind
            reached = [math.nan if case["reached"] is None else case["reached"] for case in found]
            panels[0][at].plot(intervals, reached, **look)
            panels[1][at].plot(intervals, [100 * case["error"] for case in found], **look)
            panels[0][at].set_title(f"heads follow in τ = {constant:g} steps", fontsize="small", loc="left")
            panels[1][at].set_xscale("log", base=2)
            panels[1][at].set_xticks(intervals, [str(interval) for interval in intervals])
            panels[1][at].set_xlabel("update interval u (steps)")
        panels[0][0].set_ylabel("budget reached at step")
        panels[1][0].set_ylabel("typical distance from b later (%)")
        panels[0][0].set_ylim(bottom=0)
        panels[1][0].set_ylim(0, _FURTHEST_SHOWN)
        for axes in panels.flat:
            axes.grid(alpha=0.2)
        named = panels[0][0].get_legend_handles_labels()
        figure.legend(*named, loc="outside lower center", ncols=3, fontsize="x-small")
    return Path(path)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
