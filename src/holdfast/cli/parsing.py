"""Arguments into dataclasses by tyro, with its errors in one line."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Sequence
from types import UnionType
from typing import Any, Union, get_origin

import tyro

from holdfast.cli.errors import UsageError
from holdfast.settings import OTHER_NAMES

FRAME = " │|╭╮╰╯"
RULE = "─-"


def parse(kind: Any, arguments: Sequence[str], *, prog: str, description: str, default: Any = None) -> Any:
    """An instance of the dataclass `kind` (or of one of a union) from command-line arguments.

    Args:
        kind: the type, as `tyro.cli` takes it.
        arguments: after the command's name.
        prog: the command as a user types it.
        description: above the options in the help text.
        default: an instance whose values are the defaults; None: those of the type.

    Raises:
        UsageError: naming the argument that is unknown, missing or wrong.
        SystemExit: once help has been shown.
    """
    defaults = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=list(arguments), prog=prog, description=description, **defaults)
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _in_one_line(printed.getvalue(), arguments)
        if get_origin(kind) in (Union, UnionType) and arguments and not arguments[0].startswith("-"):
            prog = f"{prog} {arguments[0]}"  # a command of several, each with options of its own
        raise UsageError(f"{message} (`{prog} --help` shows all options)") from None


def _in_one_line(box: str, arguments: Sequence[str]) -> str:
    """What the box of an error by tyro says: a title, the message, and after a rule the options that come close.

    Of these only one that is not among the arguments: another command may have an option of the same name.
    """
    lines = [line.strip(FRAME) for line in box.splitlines()[1:]]
    message = itertools.dropwhile(lambda line: not line.strip(RULE), lines)
    text = " ".join(itertools.takewhile(lambda line: line.strip(RULE), message))
    text = re.sub(r"^Error parsing [A-Z]\w+: ", "", text)  # the name of a class says nothing to a user
    close = _name_here(text)
    if close is None and "Perhaps you meant:" in lines:
        named = [line.split()[0].rstrip(",") for line in lines[lines.index("Perhaps you meant:") :] if line.strip()]
        close = next((name for name in named if name.startswith("--") and name not in arguments), None)
    return f"{text}; did you mean {close}?" if close else text


def _name_here(text: str) -> str | None:
    """The option for one that has another name in transformers."""
    unknown = re.match(r"Unrecognized options: --training\.([\w-]+)", text)
    ours = unknown and OTHER_NAMES.get(unknown[1].replace("-", "_"))
    return f"--training.{ours.replace('_', '-')}" if ours else None
