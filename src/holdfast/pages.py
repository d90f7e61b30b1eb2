"""Pages that open in any browser without network or server: text, tables, and pictures inside. All text is escaped."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from matplotlib.figure import Figure

from holdfast.files import write_text
from holdfast.pictures import data_uri

__all__ = [
    "Link",
    "details_element",
    "fill_template",
    "heading",
    "note",
    "paragraph",
    "picture_element",
    "table_element",
    "write_page",
]


@dataclass(frozen=True)
class Link:
    """Text of a table's cell that leads to the heading with this anchor."""

    text: str
    anchor: str

    def __str__(self) -> str:
        return self.text


def write_page(path: str | os.PathLike[str], title: str, parts: Sequence[str]) -> Path:
    """Write a page of elements, as the functions below make them, under a heading.

    Args:
        path: file to write, replaced only when the page is complete.
        title: plain text.
        parts: elements, first to last; they stand in the page as they are.

    Returns:
        The path written.
    """
    values = {"title": html.escape(title), "body": "\n".join(parts)}
    return write_text(path, fill_template("holdfast", "page.html", values))


def fill_template(package: str, name: str, values: dict[str, str]) -> str:
    """The file `name` of `package` with each `{{key}}` replaced. What stands in a value is never replaced in turn."""
    template = resources.files(package).joinpath(name).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def heading(text: str, anchor: str | None = None) -> str:
    """A heading below that of the page; links lead to its anchor."""
    mark = "" if anchor is None else f' id="{html.escape(anchor)}"'
    return f"<h2{mark}>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{html.escape(text)}</p>"


def note(text: str) -> str:
    """A paragraph of small print."""
    return f'<p class="note">{html.escape(text)}</p>'


def table_element(headings: Sequence[str], rows: Sequence[Sequence[str | Link]], caption: str = "") -> str:
    """A table; one that is wider than the page scrolls."""

    def shown(cell: str | Link) -> str:
        text = html.escape(str(cell))
        return f'<a href="#{html.escape(cell.anchor)}">{text}</a>' if isinstance(cell, Link) else text

    def row(cells: Sequence[str | Link], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{shown(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    title = f"<caption>{html.escape(caption)}</caption>\n" if caption else ""
    return f'<div class="wide"><table>\n{title}{row(headings, "th")}\n{body}\n</table></div>'


def details_element(summary: str, elements: Sequence[str]) -> str:
    """Elements that stay folded away until somebody opens them by their summary."""
    body = "\n".join(elements)
    return f"<details><summary>{html.escape(summary)}</summary>\n{body}\n</details>"


def picture_element(picture: Figure | Path, description: str) -> str:
    """A figure, or a picture in a PNG file, inside the page."""
    return f'<img src="{data_uri(picture)}" alt="{html.escape(description)}">'
