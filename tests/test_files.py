"""Files that are whole or not there, and errors that say where."""

import errno
from pathlib import Path

import pytest

from holdfast.files import naming, replacing, write_files


def test_files_come_together_or_not_at_all(tmp_path: Path) -> None:
    def save(folder: str) -> None:
        Path(folder, "a.json").write_text("new")
        Path(folder, "b.json").write_text("new")

    def fail(folder: str) -> None:
        Path(folder, "a.json").write_text("half")
        raise Exception("No space left on device (os error 28)")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.json").write_text("old")
    with pytest.raises(OSError, match=r"out cannot be written \(No space left on device \(os error 28\)\)"):
        write_files(tmp_path / "out", fail)
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"a.json": "old"}
    write_files(tmp_path / "out", save)
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"a.json": "new", "b.json": "new"}


def test_a_full_disk_says_which_file(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"),
        naming(tmp_path / "metrics.jsonl"),
    ):
        raise full
    with pytest.raises(OSError, match=r"No space left on device: '.*run\.json'"), replacing(tmp_path / "run.json"):
        raise full
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"'other'"), naming(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "other")
    with pytest.raises(ConnectionResetError, match=r"^\[Errno \d+\] reset by peer$"), naming(tmp_path):
        raise ConnectionResetError(errno.ECONNRESET, "reset by peer")  # of what was being read
