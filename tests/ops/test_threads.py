"""Ranges that threads work on: all of them once, in PyTorch's threads and in others, with errors and after a fork."""

import multiprocessing
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from holdfast.ops import threads
from holdfast.ops.threads import in_threads


@pytest.fixture(params=["openmp", "new threads"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "new threads":
        monkeypatch.setattr(threads, "openmp", lambda: None)
    elif threads.openmp() is None:
        pytest.skip("this PyTorch computes without an OpenMP of known names")
    return request.param


@pytest.mark.parametrize(("count", "workers"), [(0, 2), (1, 4), (5, 2), (7, 7), (3, 9), (1000, 3)])
def test_they_cover_everything_once(kind: str, count: int, workers: int) -> None:
    seen: list[int] = []
    in_threads(lambda first, end: seen.extend(range(first, end)), count, workers)
    assert sorted(seen) == list(range(count))


def test_there_are_several_threads(kind: str) -> None:
    names: set[int] = set()
    both = threading.Barrier(2, timeout=20)  # neither gets past it alone

    def run(first: int, end: int) -> None:
        both.wait()
        names.add(threading.get_ident())

    in_threads(run, 2, 2)
    assert len(names) == 2


@pytest.mark.parametrize("failing", [0, 7])
def test_an_error_arrives_when_all_have_ended(kind: str, failing: int) -> None:
    ended: list[int] = []

    def run(first: int, end: int) -> None:
        if first <= failing < end:
            raise ValueError(f"part with {failing}")
        ended.append(first)

    with pytest.raises(ValueError, match=f"part with {failing}"):
        in_threads(run, 8, 2)
    assert len(ended) == 1
    in_threads(run, 0, 2)  # and it works again


def test_a_part_that_never_ran_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a signal's exception comes before the part's first line: ctypes prints it and goes on."""
    monkeypatch.setattr(threads, "openmp", lambda: SimpleNamespace(GOMP_parallel=lambda *_: None))
    with pytest.raises(KeyboardInterrupt):
        in_threads(lambda first, end: None, 4, 2)


def test_several_callers_at_once(kind: str) -> None:
    sums = [0] * 4

    def call(caller: int) -> None:
        parts: list[int] = []
        for _ in range(50):
            in_threads(lambda first, end: parts.append(sum(range(first, end))), 100, 2)
        sums[caller] = sum(parts)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert sums == [50 * 4950] * 4


def _covers_everything() -> None:
    seen: list[int] = []
    in_threads(lambda first, end: seen.extend(range(first, end)), 9, 2)
    sys.exit(0 if sorted(seen) == list(range(9)) else 1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_after_a_fork() -> None:
    """GNU's OpenMP would wait in the child for threads that only the parent has."""
    torch.ones(512, 512) @ torch.ones(512, 512)
    in_threads(lambda first, end: None, 2, 2)
    child = multiprocessing.get_context("fork").Process(target=_covers_everything)
    child.start()
    child.join(timeout=60)
    hangs = child.is_alive()
    child.kill()
    assert not hangs
    assert child.exitcode == 0
