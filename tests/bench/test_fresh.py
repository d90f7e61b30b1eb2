"""Calls in new processes, and what is left of them after an interrupt."""

import operator
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.bench.fresh import _Server, call_in_new_process

INTERRUPTED = """
import os, signal, sys, threading, time
from holdfast.bench.fresh import call_in_new_process
if __name__ == "__main__":
    if sys.argv[2] == "late":
        call_in_new_process(abs, -1)
    try:
        threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGINT)).start()
        call_in_new_process(time.sleep, 100)
    except KeyboardInterrupt:
        print("interrupted")
"""


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("seconds", "when"), [(0.01, "early"), (0.5, "late")])
def test_nothing_is_printed_and_nothing_left_after_an_interrupt(seconds: float, when: str, tmp_path: Path) -> None:
    """While the process starts, and while it works."""
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
    try:
        command = [sys.executable, str(script), str(seconds), when]
        environment = os.environ | {"HOLDFAST_TEST_MARK": str(tmp_path)}  # all that comes of it has it
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (finished.stdout, finished.stderr, finished.returncode) == ("interrupted\n", "", 0)
    assert not processes_of(tmp_path)


def processes_of(mark: Path) -> list[str]:
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HOLDFAST_TEST_MARK={mark}".encode() in environment.read_bytes():
                found.append((environment.parent / "cmdline").read_text())
        except OSError:  # it has ended, or is another's
            continue
    return found
