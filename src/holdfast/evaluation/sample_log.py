"""The answers of a run, one JSON line each: an interrupted run continues, and every answer can be read afterwards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.files import UnreadableError

__all__ = ["SampleLog", "file_hash", "model_fingerprint", "text_fingerprint"]


class SampleLog:
    """Records of answered samples by name, read from and appended to a file of JSON lines.

    A record belongs to a run, which a hash of what determines the answers names. So one file can hold several models
    and settings, an answer is never taken for another's, and asking for more samples answers only those that are new.

    Args:
        path: the file; made when the first record comes. None: nothing is read or kept.
        determines: plain values that the answers follow from, such as the settings and the `model_fingerprint`.

    Attributes:
        records: what this run has answered so far, by sample.

    Raises:
        UnreadableError: if the file holds something else. A line cut off at its end, as a killed run leaves it, is
            dropped.
    """

    def __init__(self, path: str | os.PathLike[str] | None, determines: Mapping[str, Any]) -> None:
        text = json.dumps(determines, sort_keys=True, default=str)
        self.run = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = None if path is None else Path(path)
        self.records: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def append(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep records by sample, plain values; they are in the file when this returns."""
        self.records |= {sample: dict(record) for sample, record in records.items()}
        if self.path is None:
            return
        lines = [{"run": self.run, "sample": sample, **record} for sample, record in records.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        with path.open("r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            for number, line in enumerate(content[:whole].splitlines(), start=1):
                record = _parsed(line)
                if record is None:
                    advice = "remove that line, or give another file"
                    raise UnreadableError(f"line {number} of {path} is no answer of an evaluation; {advice}.")
                if record.pop("run") == self.run:
                    self.records[record.pop("sample")] = record
            file.truncate(whole)


def model_fingerprint(directory: str | os.PathLike[str]) -> str:
    """A hash that tells the model saved in `directory` from others, wherever it is copied to.

    It reads all that answers depend on: configuration, tokenizer, recipe (which knows the task), and every weight: a
    few of them may have been trained and the rest not. O(bytes), about a second per GB.
    """
    digest = hashlib.sha256()
    folder = Path(directory)
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "recipe.toml", "*.safetensors")
    for path in sorted(found for name in names for found in folder.glob(name)):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(bytes.fromhex(file_hash(path) or ""))
    return digest.hexdigest()[:16]


def text_fingerprint(source: str) -> str:
    """Another one when a text has other contents: of a file, or of all files of a directory by their paths in it.

    It reads them all; O(bytes). A name on the hub stands for itself.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return f"{path.name.partition('.')[2].lower()} {file_hash(path)}"  # by their endings files are read differently
    if not path.is_dir():
        return source
    digest = hashlib.sha256()
    for file in sorted(found for found in path.rglob("*") if found.is_file()):
        digest.update(f"{file.relative_to(path)} {file_hash(file)}\n".encode())
    return digest.hexdigest()


def file_hash(path: str | os.PathLike[str]) -> str | None:
    """SHA-256 of a file's bytes; None where there is no file."""
    if not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"run", "sample"} <= record.keys() else None
