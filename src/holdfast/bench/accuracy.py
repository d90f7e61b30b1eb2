"""Accuracies of models, read from files of results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.evaluation.intervals import Share, pooled
from holdfast.files import UnreadableError

__all__ = ["Accuracy", "read_accuracies"]


@dataclass(frozen=True)
class Accuracy:
    """Right answers in contexts of `length` tokens; `what` says to which questions."""

    length: int
    share: Share
    what: str


def read_accuracies(path: Path) -> dict[str, list[Accuracy]]:
    """Accuracies by the name of the model's directory.

    Of the needle task it is that beyond the window, of RULER's tasks that of all tasks at each length. Models are
    named by the last part of what the file calls them, where that tells them apart.

    Args:
        path: what `holdfast evaluate needle --json` or `holdfast demo` (results.json) wrote.

    Raises:
        UnreadableError: if the file holds something else.
        OSError: if it cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        models = data.get("models", data)
        found = {name: _accuracies(entry) for name, entry in models.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = f"{path} holds no accuracies; give what `holdfast evaluate needle --json` or `holdfast demo` wrote."
        raise UnreadableError(message) from error
    last = [Path(name).name for name in found]
    by_last = dict(zip(last, found.values(), strict=True)) if len(set(last)) == len(last) else found
    return {name: accuracies for name, accuracies in by_last.items() if accuracies}


def _accuracies(entry: Mapping[str, Any]) -> list[Accuracy]:
    if "cells" in entry:
        by_length: dict[int, list[Share]] = {}
        for cell in entry["cells"]:
            by_length.setdefault(cell["length"], []).append(Share.from_dict(cell["match_all"]))
        return [Accuracy(length, pooled(shares), "RULER's needles") for length, shares in by_length.items()]
    needle = entry.get("needle", entry)
    share = Share.from_dict(needle["beyond"])
    return [Accuracy(needle["task"]["length"], share, "beyond the window")] if share.count else []
