"""Freed memory stays with the process, unless its user has settings of their own."""

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from holdfast.cli import allocation, main


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What mallopt was asked for."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *given: calls.append(given)))
    for name in list(os.environ):
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES":
            monkeypatch.delenv(name)
    return calls


@pytest.mark.parametrize(("large", "unmapped"), [(False, (-3, 32 << 20)), (True, (-4, 0))])
def test_neither_mapped_one_by_one_nor_trimmed(
    large: bool, unmapped: tuple[int, int], asked: list[tuple[int, int]]
) -> None:
    allocation.keep_freed_memory(large=large)
    assert asked[:2] == [unmapped, (-1, -1)]


@pytest.mark.parametrize(
    ("command", "large"),
    [("train", True), ("bench ops", True), ("bench decode", False), ("generate", False), ("", False)],
)
def test_large_blocks_are_kept_where_no_cache_grows(command: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr("holdfast.cli.keep_freed_memory", lambda *, large: kept.append(large))
    assert main([*command.split(), "--help"]) == 0
    assert kept == [large]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not GNU's")
def test_large_blocks_are_used_again() -> None:
    """64 MiB are 16,384 pages; a fresh block would have to be given every one of them."""
    program = (
        "import resource; from holdfast.cli.allocation import keep_freed_memory; keep_freed_memory(large=True)\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(2):\n"  # the first is as the system gave it, zero already, and so not touched
        "    block = bytes(64 << 20); del block\n"
        "before = faults()\n"
        "for _ in range(5):\n"
        "    block = bytes(64 << 20); del block\n"
        "print(faults() - before)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert int(found.stdout) < 1_000


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_settings_of_the_user_hold(name: str, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    allocation.keep_freed_memory()
    assert asked == []


def test_other_c_libraries_are_left_alone(asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: (looked.append(_), SimpleNamespace())[1])
    allocation.keep_freed_memory()
    assert looked == [None]
    assert asked == []
