"""Ticks: round numbers in the units of the tables, and never so many that their labels collide."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.text import Text

from holdfast.bench.plots import label_values, scale_axes
from holdfast.pictures import new_figure

DRAW = random.Random(4)
CONTEXTS = (
    (1024,),
    (1024, 1025),
    tuple(1024 << power for power in range(9)),
    tuple(DRAW.sample(range(1, 131_073), 40)),
)


def apart(labels: list[Text], renderer: RendererAgg, *, horizontal: bool) -> bool:
    boxes = [label.get_window_extent(renderer) for label in labels if label.get_text()]
    edges = sorted((box.x0, box.x1) if horizontal else (box.y0, box.y1) for box in boxes)
    return bool(edges) and all(end < start for (_, end), (start, _) in pairwise(edges))


@pytest.mark.parametrize("contexts", CONTEXTS, ids=len)
@pytest.mark.parametrize("unit", ["B", "s", ""])
@pytest.mark.parametrize(("size", "panels"), [((15, 4.0), 4), ((10, 4.0), 2), ((7, 4.0), 1)])
@pytest.mark.parametrize("spread", [1.001, 1.5, 3, 9, 1e5])
def test_labels_do_not_collide(
    contexts: tuple[int, ...], unit: str, size: tuple[float, float], panels: int, spread: float
) -> None:
    figure = new_figure(size)
    for axes in figure.subplots(1, panels, squeeze=False)[0]:
        least = 10 ** DRAW.uniform(3, 7)
        axes.plot(contexts, [least * spread ** DRAW.random() for _ in contexts[1:]] + [least])
        scale_axes(axes, contexts, "tokens", "", unit)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for axes in figure.axes:
        assert apart(visible(axes.get_xticklabels(), axes.get_xlim(), 0), renderer, horizontal=True)
        assert apart(visible(axes.get_yticklabels(), axes.get_ylim(), 1), renderer, horizontal=False)


@pytest.mark.parametrize(
    ("unit", "spread"), [("B", 1.01), ("B", 3.5), ("B", 64.0), ("s", 1.8), ("s", 3.5), ("s", 64.0)]
)
def test_labels_below_a_panel_of_costs_do_not_collide(unit: str, spread: float) -> None:
    figure = new_figure((10, 4.2))
    axes = figure.subplots(1, 2)[0]
    least = 2e6 if unit == "B" else 0.0101
    axes.plot([least, least * spread], [0, 1])
    axes.set_xscale("log")
    label_values(axes.xaxis, unit)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    assert apart(visible(axes.get_xticklabels(), axes.get_xlim(), 0), renderer, horizontal=True)


def test_bytes_are_labelled_as_in_tables() -> None:
    axes = new_figure((7, 4)).add_subplot()
    axes.plot([1, 2], [1 << 20, 1 << 30])
    scale_axes(axes, (1, 2), "tokens", "cache", "B")
    ticks = axes.yaxis.get_major_locator().tick_values(1 << 20, 1 << 30)
    shown = dict(zip(ticks, axes.yaxis.get_major_formatter().format_ticks(ticks), strict=True))
    assert shown[1 << 20] == "1 MiB"
    assert all(text.endswith(("B", "KiB", "MiB", "GiB", "TiB")) for text in shown.values())
    assert axes.yaxis.get_major_formatter()(1.5 * (1 << 30), None) == "1.50 GiB"


def visible(labels: list[Text], bounds: tuple[float, float], at: int) -> list[Text]:
    """Labels of ticks that lie inside the axes; matplotlib draws no others."""
    return [label for label in labels if bounds[0] <= label.get_position()[at] <= bounds[1]]
