"""What long work shows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from holdfast.data import progress
from holdfast.data.progress import track


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    now = iter(range(0, 9000, 1000))  # two readings of the clock for each line, and one before
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == [
        "letters: 0 of 3",
        "letters: 1 of 3, about 2:13:20 left",  # 4,000 s for the first
        "letters: 2 of 3, about 0:50:00 left",  # 6,000 s for two
    ]
    monkeypatch.undo()
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    assert list(track(iter("ab"), "letters")) == ["a", "b"]
    assert capsys.readouterr().err.splitlines() == ["letters: 0", "letters: 1"]


def test_short_work_and_silence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    assert list(track("abc", "letters", progress=False)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
