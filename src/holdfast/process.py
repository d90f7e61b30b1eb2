"""What the process is that imports holdfast, and how Ctrl-C ends it. Light: the command line imports it first."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = [
    "INTERRUPTED",
    "end_on_interrupt",
    "holding_interrupts",
    "ignore_interrupts",
    "is_command_line",
    "raising_interrupts",
]

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


def ignore_interrupts() -> None:
    """From now on Ctrl-C does nothing: this process is about to end, and a second one would end it by a signal."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


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


@contextlib.contextmanager
def holding_interrupts() -> Iterator[None]:
    """Within, Ctrl-C waits for the end, for what must not be done by half; processes that are started never hear of it.

    Blocking the signal would not do: another thread may take it, and Python raises in the main one.
    """
    held: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()  # which alone hears of it
    before = signal.signal(signal.SIGINT, lambda signum, _: held.append(signum)) if is_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # is handed on
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


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
