"""A page that shows what training runs did: losses, speed, and over time what each head kept."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure

from holdfast.data.progress import track
from holdfast.pages import details_element, heading, note, picture_element, table_element, write_page
from holdfast.pictures import new_figure
from holdfast.training.history import RunHistory

__all__ = ["write_report"]

_MOST_COLUMNS = 240  # of a heat map; more records are averaged
_MOST_NAMES = 32  # of heads beside it
_MOST_STRETCHES = 8  # of steps in the table of its numbers
_RATIOS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of kept to budget, beside its colours
_FURTHEST = _RATIOS[-1]
_ABSENT = "not recorded"
_MEANINGS = """\
kept: pairs of a sequence that a head scores above the threshold, which is what λ steers towards the budget. stored:
pairs that its store really holds after the last token, sinks included, at most the budget. Tables show means over the
last tenth of what was logged; utilisation is the share of the devices' operations per second that the model's own
operations take."""


def write_report(runs: Sequence[RunHistory], path: str | os.PathLike[str], *, progress: bool = False) -> Path:
    """Write one HTML page that needs neither network nor server: its pictures are inside.

    Args:
        runs: from `holdfast.training.history.read_history`.
        path: file to write, replaced only when the page is complete.
        progress: show a bar on standard error.

    Returns:
        The path written.

    Raises:
        ValueError: if there is no run.
    """
    if not runs:
        raise ValueError("there is no run to report on; give at least one.")
    parts = [_summary(runs), picture_element(draw_losses(runs), "losses by step")]
    if any(len(run.series("tokens_per_second")[0]) for run in runs):
        parts.append(picture_element(draw_speed(runs), "tokens per second and utilisation by step"))
    for run in track(runs, "drawing heads", progress=progress):
        if len(run.by_head("kept")[0]):
            parts.append(heading(f"{run.name}: what each head kept"))
            parts.append(picture_element(draw_heads(run), "kept and stored pairs and λ of every head, by step"))
            parts.append(details_element("The numbers of the heat maps", _numbers(run)))
            parts.append(_heads(run))
    return write_page(path, ", ".join(run.name for run in runs), [*parts, note(_MEANINGS)])


def draw_losses(runs: Sequence[RunHistory]) -> Figure:
    """Training losses (a running mean over a pale line of all) and evaluation losses (dots), by step."""
    figure = new_figure((10.0, 3.6))
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        colour = f"C{number % 10}"
        steps, losses = run.series("loss")
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _running_mean(losses), color=colour, label=run.name)
        axes.plot(*run.series("eval_loss"), "o", color=colour, markersize=4)
    every = np.concatenate([run.series("loss")[1] for run in runs])
    if np.isfinite(every).any():  # the first losses would press all others flat
        axes.set_ylim(top=np.nanpercentile(every, 97) * 1.05)
    _finish(axes, "loss (dots: evaluation)")
    axes.legend(fontsize="small")
    return figure


def draw_speed(runs: Sequence[RunHistory]) -> Figure:
    """Tokens per second, and where it is known the utilisation, by step."""
    known = any(len(run.series("utilisation")[0]) for run in runs)
    figure = new_figure((10.0, 2.8))
    panels = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
    for number, run in enumerate(runs):
        for axes, name, scale in zip(panels, ("tokens_per_second", "utilisation"), (1, 100), strict=False):
            steps, values = run.series(name)
            axes.plot(steps, values * scale, color=f"C{number % 10}", linewidth=0.9)
    for axes, label in zip(panels, ("tokens/s", "utilisation (%)"), strict=False):
        _finish(axes, label)
        axes.set_ylim(bottom=0)
    return figure


def draw_heads(run: RunHistory) -> Figure:
    """Heat maps over time, a row per layer and head: kept over budget, how full the store is, and λ."""
    maps = _heat_maps(run)
    layers, heads = maps[0].values.shape[1:]
    figure = new_figure((10.0, len(maps) * (1.0 + min(0.16 * layers * heads, 6.0))))
    panels = figure.subplots(len(maps), 1, sharex=True, squeeze=False)[:, 0]
    for axes, each in zip(panels, maps, strict=True):
        _draw_heat_map(axes, each)
        _name_rows(axes, run.head_names(layers, heads))
        bar = figure.colorbar(axes.collections[0], ax=axes, pad=0.01, aspect=12)
        if each.ticks:
            bar.set_ticks(each.ticks, labels=[f"{tick:g}" for tick in each.ticks])
            bar.minorticks_off()
        axes.set_title(each.label, fontsize="small", loc="left")
    panels[-1].set_xlabel("step")
    return figure


@dataclass(frozen=True)
class _HeatMap:
    """What a heat map shows: values [N, L, Hkv] at steps [N], and in which colours."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    norm: Normalize
    colours: str
    ticks: tuple[float, ...] = ()


def _heat_maps(run: RunHistory) -> list[_HeatMap]:
    steps, kept = run.by_head("kept")
    stored_steps, stored = run.by_head("stored")
    lambda_steps, penalty = run.by_head("lambda")
    if run.budget is None:
        maps = [_HeatMap("kept", steps, kept, Normalize(0, max(1.0, kept.max())), "viridis")]
    else:
        about_one = LogNorm(_RATIOS[0], _RATIOS[-1])
        maps = [_HeatMap(f"kept ÷ budget ({run.budget})", steps, kept / run.budget, about_one, "PuOr_r", _RATIOS)]
        if len(stored_steps):
            label = f"stored ÷ budget ({run.budget})"
            maps.append(_HeatMap(label, stored_steps, stored / run.budget, Normalize(0, 1), "viridis"))
    if (penalty != 0).any():
        shown = np.where(penalty != 0, penalty, np.nan)
        lowest, highest = np.nanmin(np.abs(shown)), np.nanmax(np.abs(shown))
        bounds: Normalize = LogNorm(lowest, max(highest, 10 * lowest))
        label, colours = "λ (grey: 0)", "magma"
        if (penalty < 0).any():
            bounds = SymLogNorm(lowest, vmin=-highest, vmax=highest)
            label, colours = "λ (grey: 0; below 0 it raises scores)", "RdBu_r"
        maps.append(_HeatMap(label, lambda_steps, shown, bounds, colours))
    return maps


def _draw_heat_map(axes: Axes, shown: _HeatMap) -> None:
    """Draw heads × time; what is off the scale takes the colour of its end, NaN is grey."""
    rows = shown.values.reshape(len(shown.values), -1)
    groups = np.array_split(np.arange(len(rows)), min(len(rows), _MOST_COLUMNS))
    columns = np.stack([_mean(rows[group]) for group in groups], axis=1)
    columns = np.clip(columns, shown.norm.vmin, shown.norm.vmax)
    begin = 2 * shown.steps[0] - shown.steps[1] if len(rows) > 1 else 0
    edges = np.array([begin, *(shown.steps[group[-1]] for group in groups)], dtype=float)
    palette = colormaps[shown.colours].with_extremes(bad="0.85")
    axes.pcolormesh(edges, np.arange(rows.shape[1] + 1), columns, norm=shown.norm, cmap=palette)
    axes.invert_yaxis()


def _mean(rows: np.ndarray) -> np.ndarray:
    """Column means of the numbers that are there; NaN where there are none."""
    there = np.isfinite(rows)
    return np.where(there, rows, 0).sum(axis=0) / np.where(there.any(axis=0), there.sum(axis=0), np.nan)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    stride = math.ceil(len(names) / _MOST_NAMES)
    axes.set_yticks(np.arange(0, len(names), stride) + 0.5, names[::stride], fontsize="x-small")


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of each value and its neighbours, a fortieth of all in number; NaN is left out."""
    reach = len(values) // 80
    sums = np.concatenate([[0.0], np.nancumsum(values)])
    counts = np.concatenate([[0], np.cumsum(np.isfinite(values))])
    at = np.arange(len(values))
    first, end = np.maximum(0, at - reach), np.minimum(len(values), at + reach + 1)
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[first]) / (counts[end] - counts[first])


def _finish(axes: Axes, label: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.2)


def _summary(runs: Sequence[RunHistory]) -> str:
    """One row per run."""
    columns: dict[str, Callable[[RunHistory], str]] = {
        "run": lambda run: run.name,
        "steps": _steps,
        "loss": lambda run: _recent(run, "loss", "{:.4f}"),
        "evaluation loss": lambda run: _last(run, "eval_loss", "{:.4f}"),
        "tokens/s": lambda run: _recent(run, "tokens_per_second", "{:,.0f}"),
        "utilisation": lambda run: _recent(run, "utilisation", "{:.1%}"),
        "kept": lambda run: _recent(run, "kept_mean", "{:.1f}"),
        "stored": lambda run: _recent(run, "stored_mean", "{:.1f}"),
        "budget": lambda run: "–" if run.budget is None else str(run.budget),
        "heads within 10 %": _near_budget,
    }
    return table_element(list(columns), [[show(run) for show in columns.values()] for run in runs])


def _heads(run: RunHistory) -> str:
    """One row per head."""
    kept, stored, penalty = (run.by_head(name)[1] for name in ("kept", "stored", "lambda"))
    names = run.head_names(*kept.shape[1:])
    shown = [
        [f"{value:{form}}" for value in run.recent(values).flatten()] if len(values) else [_ABSENT] * len(names)
        for values, form in ((kept, ".1f"), (stored, ".1f"), (penalty, ".2g"))
    ]
    return table_element(["head", "kept", "stored", "λ"], [list(row) for row in zip(names, *shown, strict=True)])


def _numbers(run: RunHistory) -> list[str]:
    """A table for each heat map: a row per head, and in each column the mean over a stretch of steps."""
    tables = []
    for shown in _heat_maps(run):
        names = run.head_names(*shown.values.shape[1:])
        rows = shown.values.reshape(len(shown.values), -1)
        groups = np.array_split(np.arange(len(rows)), min(len(rows), _MOST_STRETCHES))
        columns = [[f"{value:.3g}" if np.isfinite(value) else "0" for value in _mean(rows[group])] for group in groups]
        steps = [f"to step {shown.steps[group[-1]]:,}" for group in groups]
        body = [list(row) for row in zip(names, *columns, strict=True)]
        tables.append(table_element(["head", *steps], body, shown.label.replace(" (grey: 0", " (0 left out of means")))
    return tables


def _steps(run: RunHistory) -> str:
    planned = "" if run.planned_steps is None else f" of {run.planned_steps:,}"
    return f"{run.last_step:,}{planned}{'' if run.finished else ' (unfinished)'}"


def _recent(run: RunHistory, name: str, form: str) -> str:
    values = run.series(name)[1]
    return form.format(run.recent(values)) if len(values) else _ABSENT


def _last(run: RunHistory, name: str, form: str) -> str:
    values = run.series(name)[1]
    return form.format(values[-1]) if len(values) else _ABSENT


def _near_budget(run: RunHistory) -> str:
    """How many heads kept the budget within a tenth, on average over the last tenth of the records."""
    kept = run.by_head("kept")[1]
    if run.budget is None or not len(kept):
        return "–"
    near = np.abs(run.recent(kept) / run.budget - 1) <= 0.1
    return f"{near.sum()} of {near.size}"
