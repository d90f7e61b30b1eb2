"""One page about everything that was measured of some models."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from holdfast.evaluation.intervals import Share
from holdfast.pages import (
    Link,
    details_element,
    heading,
    note,
    paragraph,
    picture_element,
    table_element,
    write_page,
)

__all__ = ["PartResult", "ShownTable", "section", "write_summary"]


@dataclass(frozen=True)
class ShownTable:
    """A table as it was shown, as plain text, or with links to sections of the page; the note stands below it."""

    title: str
    headings: list[str]
    rows: Sequence[Sequence[str | Link]]
    note: str = ""

    @classmethod
    def of(cls, table: Table) -> ShownTable:
        """The texts of a table of rich's."""
        columns = [[_plain(cell) for cell in column.cells] for column in table.columns]
        rows = [list(row) for row in zip(*columns, strict=True)]
        headings = [_plain(column.header) for column in table.columns]
        return cls(_plain(table.title or ""), headings, rows, _plain(table.caption or ""))

    def elements(self) -> list[str]:
        """For a page."""
        table = table_element(self.headings, self.rows, self.title)
        return [table, note(self.note)] if self.note else [table]


@dataclass(frozen=True)
class PartResult:
    """What one evaluation found.

    Attributes:
        title: what was evaluated.
        tables: as it showed them.
        pictures: names of PNG files in the directory of the results.
        settings: what it was called with.
        machine: `describe_machine()` of then.
        seconds: that it took.
        skipped: why it was not done; None where it was.
        files: SHA-256 of what it wrote into the directory of the results, by name.
    """

    title: str
    tables: tuple[ShownTable, ...] = ()
    pictures: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    machine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    skipped: str | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PartResult:
        """Inverse of `to_dict`."""
        tables = tuple(ShownTable(**table) for table in data["tables"])
        return cls(**{**data, "tables": tables, "pictures": tuple(data["pictures"])})


def write_summary(
    parts: Sequence[PartResult],
    path: str | os.PathLike[str],
    *,
    title: str,
    machine: Mapping[str, Any],
    overview: Sequence[ShownTable] = (),
) -> Path:
    """Write one HTML page that needs neither network nor server.

    It shows the overview, tables and pictures of all parts, the numbers of heat maps as tables, what was not done and
    why, and what belongs to the numbers: settings, seeds, machine, versions and commit.

    Args:
        parts: in the order of the page.
        path: file to write, replaced only when the page is complete; the files of the parts lie beside it.
        title: heading of the page.
        machine: `describe_machine()`, of now.
        overview: tables before all others, with links to the `section` of each part.

    Returns:
        The path written.

    Raises:
        ValueError: if there is no part.
        OSError: if a picture, or the file with its numbers, cannot be read.
    """
    if not parts:
        raise ValueError("there is nothing to report on; give at least one part.")
    done = [part for part in parts if part.skipped is None]
    elements = [element for table in overview for element in table.elements()]
    elements.append(_what_was_done(parts))
    for place, part in enumerate(parts):
        if part.skipped is not None:
            continue
        elements.append(heading(part.title, section(place)))
        elements += [element for table in part.tables for element in table.elements()]
        numbers = _numbers(Path(path).parent, part)
        description = f"{part.title}: heat map; the table that follows has its numbers" if numbers else part.title
        elements += [picture_element(Path(path).parent / name, description) for name in part.pictures]
        if numbers:
            elements.append(details_element("The numbers of the heat map", numbers))
        elements.append(note("Settings: " + _listed(part.settings)))
    elements += [heading("Where this was measured"), _machines(done, machine)]
    return write_page(path, title, elements)


def section(place: int) -> str:
    """The anchor of the part at a place among all parts, from 0."""
    return f"part-{place + 1}"


def _numbers(folder: Path, part: PartResult) -> list[str]:
    """Tables of accuracy by depth and length, from the results in JSON of an evaluation that draws it as a heat map."""
    tables = []
    for name in part.files:
        if not name.endswith(".json"):
            continue
        results = json.loads((folder / name).read_text(encoding="utf-8"))
        if results.get("evaluation") == "needle":
            for model, result in results["models"].items():
                tables += _depth_tables(model, result.get("cells", []))  # the needle task has none
    return tables


def _depth_tables(model: str, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table for each task: a row for each depth, a column for each length."""
    tables = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        found = [cell for cell in cells if cell["task"] == task]
        columns = [[_shown(Share.from_dict(share)) for share in cell["by_depth"]] for cell in found]
        depths = [f"{share['depth']:g} %" for share in found[0]["by_depth"]]
        rows = [list(row) for row in zip(depths, *columns, strict=True)]
        caption = f"{model}, {task}: needles found by depth (95 % interval; right ones of all)"
        tables.append(table_element(["depth", *(f"{cell['length']:,} tokens" for cell in found)], rows, caption))
    return tables


def _shown(share: Share) -> str:
    if share.interval is None:
        return "–"
    low, high = share.interval
    return f"{share.accuracy:.1%} ({low:.1%} to {high:.1%}; {share.correct:g} of {share.count})"


def _what_was_done(parts: Sequence[PartResult]) -> str:
    """One row per part."""
    rows: list[list[str | Link]] = []
    for place, part in enumerate(parts):
        if part.skipped is None:
            seed = part.settings.get("seed")
            commit = (part.machine.get("commit") or "unknown")[:10]
            title = Link(part.title, section(place))
            rows.append([title, f"{part.seconds:,.1f} s", "–" if seed is None else str(seed), commit])
        else:
            rows.append([part.title, f"not measured: {part.skipped}", "–", "–"])
    return table_element(["evaluation", "measured in", "seed", "commit"], rows)


def _machines(parts: Sequence[PartResult], now: Mapping[str, Any]) -> str:
    """The machine, versions and commit; where the parts were measured on several, one column for each."""
    machines = [dict(part.machine) for part in parts] or [dict(now)]
    different = [machine for index, machine in enumerate(machines) if machine not in machines[:index]]
    flat = [_flat(machine) for machine in different]
    names = list(dict.fromkeys(name for machine in flat for name in machine))
    rows = [[name, *(machine.get(name, "–") for machine in flat)] for name in names]
    table = table_element(["", *(["value"] if len(flat) == 1 else [str(n + 1) for n in range(len(flat))])], rows)
    if len(flat) == 1:
        return table
    return paragraph("Parts of this page were measured at different times, by these programs and machines.") + table


def _flat(machine: Mapping[str, Any]) -> dict[str, str]:
    """Names and texts, the packages one by one."""
    rows: dict[str, str] = {}
    for name, value in machine.items():
        entries = {name: value} if not isinstance(value, Mapping) else value
        rows |= {key: "none" if entry is None else str(entry) for key, entry in entries.items()}
    return rows


def _listed(settings: Mapping[str, Any]) -> str:
    values = {name: value if isinstance(value, list | tuple) else [value] for name, value in settings.items()}
    return ", ".join(f"{name} {' '.join(map(str, value))}" for name, value in values.items()) + "."


def _plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)
