"""Help texts that read well at any width: what tyro shows, with names in place of types and lines that are whole."""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

__all__ = ["HelpText", "joined", "list_commands", "readable"]

_NUMBERS = {int: "N", float: "NUMBER"}


def readable() -> ConstructorRegistry:
    """Rules for tyro: an argument is shown as a name, such as `--column COLUMN`, without `None` and without a default
    that says nothing, and its text in lines as wide as the terminal, wherever the source breaks them."""
    registry = ConstructorRegistry()
    inside: list[StructTypeInfo] = []

    @registry.struct_rule
    def show(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type) or inside:
            return None
        inside.append(info)
        try:
            spec = ConstructorRegistry.get_struct_spec(info)  # by tyro's own rule
        finally:
            inside.pop()
        if not isinstance(spec, StructConstructorSpec):
            return None
        fields = (
            dataclasses.replace(field, type=_shown(field.name, field.type, field.default), helptext=_whole(field))
            for field in spec.fields
        )
        return dataclasses.replace(spec, fields=tuple(fields))

    return registry


class HelpText(io.StringIO):
    """Standard output while a help text is written; `print` then writes it with its paragraphs wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self._output = sys.stdout

    def isatty(self) -> bool:
        """As of the output, on which colours depend."""
        return self._output.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As of the output, on which the lines of boxes depend."""
        return self._output.encoding

    def print(self) -> None:
        """Write what was printed."""
        print(_wrapped(self.getvalue()), end="", file=self._output)


def joined(text: str) -> str:
    """`text` with each paragraph in one line, but for those with indented lines, such as examples."""
    paragraphs = text.strip("\n").split("\n\n")
    return "\n\n".join(each if re.search("^ ", each, re.MULTILINE) else " ".join(each.split()) for each in paragraphs)


def _wrapped(text: str) -> str:
    """`text` without lines longer than the terminal is wide, but for indented ones and those of boxes."""
    width = shutil.get_terminal_size().columns
    lines = (
        textwrap.fill(line, width, break_on_hyphens=False) if re.match(r"[\w`]", line) else line
        for line in text.splitlines()
    )
    return "".join(f"{line}\n" for line in lines)


def list_commands(prog: str, description: str, commands: Iterable[tuple[str, Any]]) -> str:
    """The help text of a command of several: each with the first sentence of its docstring.

    Args:
        prog: as a user types it.
        description: between the usage and the list.
        commands: names, and the dataclasses of their options.
    """
    commands = list(commands)
    start = " " * (max(len(name) for name, _ in commands) + 4)
    width = max(len(start) + 40, shutil.get_terminal_size().columns)
    lines = [
        textwrap.fill(
            _first_sentence(kind), width, initial_indent=f"  {name}".ljust(len(start)), subsequent_indent=start
        )
        for name, kind in commands
    ]
    own = f"`{prog} {commands[0][0]} --help` shows the options of {commands[0][0]}, and so for all."
    listed = "\n".join(["commands:", *lines])
    return _wrapped(f"usage: {prog} COMMAND [OPTIONS]\n\n{joined(description)}\n\n{listed}\n\n{own}")


def _first_sentence(kind: Any) -> str:
    return re.split(r"(?<=[.])\s", " ".join((kind.__doc__ or "").split()), maxsplit=1)[0]


def _whole(field: Any) -> Callable[[], str | None]:
    """The text of a field without the line breaks of its source."""

    def text() -> str | None:
        found = field.helptext() if callable(field.helptext) else field.helptext
        return found and " ".join(found.split())

    return text


def _shown(name: str, kind: Any, default: Any) -> Any:
    """The type of an argument, and how it is shown unless it says so itself."""
    marks = getattr(kind, "__metadata__", ())
    if any(type(mark) is type(tyro.conf.arg()) for mark in marks):
        return kind
    is_positional = tyro.conf.Positional in marks
    metavar = _metavar(name, kind, is_positional, default)
    if metavar is None:
        return kind
    if is_positional and default is not tyro.MISSING_NONPROP:
        metavar = f"[{metavar}]"
    return Annotated[kind, tyro.conf.arg(metavar=metavar, help_behavior_hint=_default)]


def _default(label: str) -> str:
    return f"(default: {label})" if label not in ("", "None") else ""


def _metavar(name: str, kind: Any, is_positional: bool, default: Any) -> str | None:
    """What stands for a value of this type; None: what tyro shows."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin in (Union, UnionType):
        others = [_metavar(name, each, is_positional, default) for each in inner if each is not NoneType]
        can_be_none = NoneType in inner and default is not None
        return None if None in others else "|".join(dict.fromkeys([*filter(None, others), *["None"] * can_be_none]))
    if (origin is tuple and inner[1:] == (...,)) or origin is list:
        shown = _metavar(name.removesuffix("s"), inner[0], is_positional, default)
        return shown and f"{shown} ..."
    if origin is tuple:
        each = [_metavar(name.removesuffix("s"), part, is_positional, default) for part in inner]
        return None if None in each else " ".join(filter(None, each))
    if kind is str or (kind is Path and is_positional):
        return name.upper()
    return "PATH" if kind is Path else _NUMBERS.get(kind)
