"""Where text comes from: local files or the Hugging Face hub, row by row, in parts, from any row on."""

import collections
import contextlib
import copy
import itertools
import json
import logging
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from holdfast.data.hub import fail_fast_offline
from holdfast.data.readers import ENDINGS, BadRow, NoColumnError, no_column, reader_of
from holdfast.data.splits import files_of_split
from holdfast.files import UnreadableError

__all__ = [
    "HubText",
    "LocalText",
    "TextSource",
    "count_bad_rows",
    "describe_skipped",
    "is_missing",
    "load_text",
    "usable",
]

logger = logging.getLogger(__name__)

USUAL_FOLDERS = ("data", "datasets", "corpora", "corpus")
"""That hold text on a disk and are no owner of data sets that anyone would mean."""
ROWS_TO_FIND_THE_COLUMN = 100
READ_ERRORS = (OSError, EOFError, ValueError, pa.ArrowException, zlib.error)


class TextSource(Protocol):
    """The rows of a corpus. Iterating gives what stands in the text column, rows that hold no text included."""

    @property
    def name(self) -> str:
        """The path, or the name on the hub."""

    @property
    def files(self) -> int:
        """Number of files (or of the hub's shards) that can be read apart."""

    @property
    def fingerprint(self) -> str:
        """Another one when the corpus has changed, as far as names and sizes tell."""

    def rows(self, part: int = 0, parts: int = 1, start: Any = None) -> Iterator[tuple[Any, Any]]:
        """`(place, value)` of the rows of one of `parts` disjoint parts, which together are the corpus.

        A part is every `parts`-th file, or every `parts`-th row where there are fewer files than parts (then every part
        reads all files, and decodes its own rows only).

        Args:
            start: a place, to begin with the row that stands there; None: the beginning. Places are plain values, ready
                for JSON.

        Raises:
            UnreadableError: naming the file that cannot be read.
        """

    def __iter__(self) -> Iterator[Any]:
        """The values of all rows, in order; any number of times."""


def load_text(
    path_or_hub_name: str | Path, *, split: str | None = "train", text_column: str = "text", config: str | None = None
) -> TextSource:
    """Open a corpus: a local file, a directory of files, or a data set on the Hugging Face hub, which is streamed.

    Args:
        path_or_hub_name: a .parquet, .jsonl or .json file (one document per row) or a .txt file (one document),
            .jsonl and .txt also as .gz or .zst; a directory of them, at any depth; or the name of a data set.
        split: a file is read whole, whatever its name. In a directory, the files are read whose path tells this split
            (`train.parquet`, `validation/17.txt`; the rule is that of `holdfast.data.splits`); where no path tells a
            split, all are `train`. None: all files of a directory, whatever their names. On the hub it is a split of
            that data set.
        text_column: the column that holds the text.
        config: configuration of a hub data set, such as `sample-100BT`.

    Raises:
        FileNotFoundError: the path does not exist.
        UnreadableError: a file is damaged.
        ValueError: the file type is unknown, there is no such split (or None for a data set of the hub), the data set
            cannot be read, or its rows have no such column.
    """
    name = str(path_or_hub_name)
    path = Path(name).expanduser()
    if path.exists():
        if config is not None:
            raise ValueError(
                f"{name} is local, but config is {config!r}; that is for data sets of the hub: leave it out."
            )
        return LocalText(name, _local_files(path, split), text_column)
    if is_missing(name):
        raise FileNotFoundError(
            f"{name} does not exist; give a file, a directory of text files or the name of a hub data set."
        )
    if split is None:
        raise ValueError(f"{name} is a data set of the hub; give one of its splits.")
    return HubText(name, split, text_column, config)


def is_missing(name: str) -> bool:
    """Whether this can only be a path, not a data set of the hub, and nothing lies there."""
    return not Path(name).expanduser().exists() and _looks_local(name)


def _looks_local(name: str) -> bool:
    """Whether a name at which nothing lies is that of a path, and not of a data set on the hub: `owner/name`."""
    path = Path(name).expanduser()
    if (
        path.name.lower().endswith(ENDINGS)
        or name.startswith(("/", ".", "~"))
        or name.endswith("/")
        or name.strip("/").count("/") > 1
    ):
        return True
    # data/books is a missing folder where there is a folder data, or where the hub could not have such an owner.
    return "/" in name and (path.parent.is_dir() or path.parent.name in USUAL_FOLDERS)


class LocalText:
    """A `TextSource` of local files.

    Args:
        name: what errors call it.
        files: paths, each of a kind that `holdfast.data.readers` knows.
        column: the column that holds the text.

    Raises:
        ValueError: none of the first rows has that column, or they cannot be read.
    """

    def __init__(self, name: str, files: list[Path], column: str) -> None:
        self.name = name
        self.paths = files
        self.column = column
        _check_column(files[0], column)

    @property
    def files(self) -> int:
        return len(self.paths)

    @property
    def size(self) -> int:
        """Bytes of all files, as they are stored."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def fingerprint(self) -> str:
        listing = json.dumps([(path.name, path.stat().st_size) for path in self.paths])
        return f"{len(self.paths)} files, {self.size} bytes, {zlib.crc32(listing.encode()):08x}"

    def check(self) -> None:
        """Begin to read every file, so that one that cannot be read shows before hours of work.

        Raises:
            UnreadableError: naming the file.
        """
        for path in self.paths:
            reader = reader_of(path)
            assert reader is not None
            next(_naming(path, reader.rows(path, self.column, 0)), None)

    def rows(self, part: int = 0, parts: int = 1, start: Any = None) -> Iterator[tuple[Any, Any]]:
        first, place, row = start or (0, 0, 0)
        by_file = self.files >= parts
        for index in range(first, self.files):
            if by_file and index % parts != part:
                continue
            path = self.paths[index]
            reader = reader_of(path)
            assert reader is not None
            for at, raw in _naming(path, reader.rows(path, self.column, place)):
                if by_file or row % parts == part:
                    yield [index, at, row], reader.text(raw, self.column)
                row += 1
            place = 0

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in self.rows())


class HubText:
    """A `TextSource` of a data set that `datasets` streams.

    Args:
        path: what `datasets.load_dataset` takes: a name on the hub, or a directory.
        split, column, config: as for `load_text`.

    Raises:
        ValueError: it cannot be read, or has no such column.
    """

    def __init__(self, path: str, split: str, column: str, config: str | None = None) -> None:
        from datasets import load_dataset  # takes a second to import

        self.name = path
        self.column = column
        self._what = f"{path} (split {split})"
        local = Path(path).exists()
        try:
            with contextlib.nullcontext() if local else fail_fast_offline():
                dataset = load_dataset(path, name=config, split=split, streaming=True)
                columns = dataset.column_names or list(next(iter(dataset), {}))
        except Exception as error:  # of the network, the hub, the file format
            nothing = "" if local else f"nothing lies at the path {path}, and as a data set of the hub "
            raise ValueError(f"{nothing}cannot read {self._what}: {error}") from error
        if column not in columns:
            raise ValueError(f"cannot read {self._what}: {no_column(column, columns)}")
        self._dataset = dataset.select_columns([column])
        self.files = self._dataset.num_shards
        self.fingerprint = f"{path}, {config}, {split}, {self.files} files"

    def rows(self, part: int = 0, parts: int = 1, start: Any = None) -> Iterator[tuple[Any, Any]]:
        by_file = self.files >= parts
        # A part of one is the whole, but with a position of its own; copies share theirs.
        dataset = self._dataset.shard(*((parts, part) if by_file else (1, 0)), contiguous=False)
        state, row = start or (None, 0)
        # Copied in and out: `datasets` goes on counting in the dictionary that it is given.
        if state is not None:
            dataset.load_state_dict(copy.deepcopy(state))
        before = copy.deepcopy(state or dataset.state_dict())
        for values in _naming(self._what, iter(dataset), (Exception,)):  # of the network, of the files' formats
            if by_file or row % parts == part:
                yield [before, row], values[self.column]
            before = dataset.state_dict()
            row += 1

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in self.rows())


def usable(rows: Iterable[tuple[Any, Any]], skipped: collections.Counter[str]) -> Iterator[tuple[Any, str]]:
    """The rows that hold text; the others are counted in `skipped`, by what is wrong with them."""
    for place, value in rows:
        fault = _fault(value)
        if fault is None:
            yield place, value
        else:
            skipped[fault] += 1


def count_bad_rows(texts: Iterable[Any]) -> Iterator[str]:
    """The texts among `texts`; says once, at the end, how many were no text and why, and where if it is a corpus."""
    rows = texts.rows() if isinstance(texts, LocalText | HubText) else ((None, text) for text in texts)
    skipped: collections.Counter[str] = collections.Counter()
    first: Any = None
    try:
        for place, value in rows:
            fault = _fault(value)
            if fault is None:
                yield value
            else:
                skipped[fault] += 1
                first = first or place
    finally:  # also when the reader had enough and stopped early
        if skipped:
            corpus = "" if first is None else f"{texts.name}: "  # type: ignore[attr-defined]
            file = f"; the first in {texts.paths[first[0]]}" if isinstance(texts, LocalText) and texts.files > 1 else ""
            logger.warning("%s%s%s", corpus, describe_skipped(skipped), file)


def describe_skipped(skipped: collections.Counter[str]) -> str:
    """One line: how many rows hold no text, and why."""
    reasons = ", ".join(f"{count} {fault}" for fault, count in skipped.most_common())
    return f"skipped {skipped.total()} rows that hold no text: {reasons}"


def _fault(text: Any) -> str | None:
    if isinstance(text, BadRow):
        return text.fault
    if text is None:
        return "without text"
    if not isinstance(text, str):
        return "not of type str"
    if not text:
        return "empty"
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return "not valid Unicode"
    return None


def _local_files(path: Path, split: str | None) -> list[Path]:
    if path.is_dir():
        return files_of_split(path, split)
    if reader_of(path) is None:
        raise ValueError(f"{path} is of an unknown type; give a {', '.join(ENDINGS)} file.")
    return [path]


def _check_column(path: Path, column: str) -> None:
    """Raise when nothing in the first rows is called `column`, which is not a fault of single rows then."""
    reader = reader_of(path)
    if reader is None:
        raise ValueError(f"{path} is of an unknown type; give a {', '.join(ENDINGS)} file.")
    names: dict[str, None] = {}
    for _, row in itertools.islice(_naming(path, reader.rows(path, column, 0)), ROWS_TO_FIND_THE_COLUMN):
        if isinstance(reader.text(row, column), str):
            return
        names |= dict.fromkeys(_names(row))
    if names and column not in names:
        raise ValueError(f"cannot read {path}: {no_column(column, names)}")


def _names(row: Any) -> list[str]:
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError):
            return []
    return list(row) if isinstance(row, dict) else []


def _naming(what: Path | str, rows: Iterator[Any], errors: tuple[type[Exception], ...] = READ_ERRORS) -> Iterator[Any]:
    """`rows`, whose errors say what cannot be read."""
    try:
        yield from rows
    except errors as error:
        kind = ValueError if isinstance(error, NoColumnError) else UnreadableError  # the column was asked for
        raise kind(f"cannot read {what}: {' '.join(str(error).split()) or type(error).__name__}") from error
