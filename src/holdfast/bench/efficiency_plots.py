"""Pictures of what models cost: by context, and against what they recall."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from holdfast.bench.accuracy import Accuracy
from holdfast.bench.costs import Cost, ModelCosts
from holdfast.bench.plots import label_values, scale_axes
from holdfast.pictures import picture

__all__ = ["Point", "pareto_front", "pareto_points", "plot_costs", "plot_pareto"]

Value = Callable[[Cost], float | None]

PANELS: tuple[tuple[str, str, Value], ...] = (
    ("prefill, tokens per second", "", lambda cost: cost.prefill_rate),
    ("latency per token: median, up to p99", "s", lambda cost: cost.decode.summary.median),
    ("cache", "B", lambda cost: cost.cache_bytes),
    ("peak memory while reading", "B", lambda cost: cost.peak_bytes),
)


def plot_costs(results: Mapping[str, ModelCosts], path: str | os.PathLike[str], *, machine: str = "") -> Path:
    """Draw prefill speed, latency, cache and peak memory by context: a row for each batch size, a line for each model.

    Args:
        results: from `measure_efficiency`.
        path: file to write; its ending gives the format (png, svg, pdf). Replaced only when the picture is complete.
        machine: where it was measured, written below.

    Raises:
        ValueError: if nothing was measured.
    """
    batches = sorted({cost.batch for costs in results.values() for cost in costs.costs})
    if not batches:
        raise ValueError("nothing was measured, so there is nothing to draw; raise the limit or shorten the contexts.")
    with picture(path, (15, 0.8 + 3.2 * len(batches))) as figure:
        grid = figure.subplots(len(batches), len(PANELS), squeeze=False)
        for row, batch in zip(grid, batches, strict=True):
            for axes, (title, unit, value) in zip(row, PANELS, strict=True):
                _draw_panel(axes, results, batch, unit, value)
                axes.set_title(f"{title} (batch {batch})", fontsize="small", loc="left")
        lines, names = grid[0][0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside upper center", ncols=len(names), fontsize="small", frameon=False)
        figure.supxlabel(machine, fontsize="x-small", color="0.4")
    return Path(path)


def _draw_panel(axes: Axes, results: Mapping[str, ModelCosts], batch: int, unit: str, value: Value) -> None:
    contexts = set()
    for number, (name, costs) in enumerate(results.items()):
        rows = sorted((cost for cost in costs.costs if cost.batch == batch), key=lambda cost: cost.context)
        points = [(cost, shown) for cost in rows if (shown := value(cost)) is not None]
        at = [cost.context for cost, _ in points]
        contexts |= set(at)
        axes.plot(at, [shown for _, shown in points], "o-", color=f"C{number}", markersize=4, label=name)
        if unit == "s":
            medians, slowest = [shown for _, shown in points], [cost.decode.summary.p99 for cost, _ in points]
            axes.fill_between(at, medians, slowest, color=f"C{number}", alpha=0.12, linewidth=0)
    if contexts:
        scale_axes(axes, contexts, "tokens read", "", unit)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.4")


@dataclass(frozen=True)
class Point:
    """One model: what it recalls, and what it costs."""

    name: str
    accuracy: Accuracy
    cost: Cost


def pareto_points(results: Mapping[str, ModelCosts], accuracies: Mapping[str, Sequence[Accuracy]]) -> tuple[Point, ...]:
    """The models with an accuracy, at the smallest batch size, at one context: the longest that all were measured at,
    of those at which all have accuracies if there are such. An accuracy at another length than the context is the one
    at the longest length.

    Raises:
        ValueError: if no model has both, or the models have no context in common.
    """
    both = [name for name in results if results[name].costs and accuracies.get(name)]
    if not both:
        raise ValueError("no model has both costs and an accuracy; the names in the file must be those of the models.")
    batch = min(cost.batch for name in both for cost in results[name].costs)
    common = set.intersection(*({c.context for c in results[name].costs if c.batch == batch} for name in both))
    if not common:
        raise ValueError("the models were measured at no context in common; give one short enough for all.")
    matching = common.intersection(*({found.length for found in accuracies[name]} for name in both))
    context = max(matching or common)
    points = []
    for name in both:
        ordered = sorted(accuracies[name], key=lambda found: (found.length == context, found.length))
        cost = results[name].at(context, batch)
        assert cost is not None
        points.append(Point(name, ordered[-1], cost))
    return tuple(points)


def pareto_front(costs: Sequence[float], accuracies: Sequence[float]) -> list[int]:
    """Indices, cheapest first, of the points that no other beats by being as good in both and better in one."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda each: (costs[each], -accuracies[each])):
        if not front or accuracies[index] > accuracies[front[-1]]:
            front.append(index)
    return front


def plot_pareto(points: Sequence[Point], path: str | os.PathLike[str]) -> Path:
    """Draw accuracy, with its 95 % interval, against bytes of cache and against latency; a line joins the best.

    Args:
        points: from `pareto_points`.
        path: file to write; its ending gives the format (png, svg, pdf). Replaced only when the picture is complete.

    Raises:
        ValueError: if there is no point.
    """
    if not points:
        raise ValueError("there is no model to draw; give at least one with costs and an accuracy.")
    cost = points[0].cost
    lengths = ", ".join(f"{length:,}" for length in sorted({point.accuracy.length for point in points}))
    with picture(path, (10, 4.2)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_front(left, points, [point.cost.cache_bytes for point in points], "cache", "B")
        _draw_front(
            right, points, [point.cost.decode.summary.median for point in points], "median latency per token", "s"
        )
        left.set_ylabel(f"accuracy ({points[0].accuracy.what})")
        left.set_ylim(-0.02, 1.02)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize="small")
        below = f"accuracy at {lengths} tokens; costs after {cost.context:,} tokens, batch {cost.batch}"
        figure.supxlabel(below, fontsize="x-small", color="0.4")
    return Path(path)


def _draw_front(axes: Axes, points: Sequence[Point], costs: Sequence[float], label: str, unit: str) -> None:
    shares = [point.accuracy.share for point in points]
    heights = [share.accuracy or 0.0 for share in shares]
    for number, (point, cost, share, height) in enumerate(zip(points, costs, shares, heights, strict=True)):
        low, high = share.interval or (height, height)
        bars = [[max(0.0, height - low)], [max(0.0, high - height)]]
        axes.errorbar([cost], [height], bars, fmt="o", color=f"C{number}", capsize=3, label=point.name)
    front = pareto_front(costs, heights)
    best = [costs[index] for index in front], [heights[index] for index in front]
    axes.plot(*best, color="0.6", linewidth=1, drawstyle="steps-post", zorder=0, label="best")
    axes.set_xscale("log")
    label_values(axes.xaxis, unit)
    axes.set_xlabel(label)
    axes.grid(alpha=0.2)
