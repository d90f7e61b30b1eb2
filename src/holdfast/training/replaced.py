"""What a run replaces in its directory lies aside until the first step is taken: what fails before then gives it back.

The directory `.replaced` holds it, with a list of what there was. Whoever is killed in between leaves it there, and the
next run in that directory gives it back first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from holdfast.files import write_json

ASIDE = ".replaced"
_LIST = "list.json"


def set_aside(directory: Path, *, moved: Iterable[Path], copied: Iterable[Path], doomed: Iterable[Path]) -> None:
    """Begin to replace things in a directory.

    Args:
        directory: of the run; nothing lies aside there.
        moved: files and directories in it that go aside.
        copied: files in it that go aside and stay, too.
        doomed: files below it that stay where they are until `discard` removes them.
    """
    aside = directory / ASIDE
    aside.mkdir()
    there = sorted(path.name for path in directory.iterdir())
    write_json(aside / _LIST, {"there": there, "doomed": [str(path.relative_to(directory)) for path in doomed]})
    for path in copied:
        shutil.copy2(path, aside / path.name)
    for path in moved:
        path.rename(aside / path.name)


def give_back(directory: Path, is_own: Callable[[str], bool]) -> None:
    """Put back what lies aside, and remove what has been written since; nothing aside: do nothing.

    May be called again where it was interrupted.

    Args:
        directory: of the run.
        is_own: whether a file or directory of this name is a run's, and may be removed.
    """
    aside = directory / ASIDE
    if (aside / _LIST).exists():
        there = json.loads((aside / _LIST).read_text(encoding="utf-8"))["there"]
        for path in directory.iterdir():
            if is_own(path.name) and path.name not in there:
                _remove(path)
        for path in aside.iterdir():
            if path.name != _LIST:
                _remove(directory / path.name)
                os.replace(path, directory / path.name)
    if aside.exists():
        shutil.rmtree(aside, ignore_errors=True)


def discard(directory: Path) -> None:
    """Remove what lies aside for good, if there is anything."""
    aside = directory / ASIDE
    if (aside / _LIST).exists():
        for name in json.loads((aside / _LIST).read_text(encoding="utf-8"))["doomed"]:
            (directory / name).unlink(missing_ok=True)
        (aside / _LIST).unlink()  # from now on there is nothing to give back
    if aside.exists():
        shutil.rmtree(aside, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
