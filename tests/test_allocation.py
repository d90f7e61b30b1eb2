"""Freed memory stays with the process, unless its user has settings of their own."""

import ctypes
import os
from types import SimpleNamespace

import pytest

from holdfast.cli import allocation


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What mallopt was asked for."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *given: calls.append(given)))
    for name in list(os.environ):
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES":
            monkeypatch.delenv(name)
    return calls


def test_blocks_of_up_to_32_mib_are_kept(asked: list[tuple[int, int]]) -> None:
    allocation.keep_freed_memory()
    assert (-3, 32 << 20) in asked
    assert (-1, 2**31 - 1) in asked


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
