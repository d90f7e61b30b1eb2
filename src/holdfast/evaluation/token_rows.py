"""Pictures of which tokens each head of a model holds or reads: tokens along x, one row per layer and head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from holdfast.data.needle import NeedleTask
from holdfast.pictures import picture

__all__ = ["COLOURS", "Span", "TokenRow", "needle_kinds", "plot_token_rows"]

COLOURS = {"noise": "#8c8c8c", "key": "#0072b2", "value": "#d55e00", "question": "#009e73"}
"""Colours of the kinds of tokens, told apart by people with any colour vision (Okabe and Ito)."""
ABSENT = "#f0f0f0"
TINT = 0.55  # how far pale colours go towards white


@dataclass(frozen=True)
class TokenRow:
    """One row of a picture.

    Attributes:
        name: left of it. note: right of it.
        full: [T] bool, tokens in their colours. pale: [T] bool, of the others those in paler colours.
    """

    name: str
    note: str
    full: Tensor
    pale: Tensor


class Span(NamedTuple):
    """A frame around the tokens `first` to `last`, and its name above."""

    first: int
    last: int
    name: str

    @classmethod
    def of(cls, tokens: Tensor, name: str) -> Self:
        """Around the tokens that are True in `tokens` [T]."""
        index = tokens.nonzero().flatten()
        return cls(int(index[0]), int(index[-1]), name)


def needle_kinds(task: NeedleTask, token_ids: Sequence[int]) -> list[str]:
    """The kind of each token of a needle sample: noise (the begin marker included), key, value or question.

    A question is the query marker and everything after it.
    """
    kinds: list[str] = []
    for token in token_ids:
        if "question" in kinds[-1:] or token == task.query_token_id:
            kinds.append("question")
        elif token < task.first_key_id:
            kinds.append("noise")
        else:
            kinds.append("key" if token < task.first_value_id else "value")
    return kinds


def plot_token_rows(
    rows: Sequence[TokenRow],
    kinds: Sequence[str],
    spans: Sequence[Span],
    path: str | os.PathLike[str],
    *,
    pale: str,
    absent: str,
    title: str | None = None,
) -> Path:
    """Draw all tokens, coloured by kind, and below them each row, blank where it has none.

    Args:
        rows: at least one, of T tokens each.
        kinds: the kind of every token, keys of `COLOURS`.
        spans: frames over the whole height.
        path: file to write; its ending gives the format (png, svg, pdf). Replaced only when the picture is complete.
        pale, absent: what the legend calls pale and blank cells.
        title: above the picture.

    Returns:
        The path written.

    Raises:
        ValueError: if the kinds are not one per token, or one has no colour.
    """
    length = len(rows[0].full)
    if len(kinds) != length:
        raise ValueError(f"there are {len(kinds)} kinds for {length} tokens; give one each.")
    if unknown := sorted(set(kinds) - set(COLOURS)):
        raise ValueError(f"no colour for {', '.join(unknown)}; kinds are {', '.join(COLOURS)}.")
    with picture(path, (10, 1.9 + 0.3 * (len(rows) + 1))) as figure:
        axes = figure.add_subplot()
        _draw_cells(axes, rows, kinds)
        _label_rows(axes, rows)
        for span in spans:
            _frame(axes, span, len(rows) + 1)
        _draw_legend(figure, [kind for kind in COLOURS if kind in kinds], pale, absent)
        if title:
            axes.set_title(title, loc="left", pad=24)
    return Path(path)


def _draw_cells(axes: Axes, rows: Sequence[TokenRow], kinds: Sequence[str]) -> None:
    colours = np.array([to_rgb(COLOURS[kind]) for kind in kinds])
    tinted = np.array([_tinted(COLOURS[kind]) for kind in kinds])
    image = [colours]
    for row in rows:
        cells = np.where(row.pale.numpy()[:, None], tinted, np.array(to_rgb(ABSENT)))
        image.append(np.where(row.full.numpy()[:, None], colours, cells))
    axes.imshow(np.stack(image), aspect="auto", interpolation="nearest")
    count, length = len(image), len(kinds)
    axes.hlines(np.arange(1, count) - 0.5, -0.5, length - 0.5, color="white", linewidth=2)
    axes.hlines(0.5, -0.5, length - 0.5, color="white", linewidth=7)
    if length <= 256:
        axes.vlines(np.arange(1, length) - 0.5, -0.5, count - 0.5, color="white", linewidth=0.8)


def _label_rows(axes: Axes, rows: Sequence[TokenRow]) -> None:
    axes.set_yticks(range(len(rows) + 1), ["all tokens", *(row.name for row in rows)])
    axes.tick_params(axis="y", length=0)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(rows) + 1), ["", *(row.note for row in rows)])
    right.tick_params(axis="y", length=0)
    right.spines[:].set_visible(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("position of the token")


def _frame(axes: Axes, span: Span, rows: int) -> None:
    first, last = span.first - 0.5, span.last + 0.5
    axes.add_patch(Rectangle((first, -0.5), last - first, rows, fill=False, clip_on=False, zorder=5))
    alignment, at = ("left", first) if span.first == 0 else ("right", last)
    axes.annotate(
        span.name, (at, -0.5), (0, 4), textcoords="offset points", ha=alignment, va="bottom", annotation_clip=False
    )


def _draw_legend(figure: Figure, kinds: Sequence[str], pale: str, absent: str) -> None:
    entries: dict[str, Any] = {kind: Patch(color=COLOURS[kind]) for kind in kinds}
    entries[pale] = tuple(Patch(color=_tinted(COLOURS[kind])) for kind in kinds)
    entries[absent] = Patch(facecolor=ABSENT, edgecolor="0.75")
    figure.legend(
        list(entries.values()),
        list(entries),
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="outside lower center",
        ncols=len(entries),
        frameon=False,
    )


def _tinted(colour: str) -> tuple[float, float, float]:
    red, green, blue = (part + (1 - part) * TINT for part in to_rgb(colour))
    return red, green, blue
