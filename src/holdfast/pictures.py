"""Pictures that are written whole or not at all, without a display."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from holdfast.files import replacing


@contextmanager
def picture(path: str | os.PathLike[str], size: tuple[float, float]) -> Iterator[Figure]:
    """Yield an empty figure of `size` inches; it is written to `path` when the block ends without an error.

    The ending of `path` gives the format (png, svg, pdf). What was there is replaced only by the complete picture.

    Raises:
        ValueError: if the format is unknown.
    """
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160)
