"""Calls in processes that have done no work, so that what they hold is what the call needs.

On Linux each is forked from a process that has imported what is measured, and nothing else, so that only the first call
takes the seconds of importing it; elsewhere, where a fork is not safe, each is a new interpreter. Calls come through a
pipe, and so do answers: there are no locks and no semaphores that an interrupted caller could take away.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from holdfast.process import holding_interrupts

__all__ = ["call_in_new_process"]

T = TypeVar("T")
FORKS = sys.platform == "linux"


def call_in_new_process(work: Callable[..., T], *arguments: Any) -> T:
    """What `work(*arguments)` returns in a process of its own; an interrupt ends that process at once.

    Args:
        work: a function of a module, or what else can be pickled, as the arguments and the answer can.
        arguments: of the call.

    Raises:
        RuntimeError: the process ended without an answer, as one does that the system kills for its memory.
        Exception: what the call raised.
    """
    call = pickle.dumps((work, arguments))
    try:
        pipe = _Server.running().pipe
        pipe.send_bytes(call)
        answer = pipe.recv()
    except (EOFError, OSError) as error:
        _Server.close()
        raise RuntimeError("the process that was to be measured ended without an answer.") from error
    except BaseException:
        _Server.close()
        raise
    if not FORKS:
        _Server.close()
    if isinstance(answer, _Failure):
        raise answer.error
    return answer


class _Server:
    """The process that calls are forked from, and the pipe to it."""

    _one: _Server | None = None

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        resource_tracker.ensure_running()  # now: it would unblock the signal
        with holding_interrupts():  # half a process would show a traceback
            self.process.start()
            _Server._one = self
        theirs.close()

    @classmethod
    def running(cls) -> _Server:
        return cls._one or cls()

    @classmethod
    def close(cls) -> None:
        """End it, and the call that is under way."""
        server, cls._one = cls._one, None
        if server is None:
            return
        with contextlib.suppress(OSError):  # it has not come to be the first of a group, and forked nothing
            os.killpg(server.process.pid or 0, signal.SIGKILL)
        server.process.kill()
        server.process.join()
        server.pipe.close()


atexit.register(_Server.close)


class _Failure:
    """In the place of an answer: what a call raised."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _serve(calls: Connection) -> None:
    """Have each call answered, until the caller has ended."""
    os.setsid()  # a group of its own: what is pressed at the terminal goes to the caller alone, which ends all of it
    importlib.import_module("holdfast.bench.efficiency")
    with contextlib.suppress(EOFError, OSError):
        while True:
            call = calls.recv_bytes()
            if not FORKS:
                _answer(calls, call)
                continue
            child = os.fork()
            if child == 0:
                with contextlib.suppress(OSError):  # the caller has ended
                    _answer(calls, call)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status:
                how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
                calls.send(_Failure(RuntimeError(f"the process that was measured {how}, perhaps for lack of memory.")))


def _answer(calls: Connection, call: bytes) -> None:
    answer: Any
    try:
        work, arguments = pickle.loads(call)
        answer = work(*arguments)
    except Exception as error:
        error.add_note(f"In a new process:\n{traceback.format_exc()}")
        answer = _Failure(error)
    calls.send(answer)
