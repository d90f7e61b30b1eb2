"""Calls in new processes, and what is left of them after their caller."""

import operator
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from holdfast.bench.fresh import _Server, call_in_new_process

ENDED = """
import os, signal, sys, threading, time
from holdfast.bench.fresh import call_in_new_process
if __name__ == "__main__":
    if sys.argv[2] == "late":
        call_in_new_process(abs, -1)
    try:
        threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), int(sys.argv[3]))).start()
        call_in_new_process(time.sleep, 100)
    except KeyboardInterrupt:
        print("interrupted")
"""
FORKING = """
import os, sys
from holdfast.bench.fresh import _Server
if __name__ == "__main__":
    server = _Server.running()
    child = os.fork()
    if child == 0:
        sys.exit(_Server._one is not None)
    print(os.waitpid(child, 0)[1])
    server.process.join(0.5)
    print(server.process.is_alive())
"""


class TwoArgumentError(Exception):
    """Can be pickled, and not read again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def two_arguments(raised: bool) -> Exception:
    error = TwoArgumentError(1, 2)
    if raised:
        raise error
    return error


def test_every_process_is_new() -> None:
    """And on Linux none but the first imports PyTorch."""
    found = {call_in_new_process(os.getpid) for _ in range(2)} | {os.getpid()}
    assert len(found) == 3
    if sys.platform == "linux":
        assert call_in_new_process(eval, "'holdfast.bench.efficiency' in __import__('sys').modules")


def test_what_a_call_raises_comes_back_with_where() -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        call_in_new_process(operator.truediv, 1, 0)
    assert "In a new process" in raised.value.__notes__[0]
    assert call_in_new_process(operator.truediv, 1, 2) == 0.5


def test_a_process_that_is_killed_is_told_of() -> None:
    with pytest.raises(RuntimeError, match=r"was measured was killed by signal 9, perhaps for lack of memory\."):
        call_in_new_process(eval, "__import__('os').kill(__import__('os').getpid(), 9)")
    assert call_in_new_process(abs, -1) == 1
    os.kill(_Server.running().process.pid or 0, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended without an answer"):
        call_in_new_process(abs, -1)
    assert call_in_new_process(abs, -1) == 1


@pytest.mark.parametrize(
    ("work", "argument", "told"),
    [
        (sys.exit, 3, "SystemExit(3)"),
        (sys.exit, 0, "SystemExit(0)"),
        (two_arguments, True, "TwoArgumentError('1 and 2')"),
    ],
)
def test_what_cannot_be_raised_again_is_told_of(work: object, argument: object, told: str) -> None:
    server = call_in_new_process(os.getppid)
    with pytest.raises(RuntimeError) as raised:
        call_in_new_process(work, argument)  # type: ignore[arg-type]
    assert str(raised.value) == told
    assert "In a new process" in raised.value.__notes__[0]
    assert call_in_new_process(os.getppid) == server or sys.platform != "linux"


def test_an_answer_that_cannot_come_is_an_error_of_the_call(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError, match="cannot pickle") as raised:
        call_in_new_process(threading.Lock)
    assert "In a new process" in raised.value.__notes__[0]
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        call_in_new_process(two_arguments, False)
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the server is the process")
def test_a_process_that_ends_without_an_answer_is_told_of() -> None:
    """Also if one that it forked goes on."""
    for status in (0, 3):
        told = rf"^the process that was measured ended with status {status}, without an answer\.$"
        with pytest.raises(RuntimeError, match=told):
            call_in_new_process(os._exit, status)
    with pytest.raises(RuntimeError, match=r"was killed by signal 15\.$"):
        call_in_new_process(eval, "__import__('os').kill(__import__('os').getpid(), 15)")
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="ended with status 5"):
        call_in_new_process(
            eval, "__import__('os')._exit(5) if __import__('os').fork() else __import__('time').sleep(60)"
        )
    assert time.monotonic() - started < 30


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("seconds", "when"), [(0.01, "early"), (0.5, "late")])
def test_nothing_is_printed_and_nothing_left_after_an_interrupt(seconds: float, when: str, tmp_path: Path) -> None:
    """While the process starts, and while it works."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
    try:
        status = status_of(ENDED, str(seconds), when, str(int(signal.SIGINT)), folder=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not processes_of(tmp_path)
    assert (status, (tmp_path / "printed").read_text()) == (0, "interrupted\n")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("number", "when"), [(signal.SIGTERM, "early"), (signal.SIGKILL, "late")])
def test_nothing_is_printed_and_nothing_left_of_a_caller_that_is_killed(
    number: signal.Signals, when: str, tmp_path: Path
) -> None:
    assert status_of(ENDED, "0.5", when, str(int(number)), folder=tmp_path) == -number
    deadline = time.monotonic() + 30  # they end by themselves, soon
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of(tmp_path)
    assert (tmp_path / "printed").read_text() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_server_outlives_a_child_that_the_caller_forks(tmp_path: Path) -> None:
    assert status_of(FORKING, folder=tmp_path) == 0
    assert (tmp_path / "printed").read_text() == "0\nTrue\n"
    assert not processes_of(tmp_path)


def status_of(script: str, *arguments: str, folder: Path) -> int:
    """Of the script alone, not of what it leaves behind; what all of them print goes into a file."""
    (folder / "script.py").write_text(script)
    environment = os.environ | {"HOLDFAST_TEST_MARK": str(folder)}  # all that comes of it has it
    with (folder / "printed").open("w") as printed:
        command = [sys.executable, str(folder / "script.py"), *arguments]
        return subprocess.run(
            command, env=environment, stdout=printed, stderr=subprocess.STDOUT, timeout=200, check=False
        ).returncode


def processes_of(mark: Path) -> list[str]:
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HOLDFAST_TEST_MARK={mark}".encode() in environment.read_bytes():
                found.append((environment.parent / "cmdline").read_text())
        except OSError:  # it has ended, or is another's
            continue
    return found
