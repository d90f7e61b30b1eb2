"""Reading the rows of one local file, from any row on: parquet, JSON lines, JSON and text, compressed or not.

A reader yields `(place, row)`: `place` is where the row begins, an integer to start from again, and `row` is raw, so
that decoding costs time for those rows only that are wanted. Files are read as they are consumed, so memory does not
grow with them; only a .txt file (one document) and a .json file are read whole.
"""

import dataclasses
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["ENDINGS", "BadRow", "NoColumnError", "Reader", "no_column", "reader_of"]

BUFFER = 1 << 20  # bytes
ROWS_AT_ONCE = 256  # of a parquet file
NO_LIST = "a .json file must hold a list of objects; name a file of JSON lines .jsonl"


class NoColumnError(ValueError):
    """A file has no column of the name that was asked for."""


@dataclasses.dataclass(frozen=True)
class BadRow:
    """Stands for the text of a row that cannot be read, though the file around it can."""

    fault: str


@dataclasses.dataclass(frozen=True)
class Reader:
    """How files of one kind are read.

    Attributes:
        rows: the rows of a file, given its path, the column that holds the text, and the place to start at (0: the
            beginning). Raises ValueError or OSError when the file is damaged.
        text: the text of a row in that column: a string, or whatever stands there instead.
    """

    rows: Callable[[Path, str, int], Iterator[tuple[int, Any]]]
    text: Callable[[Any, str], Any]


def reader_of(path: Path) -> Reader | None:
    """The reader for a file of this name, None if there is none. Endings count in any case: `BOOK.TXT`."""
    return next((reader for ending, reader in READERS.items() if path.name.lower().endswith(ending)), None)


def no_column(column: str, columns: Iterable[str]) -> str:
    """What to say of a file without the column that should hold its text."""
    return f"it has no column {column!r}; give the column as one of {', '.join(columns)}."


def _parquet_rows(path: Path, column: str, place: int) -> Iterator[tuple[int, Any]]:
    with pq.ParquetFile(path, buffer_size=BUFFER) as file:
        if column not in file.schema_arrow.names:
            raise NoColumnError(no_column(column, file.schema_arrow.names))
        first = 0
        for group in range(file.num_row_groups):
            beyond = first + file.metadata.row_group(group).num_rows
            if beyond > place:  # other groups need not be read to be passed over
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column]):
                    skipped = min(max(0, place - first), len(batch))
                    yield from enumerate(_values(batch.column(0).slice(skipped)), first + skipped)
                    first += len(batch)
            first = beyond


def _values(array: pa.Array) -> list[Any]:
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [_decode(row) for row in array.cast(pa.binary()).to_pylist()]


def _decode(row: bytes | None) -> Any:
    try:
        return None if row is None else row.decode()
    except UnicodeDecodeError:
        return BadRow("not valid UTF-8")


def _lines(path: Path, column: str, place: int) -> Iterator[tuple[int, bytes]]:
    with _open(path) as file:
        _move(file, place)
        for line in file:
            if not line.isspace():
                yield place, line
            place += len(line)


def _open(path: Path) -> Any:
    ending = path.suffix.lower()
    if ending == ".gz":
        return gzip.open(path)
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd" if ending == ".zst" else None), BUFFER)


def _move(file: Any, place: int) -> None:
    """To byte `place` of the contents; what is compressed must be read to get there."""
    if file.seekable():
        file.seek(place)
        return
    while place:
        place -= len(file.read(min(place, BUFFER))) or place


def _line_text(line: bytes, column: str) -> Any:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return BadRow("not valid UTF-8")
    except ValueError:
        return BadRow("not valid JSON")
    except RecursionError:
        return BadRow("nested too deeply")
    return _field(row, column)


def _field(row: Any, column: str) -> Any:
    return row.get(column) if isinstance(row, dict) else BadRow("not a JSON object")


def _json_rows(path: Path, column: str, place: int) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # behind the first row
            raise ValueError(f"{NO_LIST} ({error})") from error
        raise
    except RecursionError as error:
        raise ValueError("a row is nested too deeply; in a file of JSON lines (.jsonl) it would be skipped") from error
    if not isinstance(rows, list):
        raise ValueError(NO_LIST)
    yield from enumerate(rows[place:], place)


def _whole_text(path: Path, column: str, place: int) -> Iterator[tuple[int, bytes]]:
    if place == 0:
        with _open(path) as file:
            yield 0, file.read()


_text_file = Reader(_whole_text, lambda row, column: _decode(row))
_json_lines = Reader(_lines, _line_text)
READERS = {
    ".parquet": Reader(_parquet_rows, lambda row, column: row),
    ".json": Reader(_json_rows, _field),
    **{f".jsonl{packed}": _json_lines for packed in ("", ".gz", ".zst")},
    **{f".txt{packed}": _text_file for packed in ("", ".gz", ".zst")},
}
ENDINGS = tuple(READERS)
