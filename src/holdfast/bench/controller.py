"""The budget controller against heads that answer to λ as a formula says: which interval and which tolerance serve."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.bench.settings import ControllerStudySettings
from holdfast.data.progress import track
from holdfast.machine import describe_machine
from holdfast.pictures import picture
from holdfast.training import BudgetController, ControllerConfig

__all__ = ["SimulatedHeads", "name_rule", "plot_controller_study", "study_controller"]

_NEAR = 0.1  # of the budget: what counts as keeping it
_SURE = 6.0  # log-odds beyond which heads keep all but everything, or all but nothing
_FURTHEST_SHOWN = 40  # per cent: a head further from its budget has not reached it
_PLACES = ("output", "plot")  # settings that say where results go, and nothing of what they are


class SimulatedHeads(nn.Module):
    """Heads that answer to λ in two ways, [N, n] of them: N time constants or paces, n heads each.

    Let y be the log-odds of a pair to be kept. A head with a time constant goes to where λ leaves it:
    y ← y + (y* − y)/τ, y* = −log(λ/λ₀), so at λ = λ₀ it comes to keep half of its pairs. A head with a pace is moved as
    Adam moves a scorer, as fast whatever the size of a gradient: y ← y + pace · m, where m is the running mean over ten
    steps of (w − λ)/(w + |λ|) and w = λ₀·e^(−y/2) what a pair is worth, more where fewer are kept. log λ₀ goes on a
    random walk as the model learns, and what is counted in a step varies with the batch, of each head and of all.

    Args:
        time_constants: τ in steps, one per row.
        paces: of the rows after these, in log-odds per step.
        heads: per row.
        positions: pairs that a head could keep.
        valued: λ₀ at the start.
        walk: standard deviation of log λ₀ after 1,000 steps.
        noise: relative standard deviation of a count.
        shared_noise: of what the batch does to the counts of all heads alike.
        seed: of walk and noise.
    """

    l1_lambda: Tensor
    num_kept: Tensor

    def __init__(
        self,
        time_constants: tuple[float, ...],
        paces: tuple[float, ...],
        heads: int,
        *,
        positions: int,
        valued: float,
        walk: float,
        noise: float,
        shared_noise: float,
        seed: int,
    ) -> None:
        super().__init__()
        shape = (len(time_constants) + len(paces), heads)
        self.register_buffer("l1_lambda", torch.zeros(shape))
        self.register_buffer("num_kept", torch.zeros(shape))
        self.positions, self.step_of_walk = positions, walk / math.sqrt(1000)
        self.noise, self.shared_noise = noise, shared_noise
        self._rate = 1 / torch.tensor(time_constants)[:, None]
        self._pace = torch.tensor(paces)[:, None]
        self._speed = torch.zeros(len(paces), heads)
        self._log_odds = torch.full(shape, _SURE)  # training starts by keeping everything
        self._log_valued = torch.full(shape, math.log(valued))
        self._generator = torch.Generator().manual_seed(seed)

    def step(self) -> tuple[Tensor, Tensor]:
        """One step of training: pairs kept on average, and as counted in this batch; [N, n] each."""
        walk, luck = torch.randn(2, *self._log_odds.shape, generator=self._generator)
        luck = self.noise * luck + self.shared_noise * torch.randn((), generator=self._generator)
        self._log_valued += self.step_of_walk * walk
        drawn = slice(len(self._rate))
        wanted = (self._log_valued[drawn] - self.l1_lambda[drawn].clamp(min=1e-12).log()).clamp(max=_SURE)
        self._log_odds[drawn] += self._rate * (wanted - self._log_odds[drawn])
        driven = slice(len(self._rate), None)
        worth, penalty = (self._log_valued[driven] - self._log_odds[driven] / 2).exp(), self.l1_lambda[driven]
        self._speed += ((worth - penalty) / (worth + penalty.abs()) - self._speed) / 10
        self._log_odds[driven] = (self._log_odds[driven] + self._pace * self._speed).clamp(-_SURE, _SURE)
        kept = self.positions * torch.sigmoid(self._log_odds)
        return kept, (kept * (1 + luck)).clamp(0, self.positions)


@dataclass(frozen=True)
class ControllerCase:
    """What one setting of the rule did to heads of one time constant; medians over the heads.

    Attributes:
        interval: u, of the rule.
        tolerance: of the rule; None: it is proportional, and has none.
        factors: of the rule, α and the divisor; α alone of a proportional one.
        damping: of the proportional rule.
        time_constant: τ of the heads, in steps, or None.
        pace: theirs, in log-odds per step, or None.
        reached: the first step at which a head keeps within a tenth of the budget; None: never.
        within: share of the steps of the last half in which it does.
        error: median distance from the budget in the last half, as a share of it.
        lowest: fewest pairs over the budget once it was reached: how far the rule overshoots.
    """

    interval: int
    tolerance: tuple[float, float] | None
    factors: tuple[float, ...]
    damping: float | None
    time_constant: float | None
    pace: float | None
    reached: int | None
    within: float
    error: float
    lowest: float


def study_controller(settings: ControllerStudySettings, *, progress: bool = True) -> dict[str, Any]:
    """Run the published rule with every interval, tolerance and pair of factors, and the proportional one with every
    interval, α and damping, on the same simulated heads.

    Returns:
        `settings`, `machine` and `cases`, ready for JSON.
    """
    cases: list[ControllerCase] = []
    increases = dict.fromkeys(increase for increase, _ in settings.factors)
    grid: list[ControllerConfig] = []
    for interval, damping in itertools.product(settings.intervals, settings.dampings):
        rule = ControllerConfig(settings.budget, interval=interval)
        if damping is None:
            for tolerance, (increase, decrease) in itertools.product(settings.tolerances, settings.factors):
                grid.append(replace(rule, tolerance=tolerance, increase=increase, decrease=decrease))
        else:
            grid += [replace(rule, increase=a, proportional=True, damping=damping) for a in increases]
    rows = [(constant, None) for constant in settings.time_constants] + [(None, pace) for pace in settings.paces]
    for rule in track(grid, "simulating", progress=progress):
        kept = _simulate(settings, rule)
        for row, (constant, pace) in enumerate(rows):
            measured = _measure(kept[:, row] / settings.budget)
            if rule.proportional:
                case = ControllerCase(rule.interval, None, (rule.increase,), rule.damping, constant, pace, *measured)
            else:
                factors = (rule.increase, rule.decrease)
                case = ControllerCase(rule.interval, rule.tolerance, factors, None, constant, pace, *measured)
            cases.append(case)
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
        settings.paces,
        settings.heads,
        positions=settings.positions,
        valued=settings.valued,
        walk=settings.walk,
        noise=settings.noise,
        shared_noise=settings.shared_noise,
        seed=settings.seed,
    )
    controller = BudgetController(heads, config=config)
    course = torch.empty(settings.steps, *heads.l1_lambda.shape)
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
    answers, rules = (
        list(dict.fromkeys(tuple(_hashable(case[name]) for name in names) for case in study["cases"]))
        for names in (("time_constant", "pace"), ("tolerance", "factors", "damping"))
    )
    with picture(path, (2.9 * len(answers), 5.6)) as figure:
        panels = figure.subplots(2, len(answers), sharex=True, sharey="row", squeeze=False)
        for (at, answer), (number, rule) in itertools.product(enumerate(answers), enumerate(rules)):
            wanted = dict(zip(("time_constant", "pace", "tolerance", "factors", "damping"), answer + rule, strict=True))
            found = [case for case in study["cases"] if all(_hashable(case[key]) == wanted[key] for key in wanted)]
            intervals = [case["interval"] for case in found]
            look: dict[str, Any] = {"color": f"C{number}", "marker": ".s^v"[number % 4], "label": name_rule(found[0])}
            look["linestyle"] = "--" if found[0]["damping"] is None else "-"
            reached = [math.nan if case["reached"] is None else case["reached"] for case in found]
            panels[0][at].plot(intervals, reached, **look)
            panels[1][at].plot(intervals, [100 * case["error"] for case in found], **look)
            title = (
                f"heads follow in τ = {answer[0]:g} steps" if answer[0] else f"heads drift at a pace of {answer[1]:g}"
            )
            panels[0][at].set_title(title, fontsize="small", loc="left")
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


def name_rule(case: dict[str, Any]) -> str:
    """What a case of a study is called in pictures and tables."""
    if case["damping"] is not None:
        return f"proportional, {case['factors'][0]:g}" + f", damping {case['damping']:g}" * bool(case["damping"])
    return "× {:g}, ÷ {:g}, {:g} to {:g}".format(*case["factors"], *case["tolerance"])


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
