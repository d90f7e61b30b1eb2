"""One progress bar for everything that takes a while."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

__all__ = ["track"]

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, total: int | None = None, progress: bool = True) -> Iterator[T]:
    """Yield `items` with a bar on standard error; silent when that is no terminal, or without `progress`."""
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    yield from rich_track(items, description, total=total, console=console, transient=True, disable=hidden)
