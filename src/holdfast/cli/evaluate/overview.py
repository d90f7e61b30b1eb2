"""The head of the page of `holdfast evaluate all`: one number of each evaluation for each model; RULER's by task."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.cli.bench import format_rate
from holdfast.cli.evaluate.common import NOT_COVERED, show_share
from holdfast.units import format_bytes

if TYPE_CHECKING:
    from holdfast.evaluation.intervals import Share
    from holdfast.evaluation.summary import PartResult, ShownTable

TITLE = "overview (95 % intervals where there are any)"


@dataclass(frozen=True)
class Number:
    """What a part found of a model, ready to be shown.

    Attributes:
        row: what it is called.
        part: the place of its part on the page.
    """

    row: str
    model: str
    text: str
    part: int


@dataclass
class RulerScores:
    """RULER's score (match_all) of samples of one length, by task and model.

    Attributes:
        parts: the place of each task's part on the page.
    """

    by_task: dict[str, dict[str, Share]] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)

    def means(self) -> dict[str, Share]:
        """Over all tasks, by model, of the models that were asked all of them."""
        from holdfast.evaluation.intervals import pooled

        first, *others = self.by_task.values()
        models = [model for model in first if all(model in shares for shares in others)]
        return {model: pooled([shares[model] for shares in self.by_task.values()]) for model in models}


def overview_tables(parts: Sequence[PartResult], folder: Path, models: Sequence[str]) -> list[ShownTable]:
    """A row for each evaluation, a column for each model; and of RULER, where there are several, a row for each task.
    Each row leads to its section of the page.

    Args:
        parts: in the order of the page; those that were not measured have no numbers.
        folder: of their files.
        models: what they are called.

    Returns:
        No table where there is no number.
    """
    numbers: list[Number] = []
    ruler: dict[int, RulerScores] = {}
    for place, part in enumerate(parts):
        for results in _results(part, folder):
            read = _READERS.get(results.get("evaluation", ""))
            if read is not None:
                numbers += read(results, place)
            if results.get("evaluation") == "needle":
                _read_ruler(results, place, ruler)
    for length, scores in ruler.items():
        tasks = list(scores.by_task)
        row = f"RULER at {length:,} tokens, {tasks[0] if len(tasks) == 1 else f'mean of {len(tasks)} tasks'}"
        place = min(scores.parts.values())
        numbers += [Number(row, model, show_share(share), place) for model, share in scores.means().items()]
    numbers.sort(key=lambda number: number.part)
    tables = [replace(_table(TITLE, numbers, models), note=NOT_COVERED)] if numbers else []
    for length, scores in ruler.items():
        if len(scores.by_task) > 1:
            by_task = [
                Number(task, model, show_share(share), scores.parts[task])
                for task, shares in scores.by_task.items()
                for model, share in shares.items()
            ]
            tables.append(_table(f"RULER at {length:,} tokens, by task (match_all)", by_task, models))
    return tables


def _table(title: str, numbers: Sequence[Number], models: Sequence[str]) -> ShownTable:
    """Without the models that have no number."""
    from holdfast.evaluation.summary import ShownTable, section
    from holdfast.pages import Link

    found: dict[str, dict[str, Number]] = {}
    for number in numbers:
        found.setdefault(number.row, {})[number.model] = number
    shown = [model for model in models if any(model in row for row in found.values())]
    rows: list[list[str | Link]] = []
    for name, row in found.items():
        first = next(iter(row.values())).part
        rows.append([Link(name, section(first)), *(row[model].text if model in row else "–" for model in shown)])
    return ShownTable(title, ["", *shown], rows)


def _results(part: PartResult, folder: Path) -> Iterator[Mapping[str, Any]]:
    for name in part.files:
        if name.endswith(".json"):
            yield json.loads((folder / name).read_text(encoding="utf-8"))


def _read_ruler(results: Mapping[str, Any], place: int, found: dict[int, RulerScores]) -> None:
    """Enter what the results of a needle evaluation hold of RULER's tasks."""
    from holdfast.evaluation.intervals import Share

    for model, entry in results["models"].items():
        for cell in entry.get("cells", ()):  # the needle task has none
            scores = found.setdefault(cell["length"], RulerScores())
            scores.by_task.setdefault(cell["task"], {})[model] = Share.from_dict(cell["match_all"])
            scores.parts[cell["task"]] = place


def _needle_task(results: Mapping[str, Any], place: int) -> Iterator[Number]:
    """Beyond the window, as elsewhere; of all answers where none lies there."""
    for model, entry in results["models"].items():
        if "beyond" in entry:
            where = "beyond" if entry["beyond"]["count"] else "total"
            row = "needle task, beyond the window" if where == "beyond" else "needle task"
            yield Number(row, model, _share(entry[where]), place)


def _turns(results: Mapping[str, Any], place: int) -> Iterator[Number]:
    for model, entry in results["models"].items():
        script = entry["script"]
        what = ("text" if script["kind"] == "text" else "needle task") + (", asked aside" if script["asides"] else "")
        yield Number(f"{script['turns']} turns, {what}", model, _share(entry["total"]), place)


def _perplexity(results: Mapping[str, Any], place: int) -> Iterator[Number]:
    for model, entry in results["models"].items():
        text, interval = f"{entry['perplexity']:.3f}", entry.get("perplexity_interval")
        if interval is not None:
            text += f" ({interval[0]:.3f} to {interval[1]:.3f})"
        yield Number(f"perplexity, blocks of {results['settings']['length']:,} tokens", model, text, place)


def _recall(results: Mapping[str, Any], place: int) -> Iterator[Number]:
    for model, tasks in results["models"].items():
        for task, entry in tasks.items():
            yield Number(f"recall, {task}", model, _share(entry["contains"]), place)


def _efficiency(results: Mapping[str, Any], place: int) -> Iterator[Number]:
    """At the longest context, with the fewest rows, where any model was measured."""
    every = [cost for entry in results["models"].values() for cost in entry["costs"]]
    if not every:
        return
    context = max(cost["context"] for cost in every)
    batch = min(cost["batch"] for cost in every if cost["context"] == context)
    where = f"at {context:,} tokens" + (f" in each of {batch:,} rows" if batch > 1 else "")
    shown: dict[str, Callable[[Mapping[str, Any]], str]] = {
        f"cache {where}": lambda cost: format_bytes(cost["cache_bytes"]),
        f"generated tokens/s {where}": lambda cost: format_rate(cost["decode_tokens_per_second"]),
        f"read tokens/s {where}": lambda cost: format_rate(cost["prefill_tokens_per_second"]),
    }
    for model, entry in results["models"].items():
        for cost in entry["costs"]:
            if (cost["context"], cost["batch"]) == (context, batch):
                yield from (Number(row, model, text(cost), place) for row, text in shown.items())


def _share(data: Mapping[str, Any]) -> str:
    from holdfast.evaluation.intervals import Share

    return show_share(Share.from_dict(data))


_READERS: dict[str, Callable[[Mapping[str, Any], int], Iterator[Number]]] = {
    "needle": _needle_task,
    "turns": _turns,
    "perplexity": _perplexity,
    "recall": _recall,
    "efficiency": _efficiency,
}
