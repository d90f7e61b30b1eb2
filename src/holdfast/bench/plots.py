"""Pictures of the results of `holdfast bench`, from its JSON alone."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from holdfast.bench.results import Case, Report, Result
from holdfast.pictures import picture
from holdfast.units import format_bytes

__all__ = ["label_values", "machine_line", "plot_report", "scale_axes"]

Value = Callable[[Result], float | None]


def plot_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Draw a report: time and memory by tokens, or tokens per second.

    Args:
        report: of any benchmark.
        path: file to write; its ending gives the format (png, svg, pdf). Replaced only when the picture is complete.

    Raises:
        ValueError: if the report has nothing to draw, or the format is unknown.
    """
    draw, size = {
        "ops": (_draw_ops, (10.0, 4.0)),
        "prefill": (_draw_prefill, (7.0, 4.0)),
        "decode": (_draw_decode, (10.0, 4.0)),
        "train": (_draw_train, (7.0, 2.4)),
    }[report.benchmark]
    with picture(path, size) as figure:
        draw(report, figure)
        figure.supxlabel(machine_line(report.machine, report.ceilings.dtype), fontsize="x-small", color="0.4")
    return Path(path)


def _draw_ops(report: Report, figure: Figure) -> None:
    both = [case for case in report.cases if "backward" in case.parameters.get("pass", "")]
    kinds = {kind: [case for case in both if case.kind == kind] for kind in ("attention", "native sparse attention")}
    kind, cases = next(((kind, cases) for kind, cases in kinds.items() if cases), ("", []))
    if not cases:
        raise ValueError("only attention can be drawn, and there is none in these results; measure it too.")
    measured = [case for case in cases if case.results[0].peak_bytes is not None]
    panels = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    _lines(panels[0], cases, "tokens", _seconds, f"{kind}, forward and backward", "s")
    if measured:
        _lines(panels[1], measured, "tokens", lambda result: result.peak_bytes, "peak memory", "B")
    panels[0].legend(fontsize="small")


def _draw_prefill(report: Report, figure: Figure) -> None:
    axes = figure.add_subplot()
    _lines(axes, report.cases, "tokens", _seconds, "prefill", "s")
    axes.legend(fontsize="small")


def _draw_decode(report: Report, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    _lines(left, report.cases, "context", _seconds, "time per token", "s")
    contexts = [case.parameters["context"] for case in report.cases]
    for line, name in zip(left.get_lines(), _names(report.cases), strict=True):
        found = [_find(case, name) for case in report.cases]
        bounds = [(_seconds(result), result.timing.summary.p99) for result in found if result]
        low, high = zip(*bounds, strict=True)
        left.fill_between(contexts, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    left.set_title("median, and up to the 99th percentile", fontsize="small", loc="left")
    left.legend(fontsize="small")
    _lines(right, report.cases, "context", lambda result: result.cache_bytes, "cache", "B")


def _draw_train(report: Report, figure: Figure) -> None:
    axes = figure.add_subplot()
    (case,) = report.cases
    results = list(reversed(case.results))
    rates = [result.tokens_per_second or 0 for result in results]
    bars = axes.barh([result.name for result in results], rates, color=["0.75"] * (len(results) - 1) + ["C0"])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize="small")
    axes.margins(x=0.12)
    axes.set_xlabel(f"tokens/s in training ({case.parameters['batch']} × {case.parameters['tokens']:,} tokens)")


def _lines(axes: Axes, cases: Sequence[Case], parameter: str, value: Value, label: str, unit: str) -> None:
    """One line per variant on logarithmic axes."""
    for name in _names(cases):
        found = [(case.parameters[parameter], _find(case, name)) for case in cases]
        points = [(at, value(result)) for at, result in found if result is not None]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    scale_axes(axes, {case.parameters[parameter] for case in cases}, parameter, label, unit)


def scale_axes(axes: Axes, at: Iterable[int], parameter: str, label: str, unit: str) -> None:
    """Logarithmic axes with ticks at the token counts `at`, as many as have room, and at round numbers of `unit`."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    labels = _with_room({tick: f"{tick // 1024}k" if tick % 1024 == 0 else f"{tick:,}" for tick in sorted(set(at))})
    axes.set_xticks(list(labels), list(labels.values()), fontsize="small")
    axes.minorticks_off()
    label_values(axes.yaxis, unit)
    axes.set_xlabel(parameter)
    axes.set_ylabel(label)
    axes.grid(alpha=0.2)


def _with_room(labels: Mapping[int, str]) -> dict[int, str]:
    """Of labels at rising ticks the last, and from there down those that do not touch it or one another, where a letter
    takes a 32nd of the logarithmic axis: a quarter of a picture of 15 inches."""
    ticks = list(labels)
    kept = [ticks[-1]]
    for tick in reversed(ticks[:-1]):
        share = math.log(kept[-1] / tick) / math.log(ticks[-1] / ticks[0])
        if share > max(len(labels[tick]), len(labels[kept[-1]])) / 32 - 1e-9:
            kept.append(tick)
    return {tick: labels[tick] for tick in reversed(kept)}


def label_values(axis: Axis, unit: str) -> None:
    """Ticks of a logarithmic axis, whose data are drawn, at round numbers: of bytes (`unit` "B") as in tables, else
    decimal."""
    low, high = axis.get_view_interval()
    is_bytes = unit == "B"
    if high < 4 * low:  # too few powers; matplotlib's own ticks would crowd at the upper end
        step = 1024 ** int(math.log(low, 1024)) if is_bytes else 1
        ticks = [step * tick for tick in MaxNLocator(5).tick_values(low / step, high / step)]
        axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    else:
        axis.set_major_locator(LogLocator(base=2) if is_bytes else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(_bytes) if is_bytes else EngFormatter(unit))
    axis.set_minor_formatter(NullFormatter())


def _bytes(size: float, _: int | None = None) -> str:
    """As `format_bytes` without zeros that say nothing: 2 MiB, 1.50 GiB."""
    return re.sub(r"\.0+ ", " ", format_bytes(round(size)))


def _names(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(result.name for case in cases for result in case.results))


def _find(case: Case, name: str) -> Result | None:
    return next((result for result in case.results if result.name == name), None)


def _seconds(result: Result) -> float:
    return result.timing.summary.median


def machine_line(machine: Mapping[str, Any], dtype: str) -> str:
    """The machine of `describe_machine` in a line below a picture."""
    if machine["accelerator"]:
        return f"{machine['accelerator']}, {dtype}"
    return f"{machine['processor']}, threads: {machine['threads']}, {dtype}"
