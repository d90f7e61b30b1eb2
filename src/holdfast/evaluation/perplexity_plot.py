"""The picture of perplexity by position in the context, and of what further models differ in from the first."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from holdfast.evaluation.perplexity_result import PerplexityResult
from holdfast.pictures import SERIES, picture

__all__ = ["plot_perplexity"]

BAND = 0.18  # how opaque intervals are
LINE_LENGTHS = ("--", ":", "-.")  # of the lengths of training, the shortest first
LEGEND_WIDTH = 95  # characters that fit side by side


def plot_perplexity(
    results: Mapping[str, PerplexityResult], path: str | Path, *, trained: Mapping[str, int] | None = None
) -> Path:
    """Draw perplexity by position, one line per result; below it how much greater further ones are than the first.

    A result alone has its 95 % interval over blocks as a band. Those of several would hide every difference, for most
    of their width is how hard the blocks are: then the bands are those of the paired differences, in percent of the
    perplexity of the first, of all results that are of the same tokens.

    Args:
        results: results by the name to print in the legend.
        path: file to write; its ending gives the format (png, svg, pdf). Replaced only when the picture is complete.
        trained: tokens that the models were trained on at a time, by name; marked where positions reach so far.

    Returns:
        The path written.

    Raises:
        ValueError: `results` is empty.
    """
    if not results:
        raise ValueError("results is empty; give at least one result to plot.")
    first, *others = results
    compared = [name for name in others if results[name].difference(results[first]) is not None]
    looks = dict(zip(results, cycle(SERIES), strict=False))
    with picture(path, (7, 6.5 if compared else 4.2)) as figure:
        panels = figure.subplots(2 if compared else 1, sharex=True, squeeze=False)[:, 0]
        for name, result in results.items():
            _draw_perplexities(panels[0], result, name, looks[name], band=not compared)
        for name in compared:
            _draw_differences(panels[1], results[name], results[first], looks[name])
        if compared:
            panels[1].axhline(0, color=looks[first][0], linewidth=1.5, zorder=1)
            panels[1].set_ylabel(f"perplexity beyond that of\n{first} (%)")
        reached = max(part.stop for result in results.values() for part in result.bins)
        lengths = sorted({length for length in (trained or {}).values() if length <= reached})
        for axes in panels:
            for length, style in zip(lengths, cycle(LINE_LENGTHS), strict=False):
                axes.axvline(length, color="0.4", linestyle=style, linewidth=1, label=f"trained on {length:,}")
            axes.grid(axis="y", color="0.9", linewidth=0.6)
            axes.set_axisbelow(True)
        panels[0].set_ylabel("perplexity of a token")
        panels[-1].set_xscale("log", base=2)
        panels[-1].xaxis.set_major_formatter(ScalarFormatter())
        panels[-1].set_xlabel("position in the context (tokens)")
        _add_legend(figure, panels[0])
    return Path(path)


def _draw_perplexities(axes: Axes, result: PerplexityResult, name: str, look: tuple[str, str], *, band: bool) -> None:
    read = [(part, found) for part in result.bins if (found := part.perplexity) is not None]
    middle = [(part.start + part.stop) / 2 for part, _ in read]
    colour, marker = look
    axes.plot(middle, [found for _, found in read], color=colour, marker=marker, markersize=5, label=name)
    if band:
        _draw_band(axes, middle, [part.perplexity_interval or (found, found) for part, found in read], colour)


def _draw_differences(axes: Axes, result: PerplexityResult, first: PerplexityResult, look: tuple[str, str]) -> None:
    parts = [(part, result.difference(first, index)) for index, part in enumerate(result.bins)]
    found = [(part, difference) for part, difference in parts if difference is not None]
    middle = [(part.start + part.stop) / 2 for part, _ in found]
    colour, marker = look
    axes.plot(middle, [_percent(each.value) for _, each in found], color=colour, marker=marker, markersize=5)
    ends = [each.interval or (each.value, each.value) for _, each in found]
    _draw_band(axes, middle, [(_percent(low), _percent(high)) for low, high in ends], colour)


def _draw_band(axes: Axes, at: Sequence[float], ends: Sequence[tuple[float, float]], colour: str) -> None:
    low, high = zip(*ends, strict=True)
    if len(at) == 1:  # a band of no width
        axes.vlines(at, low, high, color=colour, linewidth=1.5)
    axes.fill_between(at, low, high, color=colour, alpha=BAND, linewidth=0)


def _percent(difference: float) -> float:
    """By how much a perplexity is greater than another, from the difference of mean negative log-likelihoods."""
    return 100 * math.expm1(difference)


def _add_legend(figure: Figure, axes: Axes) -> None:
    """Below the panels, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), LEGEND_WIDTH // (max(map(len, labels)) + 7)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small", frameon=False)
