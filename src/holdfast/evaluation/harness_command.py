"""The command line of lm-evaluation-harness, read before anything is imported that takes long."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lm_eval._cli import HarnessCLI

__all__ = ["LISTS", "list_tasks", "read_options", "show_help"]

LISTS = {"list": "tasks", "list_groups": "groups", "list_subtasks": "subtasks", "list_tags": "tags"}
"""What may stand in the place of tasks, and what the harness lists for it."""


def read_options(model: str, arguments: Sequence[str]) -> tuple[HarnessCLI, argparse.Namespace]:
    """The harness, and the options of its `run` with this library's model.

    Args:
        model: directory or hub id of a checkpoint with its tokenizer.
        arguments: any options of `lm-eval run`; they win over what is set here.

    Raises:
        ValueError: naming the option that is unknown or wrong, in one line.
    """
    printed = io.StringIO()
    given = ("run", "--model", "holdfast", "--model_args", f"pretrained={model}", *arguments)
    try:
        with contextlib.redirect_stderr(printed):
            return _parsed(*given)
    except SystemExit as stop:
        if not stop.code:
            raise
    message = printed.getvalue().strip().rpartition("error: ")[2]
    unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
    close = unknown and difflib.get_close_matches(unknown[1], _known(), n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    named = f"Unrecognized option: {unknown[1]}" if unknown else f"lm-eval: {' '.join(message.split())}"
    raise ValueError(f"{named}{meant} (`holdfast evaluate lm-eval --help` shows all options)")


def show_help() -> None:
    """Print the options of the harness's `run`."""
    with contextlib.suppress(SystemExit):
        _parsed("run", "--help")


def list_tasks(what: str, options: argparse.Namespace) -> None:
    """Print what the harness lists: the values of `LISTS`."""
    include = () if options.include_path is None else ("--include_path", str(options.include_path))
    harness, chosen = _parsed("ls", what, *include)
    harness.execute(chosen)


def _known() -> list[str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        show_help()
    return sorted(set(re.findall(r"--\w+", shown.getvalue())))


def _parsed(*arguments: str) -> tuple[HarnessCLI, argparse.Namespace]:
    from lm_eval._cli import HarnessCLI

    with _arguments_of_process("lm-eval", *arguments):
        harness = HarnessCLI()
        return harness, harness.parse_args()


@contextlib.contextmanager
def _arguments_of_process(*arguments: str) -> Iterator[None]:
    """The harness reads those of the process."""
    before = sys.argv
    sys.argv = list(arguments)
    try:
        yield
    finally:
        sys.argv = before
