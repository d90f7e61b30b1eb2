"""Work in several processes, which tells how far it is and stops at the first error; workers that end when told."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

__all__ = ["end_by_parent_only", "in_processes", "with_lasting_workers"]

T = TypeVar("T")
SECONDS_BETWEEN_REPORTS = 0.5


class _InProcessError(Exception):
    """The traceback of an error in another process, as text; shown as the cause of that error."""


def in_processes(
    work: Callable[..., Generator[Any, None, T]], tasks: Sequence[tuple]
) -> Generator[None, None, list[T]]:
    """Run a generator function once for each task, each in a process of its own.

    Yields None for every item that any of them yields, within a second or so; returns what they return, in the order of
    the tasks. When one fails, or this generator is closed, the others are stopped at once, wherever they are.

    Args:
        work: a function at the top level of a module.
        tasks: its arguments, which are pickled.

    Raises:
        Whatever `work` raises first.
        RuntimeError: a process ended without a word, for want of memory perhaps.
    """
    processes: list[Any] = []
    numbers: dict[Any, int] = {}  # of the task, by the pipe from its process
    results: dict[int, T] = {}
    try:
        for number, task in enumerate(tasks):
            receiver, sender = multiprocessing.Pipe(duplex=False)
            # Pickled whether or not processes are forked: what is open (files, connections) is not to be shared.
            pickled = pickle.dumps((work, task))
            process = multiprocessing.Process(target=_work, args=(sender, pickled), daemon=True)
            process.start()
            processes.append(process)
            sender.close()  # so that the end of the process is the end of the pipe
            numbers[receiver] = number
        while numbers:
            for receiver in list[Any](connection.wait(list(numbers))):
                kind, value = _receive(receiver, processes[numbers[receiver]])
                if kind == "error":
                    error, shown = value
                    raise error from _InProcessError(f"\n{shown}")
                if kind == "result":
                    results[numbers.pop(receiver)] = value
                else:
                    yield from (None for _ in range(value))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
    return [results[number] for number in range(len(tasks))]


def _receive(receiver: Any, process: Any) -> tuple[str, Any]:
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"a worker process ended with status {process.exitcode}, perhaps for want of memory; give fewer workers."
        ) from None


def _work(sender: Any, pickled: bytes) -> None:
    """In the new process: send how many items there are now and then, and at the end the result or the error."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever the parent does then
    _end_with_parent()
    try:
        work, task = pickle.loads(pickled)
        items, count, reported = work(*task), 0, time.monotonic()
        while True:
            try:
                next(items)
            except StopIteration as end:
                sender.send(("items", count))
                sender.send(("result", end.value))
                return
            count += 1
            if time.monotonic() - reported > SECONDS_BETWEEN_REPORTS:
                sender.send(("items", count))
                count, reported = 0, time.monotonic()
    except KeyboardInterrupt:  # the parent has it too, and says so
        pass
    except Exception as error:
        sent = error if _can_be_sent(error) else RuntimeError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):  # there is nobody to tell
            sender.send(("error", (sent, traceback.format_exc())))  # an exception is sent without its traceback


def _can_be_sent(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # of whatever the exception's class does
        return False


def end_by_parent_only(worker: int) -> None:
    """In a worker of a DataLoader (`worker_init_fn`): leave the SIGTERMs of others to the parent.

    Who ends a job tells all its processes: a parent that wants to finish a step then still needs its workers. It ends
    them by a SIGTERM too, which must go on to work, or it would wait for them without end.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS: a parent that loses its workers ends with an error
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of this thread, and those that it starts

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def with_lasting_workers(loader: DataLoader) -> DataLoader:
    """Let the workers of a loader begin with `end_by_parent_only`, after what they begin with as it is."""
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's have another inside, which does the work
    inner.worker_init_fn = functools.partial(_begin_lasting, inner.worker_init_fn)
    return loader


def _begin_lasting(begin: Callable[[int], None] | None, worker: int) -> None:
    if begin is not None:
        begin(worker)
    end_by_parent_only(worker)


def _end_with_parent() -> None:
    """End this process when its parent is gone, whose own clean-up may have had no chance (SIGKILL)."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
