"""One progress bar for everything that takes a while."""

import datetime
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["track"]

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 30.0


def track(items: Iterable[T], description: str, *, total: int | None = None, progress: bool = True) -> Iterator[T]:
    """Yield `items` with a bar on standard error; where that is no terminal, with a line now and then.

    Both say how much time is left, where `total` is known.

    Args:
        items: what is worked on.
        description: in front of the bar.
        total: how many items; None: their `len`, if they have one.
        progress: False shows nothing.
    """
    console = Console(stderr=True, markup=False, emoji=False)  # descriptions hold names of files
    if not progress:
        yield from items
    elif console.is_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(show_speed=True))
        with Progress(
            *columns, TimeRemainingColumn(elapsed_when_finished=True), console=console, transient=True
        ) as bar:
            yield from bar.track(items, total, description=description)
    else:
        yield from _with_lines(items, description, total, console)


def _with_lines(items: Iterable[T], description: str, total: int | None, console: Console) -> Iterator[T]:
    if total is None and isinstance(items, Sized):
        total = len(items)
    begun = shown = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - shown > SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            of = "" if total is None else f" of {total:,}{_time_left(shown - begun, done, total)}"
            console.print(f"{description}: {done:,}{of}", highlight=False, soft_wrap=True)
        yield item


def _time_left(seconds: float, done: int, total: int) -> str:
    """In proportion to what has been done in so many seconds; empty where that is nothing."""
    if not done:
        return ""
    return f", about {datetime.timedelta(seconds=round(seconds / done * (total - done)))} left"
