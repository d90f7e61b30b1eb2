"""The overview of `holdfast evaluate all`: what stands in it, of whom, and where it leads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli.evaluate.overview import overview_tables
from holdfast.evaluation.intervals import Share
from holdfast.evaluation.summary import PartResult
from holdfast.pages import Link


class Folder:
    """Parts whose results lie in a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: list[PartResult] = []

    def add(self, evaluation: str, models: Mapping[str, Any], **settings: Any) -> None:
        name = f"{len(self.parts)}.json"
        results = {"evaluation": evaluation, "settings": settings, "models": models}
        (self.path / name).write_text(json.dumps(results))
        self.parts.append(PartResult(name, files={name: "", "picture.png": ""}))

    def tables(self, *models: str) -> dict[str, list[list[str]]]:
        return {
            table.title: [list(table.headings), *([str(cell) for cell in row] for row in table.rows)]
            for table in overview_tables(self.parts, self.path, models)
        }


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def shown(right: int, count: int) -> str:
    low, high = Share(count, right).interval or (0, 0)
    return f"{right / count:.1%} ({low:.1%} to {high:.1%})"


def cells(task: str, length: int, right: int, count: int = 40) -> dict[str, Any]:
    return {"cells": [{"task": task, "length": length, "match_all": Share(count, right).to_dict()}]}


def test_ruler_has_a_mean_and_a_table_by_task(folder: Folder) -> None:
    folder.add("needle", {"a": cells("single", 500, 40), "b": cells("single", 500, 10)})
    folder.add("needle", {"a": cells("multi", 500, 20), "b": cells("multi", 500, 0)})
    tables = folder.tables("b", "a", "c")
    (title, by_task) = list(tables.items())[1]
    assert title == "RULER at 500 tokens, by task (match_all)"
    assert by_task == [
        ["", "b", "a"],
        ["single", shown(10, 40), shown(40, 40)],
        ["multi", shown(0, 40), shown(20, 40)],
    ]
    overview = next(iter(tables.values()))
    assert overview == [["", "b", "a"], ["RULER at 500 tokens, mean of 2 tasks", shown(10, 80), shown(60, 80)]]


def test_a_mean_is_over_tasks_that_all_were_asked(folder: Folder) -> None:
    folder.add("needle", {"a": cells("single", 500, 40), "b": cells("single", 500, 10)})
    folder.add("needle", {"a": cells("multi", 500, 20)})
    (overview, by_task) = folder.tables("a", "b").values()
    assert overview == [["", "a"], ["RULER at 500 tokens, mean of 2 tasks", shown(60, 80)]]
    assert by_task[2] == ["multi", shown(20, 40), "–"]


def test_one_task_needs_no_table_of_tasks(folder: Folder) -> None:
    folder.add("needle", {"a": cells("single", 500, 40)})
    (table,) = folder.tables("a").values()
    assert table[1][0] == "RULER at 500 tokens, single"


def test_each_number_leads_to_its_section(folder: Folder) -> None:
    folder.parts.append(PartResult("left out", skipped="for a reason"))
    interval = {"perplexity_interval": [3.25, 3.75]}
    folder.add("perplexity", {"a": {"perplexity": 2.5}, "b": {"perplexity": 3.5, **interval}}, length=2048)
    folder.add("perplexity", {"c": {"perplexity": 9}}, length=512)
    (table,) = overview_tables(folder.parts, folder.path, ["a", "b", "c"])
    assert [list(row) for row in table.rows] == [
        [
            Link("perplexity, blocks of 2,048 tokens", "part-2"),
            "2.500",
            "3.500 (3.250 to 3.750)",
            "–",
        ],
        [Link("perplexity, blocks of 512 tokens", "part-3"), "–", "–", "9.000"],
    ]


def test_costs_are_those_at_the_longest_context_of_the_fewest_rows(folder: Folder) -> None:
    def cost(context: int, batch: int, rate: float) -> dict[str, Any]:
        rates = {"decode_tokens_per_second": rate, "prefill_tokens_per_second": 10 * rate}
        return {"context": context, "batch": batch, "cache_bytes": context * 1024, **rates}

    folder.add("efficiency", {"a": {"costs": [cost(8, 1, 1), cost(64, 2, 3), cost(64, 4, 5)]}, "b": {"costs": []}})
    (table,) = folder.tables("a", "b").values()
    assert table == [
        ["", "a"],
        ["cache at 64 tokens in each of 2 rows", "64.0 KiB"],
        ["generated tokens/s at 64 tokens in each of 2 rows", "3.00"],
        ["read tokens/s at 64 tokens in each of 2 rows", "30.0"],
    ]
    empty = Folder(folder.path)
    empty.add("efficiency", {"a": {"costs": []}})
    assert empty.tables("a") == {}


def test_recall_and_a_needle_task_that_asks_nothing_beyond_the_window(folder: Folder) -> None:
    nothing, some = Share(0, 0).to_dict(), Share(30, 10).to_dict()
    folder.add("recall", {"a": {"squad": {"contains": some}}})
    folder.add("needle", {"a": {"beyond": nothing, "total": some}, "b": {"beyond": some, "total": nothing}})
    folder.add("a later evaluation", {"a": {}})
    (table,) = folder.tables("a", "b").values()
    assert table[1:] == [
        ["recall, squad", shown(10, 30), "–"],
        ["needle task", shown(10, 30), "–"],
        ["needle task, beyond the window", "–", shown(10, 30)],
    ]
