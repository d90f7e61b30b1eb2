"""The command line: `holdfast COMMAND`.

A command is a module of this package with a function `run(arguments)`, imported when the command is given. What takes
long to import (torch, transformers) is imported inside the functions that need it, so that help texts come at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from holdfast import __version__
from holdfast.cli.allocation import keep_freed_memory
from holdfast.cli.errors import UsageError, one_line
from holdfast.process import INTERRUPTED, ignore_interrupts, raising_interrupts
from holdfast.settings import suggest

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "Train a model by a recipe, or continue where a run stopped.",
    "tokenizer": "Train a tokenizer on one's own text.",
    "prepare": "Tokenize text once, into files that training maps into memory.",
    "report": "Write a page with the losses, the speed and the kept pairs of training runs.",
    "evaluate": "Measure trained models: needles, recall, turns, perplexity, scorers, efficiency, lm-eval; or all.",
    "generate": "Continue a prompt, or answer the questions of a needle sample.",
    "inspect": "Write a page that shows what a model keeps of a text, step by step.",
    "convert": "Rewrite a checkpoint in this library's or in the published format.",
    "info": "Parameters, operations per token and cache bytes of a model, without allocating it.",
    "kernels": "Compile every shipped Triton kernel ahead of time, and show registers, spills and shared memory.",
    "bench": "Measure time and memory beside other implementations, and draw the results.",
    "demo": "Train five small models on this machine and compare what they remember.",
}

_COMPUTING = ("train", "demo", "bench ops", "bench train")
"""Commands in which tensors are large and no cache grows to matter."""

USAGE = """\
usage: holdfast COMMAND [OPTIONS]

Language models whose memory does not grow, and which still remember.

commands:
{commands}

options:
  -h, --help   Show this text; `holdfast COMMAND --help` shows that of a command.
  --version    Show the version.
  --debug      Show the traceback of an error.

exit status: 0, 1 (failed, such as by a damaged file), 2 (called wrongly, such as with a path that leads nowhere), 130
(interrupted), 143 (training told to end)

examples:
  holdfast demo --short
  holdfast info gdn-lte-1.4b gdn-attn-1.4b
  holdfast train needle-lalte --training.max-steps 500
  holdfast evaluate needle runs/needle-lalte
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        The exit status: 0; 1 when the command failed; 2 when it was called wrongly; 130 when it was interrupted; 143
        when a training was told to end (SIGTERM); docs/command-line.md says what is which. What went wrong stands in
        one line on standard error; with `--debug` the exception is raised instead.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    keep_freed_memory(large=" ".join(arguments[:2]).startswith(_COMPUTING))
    try:
        with raising_interrupts():
            _dispatch(arguments)
    except SystemExit as stop:  # tyro has shown its help or its error
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt as stop:
        ignore_interrupts()
        if debug:
            raise
        return _complain(str(stop) or "interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        advice = " (--debug shows where)"
        return _complain(one_line(error, advice), 2 if isinstance(error, UsageError) else 1)
    return 0


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())), end="")
    elif arguments[0] == "--version":
        print(f"holdfast {__version__}")
    elif arguments[0] in COMMANDS:
        importlib.import_module(f"holdfast.cli.{arguments[0]}").run(arguments[1:])
    else:
        raise UsageError(f"There is no command {arguments[0]!r}{suggest(arguments[0], COMMANDS)}.")


def _complain(message: str, status: int) -> int:
    print(f"holdfast: {message}", file=sys.stderr)
    return status
