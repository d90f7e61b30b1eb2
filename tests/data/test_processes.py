"""Work in several processes: what it returns, how it stops, and that nothing outlives who started it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from holdfast.data.processes import in_processes

FOREVER = 60.0  # seconds, that no test waits for


def count(items: int, result: str) -> Generator[None, None, str]:
    for _ in range(items):
        yield
    return result


def stumble(fault: str, folder: Path) -> Generator[None, None, None]:
    (folder / str(os.getpid())).touch()
    if fault == "error":
        raise ValueError("a bad input")
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(0.01)
        yield


def all_ended(folder: Path) -> bool:
    return not any(is_running(int(path.name)) for path in folder.iterdir())


def is_running(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_items_are_counted_and_results_are_in_order() -> None:
    results = []

    def everything() -> Generator[None, None, None]:
        results.extend((yield from in_processes(count, [(3, "a"), (10_000, "b"), (0, "c")])))

    assert len(list(everything())) == 10_003
    assert results == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [("error", ValueError, "^a bad input$"), ("killed", RuntimeError, "status -9, perhaps for want of memory")],
)
def test_the_first_that_fails_stops_the_others(tmp_path: Path, fault: str, error: type, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=message):
        list(in_processes(stumble, [("", tmp_path), (fault, tmp_path)]))
    assert time.monotonic() - started < FOREVER / 2
    assert all_ended(tmp_path)


def test_where_a_worker_cannot_be_started_the_others_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = multiprocessing.Process.start, []

    def twice(process: multiprocessing.Process) -> None:
        if len(started) == 2:
            raise BlockingIOError("no more processes")
        start(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.Process, "start", twice)
    with pytest.raises(BlockingIOError, match="no more processes"):
        list(in_processes(stumble, [("", tmp_path)] * 3))
    assert not any(process.is_alive() for process in started)


def test_closing_stops_all(tmp_path: Path) -> None:
    items = in_processes(stumble, [("", tmp_path), ("", tmp_path)])
    next(items)
    items.close()
    assert all_ended(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the states of processes in /proc")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, method: str) -> None:
    script = (
        "import multiprocessing, sys, pathlib; multiprocessing.set_start_method(sys.argv[3])\n"
        "sys.path.insert(0, sys.argv[1]); from test_processes import in_processes, stumble\n"
        "list(in_processes(stumble, [('', pathlib.Path(sys.argv[2]))] * 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path), method])
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        assert not all_ended(tmp_path)
        parent.kill()  # which it cannot pass on
        parent.wait(FOREVER)
        wait_until(lambda: all_ended(tmp_path))
    finally:
        parent.kill()
        parent.wait()


def wait_until(condition) -> None:
    end = time.monotonic() + FOREVER
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
