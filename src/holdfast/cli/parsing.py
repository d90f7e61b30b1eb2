"""Arguments into dataclasses by tyro, with its errors in one line."""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

import tyro

from holdfast.cli.errors import UsageError
from holdfast.cli.help import HelpText, joined, list_commands, readable
from holdfast.settings import OTHER_NAMES, suggest

FRAME = " │|╭╮╰╯"
RULE = "─-"
HELP = ("-h", "--help")
UNKNOWN = "Unrecognized options:"
REWORDED = (
    (r"^Error parsing [A-Z]\w+: ", ""),  # the name of a class says nothing to a user
    (r"^Error parsing (\S+): .*invalid literal for int\(\) with base 10: ('[^']*').*", r"\1 is \2; give an integer."),
    (r"^Error parsing (\S+): .*could not convert string to float: ('[^']*').*", r"\1 is \2; give a number."),
    (r"^Error parsing (\S+): .*could be instantiated from \[(.*)\]\..*", r"\1 cannot be \2."),
    (r"^Error parsing (\S+): Could not find valid parse for arguments: \[(.*)\]", r"\1 cannot be \2."),
    (r"^Missing value for argument '(.*)'\. Expected 1 values\.", r"\1 lacks its value."),
    (r"^Missing from [^:]*: ", "Missing: "),
    (r" \(required\)", ""),
)
"""What tyro says of types, and what is said in its place."""


def parse(kind: Any, arguments: Sequence[str], *, prog: str, description: str | None, default: Any = None) -> Any:
    """An instance of the dataclass `kind` (or of one of a union) from command-line arguments.

    Args:
        kind: the type, as `tyro.cli` takes it; of a union the first argument names the one that is meant.
        arguments: after the command's name.
        prog: the command as a user types it.
        description: above the options in the help text; None: the docstring of `kind`.
        default: an instance whose values are the defaults; None: those of the type.

    Raises:
        UsageError: naming the argument that is unknown, missing or wrong, and what may have been meant.
        SystemExit: once help has been shown.
    """
    if get_origin(kind) in (Union, UnionType):
        commands = {get_args(each)[1].name: get_args(each)[0] for each in get_args(kind)}
        name, *rest = arguments
        if name in HELP:
            print(list_commands(prog, description or "", commands.items()), end="")
            raise SystemExit(0)
        if name.startswith("-"):
            raise UsageError(f"Give a command before {name}: `{prog} COMMAND`, one of {', '.join(commands)}.")
        if name not in commands:
            raise UsageError(f"{prog} has no command {name!r}{suggest(name, commands)}.")
        # By itself, so that only its own options can be suggested.
        return parse(commands[name], rest, prog=f"{prog} {name}", description=None)
    defaults = {} if default is None else {"default": default}
    defaults |= {"prog": prog, "description": description and joined(description)}
    shown = HelpText()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(shown), readable():
            return tyro.cli(kind, args=list(arguments), **defaults)
    except SystemExit as stop:
        if not stop.code:
            shown.print()
            raise
    message = _in_one_line(_box(kind, arguments, defaults), lambda: _options(kind, defaults))
    raise UsageError(f"{message} (`{prog} --help` shows all options)")


def _box(kind: Any, arguments: Sequence[str], options: dict[str, Any]) -> str:
    """What tyro says of wrong arguments; of a terminal so wide that no word is broken."""
    printed, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        with contextlib.redirect_stderr(printed), contextlib.suppress(SystemExit), readable():
            tyro.cli(kind, args=list(arguments), **options)
    finally:
        del os.environ["COLUMNS"]
        if width is not None:
            os.environ["COLUMNS"] = width
    return printed.getvalue()


def _options(kind: Any, defaults: dict[str, Any]) -> list[str]:
    """The names of all options, from the beginnings of the lines of the help text."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], compact_help=True, **defaults)
    lines = re.findall(r"^\W (--\w[^ ,]*)(?:, (--\w[^ ,]*))?", shown.getvalue(), re.MULTILINE)
    return [name for line in lines for name in line if name]


def _in_one_line(box: str, options: Callable[[], Sequence[str]]) -> str:
    """What the box of an error by tyro says: a title, the message, and after a rule what else it knows.

    Args:
        box: as tyro prints it.
        options: that there are.
    """
    lines = [line.strip(FRAME) for line in box.splitlines()[1:]]
    unknown = [text for text in _parts(lines) if text.startswith(UNKNOWN)]
    if unknown:  # said first where something is missing too: it may be the same option
        return _unknown(unknown[0].removeprefix(UNKNOWN).replace(",", "").split(), options())
    text, *more = [*_parts(lines), ""]
    text += "".join(f" {part}" for part in more if part.startswith("Got errors:"))
    for pattern, instead in REWORDED:
        text = re.sub(pattern, instead, text)
    if (choice := re.search(r"invalid choice '(.*)' for .* Expected one of \((.*)\)", text)) is not None:
        close = difflib.get_close_matches(choice[1], re.findall(r"'([^']*)'", choice[2]), n=1)
        return f"{text} Did you mean {close[0]}?" if close else text
    return text


def _parts(lines: Sequence[str]) -> Iterator[str]:
    """The paragraphs between the rules of a box."""
    for is_text, part in itertools.groupby(lines, key=lambda line: bool(line.strip(RULE))):
        if is_text:
            yield " ".join(part)


def _unknown(arguments: Sequence[str], known: Sequence[str]) -> str:
    """Options that there are not, without their values, and what the first may have been meant for."""
    options = [argument.partition("=")[0] for argument in arguments if re.match("--?[A-Za-z]", argument)]
    named = options or arguments
    text = f"Unrecognized {'option' if options else 'argument'}{'s'[: len(named) > 1]}: {', '.join(named)}"
    sections = {name.rpartition(".")[2]: name for name in reversed(known)}  # --max-steps for --training.max-steps
    short = difflib.get_close_matches(named[0].lstrip("-"), sections, n=1, cutoff=0.75)
    close = [_name_here(named[0]), *difflib.get_close_matches(named[0], known, n=1, cutoff=0.75)]
    close += [sections[name] for name in short]
    meant = next(filter(None, close), None) if options else None
    return f"{text}; did you mean {meant}?" if meant else text


def _name_here(option: str) -> str | None:
    """The option for one that has another name in transformers."""
    unknown = re.fullmatch(r"--training\.([\w-]+)", option)
    ours = unknown and OTHER_NAMES.get(unknown[1].replace("-", "_"))
    return f"--training.{ours.replace('_', '-')}" if ours else None
