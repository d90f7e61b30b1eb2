"""What the process is that imports holdfast, and how Ctrl-C ends it. Light: the command line imports it first."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

__all__ = ["INTERRUPTED", "end_on_interrupt", "is_command_line", "raising_interrupts"]

INTERRUPTED = 128 + signal.SIGINT
"""Exit status of what Ctrl-C ended, as shells report it."""


def is_command_line() -> bool:
    """Whether this process is `holdfast …`, `python -m holdfast …` or `python -m holdfast.cli …`.

    Of `-m` this is known while the first import of holdfast lasts: until Python has found the module to run, `sys.argv`
    has `-m` in the place of its path.
    """
    program, *arguments = sys.argv or [""]
    given, *same = sys.orig_argv[-1 - len(arguments) :]
    if same != arguments:  # a process that multiprocessing started has the `sys.argv` of the one that started it
        return False
    if program == "-m":
        return given.removeprefix("-m") in ("holdfast", "holdfast.cli")
    return program == given and os.path.basename(program) in ("holdfast", "holdfast.exe")


def end_on_interrupt() -> None:
    """From now on Ctrl-C, where it is not ignored, ends this process at once, with one line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextlib.contextmanager
def raising_interrupts() -> Iterator[None]:
    """Within, Ctrl-C raises, where `end_on_interrupt` has it end the process: there is work to tidy up.

    In the midst of an import it still ends the process: there an exception may be lost, or turned into another.
    """
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)


def _end(*_: object) -> None:
    os.write(2, b"holdfast: interrupted\n")
    os._exit(INTERRUPTED)


def _raise(signum: int, frame: FrameType | None) -> None:
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename == "<frozen importlib._bootstrap>":
            _end()
        caller = caller.f_back
    raise KeyboardInterrupt
