"""Work on several cores, in the threads that PyTorch has for its own.

PyTorch's threads go on spinning for a while after each of its operations. Threads of another pool would share the cores
with them: on two cores, attention over 512 tokens took 2.4 times as long as with PyTorch's own.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import torch

__all__ = ["TEAM", "in_threads", "must_go_alone", "openmp", "team_for"]

TEAM = Path(__file__).with_name("team.h")
"""The same threads for C++ that divides its work itself."""

# Numbers to be read from which on a second thread saves more than the microseconds that it takes to wake it.
_THREADED = 1 << 16
_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_forked = False


def in_threads(run: Callable[[int, int], object], count: int, workers: int) -> None:
    """Call run(first, end) with ranges that cover `count`, in as many threads; it must not hold Python's lock.

    They are PyTorch's own where it computes with an OpenMP that answers to GNU's names (GNU's, LLVM's and Intel's),
    else new ones: those of numba's layers abort the process when two threads enter them at once, or after a fork.

    Raises:
        Exception: the first that `run` raised, after all parts have ended.
    """
    workers = min(count, workers)
    if workers <= 1:
        run(0, count)
        return
    team = openmp()
    if team is None:
        _in_new_threads(run, count, workers)
        return
    errors: list[BaseException] = []
    done: list[int] = []

    def part(_: object) -> None:
        try:  # nothing may pass through C
            thread, size = team.omp_get_thread_num(), team.omp_get_num_threads()  # which may be fewer than asked for
            first, end = count * thread // size, count * (thread + 1) // size
            run(first, end)
            done.append(end - first)
        except BaseException as error:
            errors.append(error)

    team.GOMP_parallel(_WORK(part), None, workers, 0)
    if errors:
        raise errors[0]
    if sum(done) != count:  # a signal's exception, between C and the first line above
        raise KeyboardInterrupt("a signal interrupted the work of several threads")


def team_for(numbers: int, parts: int) -> tuple[int | None, int]:
    """The address of the threads (struct Team in team.h), and how many of them are to share work on as many numbers,
    which has so many parts."""
    team = openmp() if numbers >= _THREADED else None
    return (None, 1) if team is None else (team.address, min(parts, torch.get_num_threads()))


def must_go_alone(numbers: int) -> bool:
    """Whether C++ would have one thread for work on as many numbers where PyTorch has several."""
    # The first question for a team starts threads, which a process with small tensors that forks is better off without.
    return numbers >= _THREADED and torch.get_num_threads() > 1 and openmp() is None


def openmp() -> "_Team | None":
    """The OpenMP that PyTorch has loaded, with GOMP_parallel, omp_get_thread_num and omp_get_num_threads.

    None if there is none by these names, or in a process forked from another that had imported this module: GNU's
    OpenMP waits there for threads that it no longer has, if it had any.
    """
    return None if _forked else _loaded()


class _Functions(ctypes.Structure):
    """Addresses of the three functions, for C++ that calls them itself (struct Team in team.h)."""

    _fields_ = (("run", ctypes.c_void_p), ("thread", ctypes.c_void_p), ("size", ctypes.c_void_p))


class _Team:
    def __init__(self) -> None:
        # The small ones are called while Python's lock is held, for giving it back would take longer.
        keeping, releasing = ctypes.PyDLL(None), ctypes.CDLL(None)
        self.omp_get_thread_num = keeping.omp_get_thread_num
        self.omp_get_num_threads = keeping.omp_get_num_threads
        self.GOMP_parallel = releasing.GOMP_parallel
        self.GOMP_parallel.argtypes = [_WORK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self.GOMP_parallel.restype = None
        functions = (self.GOMP_parallel, self.omp_get_thread_num, self.omp_get_num_threads)
        self._functions = _Functions(*(ctypes.cast(function, ctypes.c_void_p).value for function in functions))
        self.address = ctypes.addressof(self._functions)


@functools.cache
def _loaded() -> _Team | None:
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        team = _Team()
    except (AttributeError, TypeError, OSError):  # other names; Windows, which has no process-wide table of names
        return None
    places: list[tuple[int, int]] = []
    work = _WORK(lambda _: places.append((team.omp_get_thread_num(), team.omp_get_num_threads())))
    team.GOMP_parallel(work, None, 2, 0)
    # From two libraries, every thread would be the first of one, and do all of the work.
    return team if sorted(places) == [(thread, len(places)) for thread in range(len(places))] else None


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _in_new_threads(run: Callable[[int, int], object], count: int, workers: int) -> None:
    bounds = [count * n // workers for n in range(workers + 1)]
    with ThreadPoolExecutor(workers - 1) as pool:
        others = [pool.submit(run, *part) for part in pairwise(bounds[1:])]
        run(*bounds[:2])
        for part in others:
            part.result()
