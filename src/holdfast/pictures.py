"""Pictures that are written whole or not at all, or put into a page, without a display."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from holdfast.files import replacing

SERIES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#000000", "v"),
    ("#e69f00", "P"),
    ("#56b4e9", "X"),
)
"""Colours and markers of lines, told apart by people with any colour vision (Okabe and Ito)."""


@contextmanager
def picture(path: str | os.PathLike[str], size: tuple[float, float]) -> Iterator[Figure]:
    """Yield an empty figure of `size` inches; it is written to `path` when the block ends without an error.

    The ending of `path` gives the format (png, svg, pdf). What was there is replaced only by the complete picture.

    Raises:
        ValueError: if the format is unknown.
    """
    figure = new_figure(size)
    yield figure
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160)


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of `size` inches."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def data_uri(picture: Figure | Path) -> str:
    """A figure, or a picture in a PNG file, as a PNG inside a `data:` address, for a page that needs no other file."""
    if isinstance(picture, Figure):
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png", dpi=120)
        content = buffer.getvalue()
    else:
        content = picture.read_bytes()
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
