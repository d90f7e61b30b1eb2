"""What long work shows."""

from __future__ import annotations

import pytest

from holdfast.data import progress
from holdfast.data.progress import track


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == [f"letters: {done} of 3" for done in range(3)]
    assert list(track(iter("ab"), "letters")) == ["a", "b"]
    assert capsys.readouterr().err.splitlines() == ["letters: 0", "letters: 1"]


def test_short_work_and_silence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    assert list(track("abc", "letters", progress=False)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
