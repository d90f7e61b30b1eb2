"""Calls in processes that have done no work, so that what they hold is what the call needs.

On Linux each is forked from a process that has imported what is measured, and nothing else, so that only the first call
takes the seconds of importing it; elsewhere, where a fork is not safe, each is a new interpreter. Calls and answers
come through pipes: there are no locks that an interrupted caller could take away. However it ends, all of them end.
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
import threading
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
        RuntimeError: the process was killed, perhaps for its memory, or ended; or its error cannot be raised again.
        Exception: what the call raised, or what pickling its answer did.
    """
    call = pickle.dumps((work, arguments))
    try:
        pipe = _Server.running().pipe
        pipe.send_bytes(call)
        came = pipe.recv_bytes()
    except (EOFError, OSError) as error:
        _Server.close()
        raise RuntimeError("the process that was to be measured ended without an answer.") from error
    except BaseException:
        _Server.close()
        raise
    if not FORKS:
        _Server.close()
    answer, raised = pickle.loads(came)
    if raised is not None:
        raise raised
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
        if server is None or server.process.pid is None:
            return
        with contextlib.suppress(OSError):  # it has not come to be the first of a group, and forked nothing
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.kill()
        server.process.join()
        server.pipe.close()

    @classmethod
    def forget(cls) -> None:
        """In a child that the caller forks: it is not the child's, nor is it for multiprocessing to end with it."""
        server, cls._one = cls._one, None
        if server is not None:
            multiprocessing.process._children.discard(server.process)  # type: ignore[attr-defined]


atexit.register(_Server.close)
os.register_at_fork(after_in_child=_Server.forget)


def _serve(calls: Connection) -> None:
    """Have each call answered, until the caller has ended."""
    os.setsid()  # a group of its own: what is pressed at the terminal goes to the caller alone, which ends all of it
    threading.Thread(target=_end_with_caller, daemon=True).start()
    importlib.import_module("holdfast.bench.efficiency")
    with contextlib.suppress(EOFError, OSError):
        while call := calls.recv_bytes():
            calls.send_bytes(_answer_of_fork(call, calls) if FORKS else _answer(call))


def _end_with_caller() -> None:
    """Also in the midst of an import or a call: a caller that is killed ends nothing itself."""
    if caller := multiprocessing.parent_process():
        caller.join()
    os.killpg(0, signal.SIGKILL)


def _answer_of_fork(call: bytes, calls: Connection) -> bytes:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            calls.close()  # so that the caller hears of the server's end
            os.register_at_fork(after_in_child=theirs.close)  # and the server of this one's, whatever it forks
            theirs.send_bytes(_answer(call))
        finally:
            os._exit(1)  # looked at only where no answer came
    theirs.close()
    answer = None
    with ours, contextlib.suppress(EOFError, OSError):
        answer = ours.recv_bytes()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if answer is not None:
        return answer
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}, without an answer"
    why = ", perhaps for lack of memory" if status == -signal.SIGKILL else ""
    return pickle.dumps((None, RuntimeError(f"the process that was measured {how}{why}.")))


def _answer(call: bytes) -> bytes:
    """What the call returned and what it raised, pickled such that it can be read again."""
    try:
        work, arguments = pickle.loads(call)
        answer = pickle.dumps((work(*arguments), None))
        pickle.loads(answer)
    except BaseException as error:  # sys.exit too: it ends no more than the call
        told: Exception = RuntimeError(repr(error))
        if isinstance(error, Exception):
            with contextlib.suppress(Exception):
                pickle.loads(pickle.dumps(error))
                told = error
        told.add_note(f"In a new process:\n{traceback.format_exc()}")
        answer = pickle.dumps((None, told))
    return answer
