"""Prepared text: a corpus tokenized once, in files that training maps into memory.

A directory holds, for each split S, the description `S.json` and shards of two files each:

    S-00000.tokens.bin   the token ids of all documents, one behind the other, an end token behind each
    S-00000.starts.bin   for each document the index in there at which it starts, 64 bits

All numbers are unsigned and little-endian; ids have 16 bits where the vocabulary allows, else 32. `S.json` gives
`format`, `dtype` (of the ids), `vocab_size`, `eos_token_id`, `tokenizer` (SHA-256 of its definition), `source`,
`skipped` (rows without text) and `shards`: for each its `name`, `tokens`, `documents`, and `crc32` of the two files in
this order. It is written last, so a directory without it was not finished. The tokenizer itself stands beside, as
transformers saves it.
"""

import collections
import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout
from torch.utils.data import ConcatDataset
from transformers import PreTrainedTokenizerFast

from holdfast.data.packing import PackedText
from holdfast.data.processes import in_processes
from holdfast.data.progress import track
from holdfast.data.sources import TextSource, describe_skipped, logger, usable
from holdfast.data.tokenizers import encode_documents, fingerprint
from holdfast.files import UnreadableError, locked, naming, replacing, write_files, write_json

__all__ = ["PreparedSplit", "check_target", "is_prepared", "open_prepared", "prepare"]

FORMAT = 1
CHECKED = 1 << 30  # bytes of a split that are read through when it is opened
CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """What `prepare` has written.

    Attributes:
        tokens: of all documents, end tokens included.
        documents: their number.
        bytes: of the files with token ids.
        skipped: rows without text, by what is wrong with them.
    """

    tokens: int
    documents: int
    bytes: int
    skipped: dict[str, int]


def prepare(
    source: TextSource,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    split: str = "train",
    workers: int = 1,
    progress: bool = True,
) -> PreparedSplit:
    """Tokenize a corpus into a directory that `open_prepared` reads; other splits may stand in it already.

    Each worker writes one shard. Memory O(workers), whatever the size of the corpus. Shards that an attempt has left
    which did not come to its end are removed, here if it can be and else by the next attempt.

    Args:
        source: the corpus, from `load_text`.
        directory: made if it is missing.
        tokenizer: gives the end token between documents.
        split: what this part of the data is called.
        workers: processes that read and tokenize.
        progress: show a progress bar when standard error is a terminal.

    Raises:
        ValueError: the corpus cannot be read or holds no text; or as `check_target` does.
        RuntimeError: a worker was killed, for want of memory perhaps.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; give 1 or more.")
    target = Path(directory)
    check_target(target, split, tokenizer)
    target.mkdir(parents=True, exist_ok=True)
    with _alone(target, split):
        check_target(target, split, tokenizer)  # another may have written it meanwhile
        _discard_shards(target, split)
        try:
            shards = _write_shards(source, target, tokenizer, split, workers, progress)
            skipped = sum((collections.Counter(shard.pop("skipped")) for shard in shards), collections.Counter())
            if skipped:
                logger.warning("%s: %s", source.name, describe_skipped(skipped))
            shards = [shard for shard in shards if shard["tokens"]]
            if not shards:
                raise ValueError(f"{source.name} holds no text.")
            write_files(target, tokenizer.save_pretrained)
            _describe(source, target, tokenizer, split, shards, skipped)
        except BaseException:  # an interruption too
            _discard_shards(target, split)
            raise
    tokens = sum(shard["tokens"] for shard in shards)
    size = tokens * _dtype(tokenizer).itemsize
    return PreparedSplit(tokens, sum(shard["documents"] for shard in shards), size, dict(skipped))


def check_target(directory: str | Path, split: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise where `prepare` could not write this split.

    Raises:
        ValueError: the directory holds this split already, or another split with another tokenizer; it is no directory;
            the split's name is none for a file; or the tokenizer has no end token.
    """
    target = Path(directory)
    if not split.isidentifier():
        raise ValueError(f"split is {split!r}; give a name of letters, digits and underscores.")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token.")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give a directory.")
    if is_prepared(target, split):
        raise ValueError(f"{target} holds a prepared split {split!r} already; remove it, or give another directory.")
    for path in target.glob("*-00000.tokens.bin"):
        other = path.name.removesuffix("-00000.tokens.bin")
        if is_prepared(target, other) and read_description(target, other)["tokenizer"] != fingerprint(tokenizer):
            raise ValueError(f"{target} holds the split {other!r} with another tokenizer; give another directory.")


def _describe(
    source: TextSource,
    target: Path,
    tokenizer: PreTrainedTokenizerFast,
    split: str,
    shards: list[dict[str, Any]],
    skipped: collections.Counter[str],
) -> None:
    """Write the description, by which the split is whole."""
    description = {
        "format": FORMAT,
        "dtype": _dtype(tokenizer).name,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "tokenizer": fingerprint(tokenizer),
        "source": source.name,
        "skipped": dict(skipped),
        "shards": shards,
    }
    write_json(target / f"{split}.json", description)


def is_prepared(directory: str | Path, split: str | None = None) -> bool:
    """Whether `prepare` has written this split, or any, to the directory."""
    found = Path(directory).glob("*.json") if split is None else [Path(directory) / f"{split}.json"]
    return any(path.is_file() and path.with_name(f"{path.stem}-00000.tokens.bin").is_file() for path in found)


def open_prepared(
    directory: str | Path, length: int, *, split: str = "train", isolate: bool = False, check: bool | None = None
) -> ConcatDataset:
    """Blocks of a prepared corpus, as a map-style dataset of `PackedText`s whose tokens stay on the disk.

    Blocks do not cross from one shard into the next. Opening takes no time, but for the checksums.

    Args:
        directory: written by `prepare`.
        length: tokens per block.
        split: one that has been prepared.
        isolate: as for `PackedText`.
        check: compare the checksums, for which all is read once; None: of splits up to 1 GiB.

    Raises:
        FileNotFoundError: this split has not been prepared.
        UnreadableError: naming the file that is damaged.
        ValueError: the split has not enough text for one block.
    """
    folder = Path(directory)
    description = read_description(folder, split)
    dtype = np.dtype(description["dtype"]).newbyteorder("<")
    total = sum(shard["tokens"] for shard in description["shards"])
    check = total * dtype.itemsize <= CHECKED if check is None else check
    parts = []
    for shard in description["shards"]:
        tokens = _map(folder / f"{shard['name']}.tokens.bin", dtype, shard["tokens"], shard["crc32"][0], check)
        starts = _map(
            folder / f"{shard['name']}.starts.bin", np.dtype("<i8"), shard["documents"], shard["crc32"][1], check
        )
        if shard["tokens"] >= length:
            parts.append(PackedText(tokens, starts, length, isolate=isolate))
    if not parts:
        raise ValueError(f"{folder} (split {split}) has {total} tokens, too few for a block of {length} in any shard.")
    return ConcatDataset(parts)


@contextlib.contextmanager
def _alone(target: Path, split: str) -> Iterator[None]:
    """One process at a time writes a split."""
    try:
        with locked(target / f".{split}.lock"):
            yield
    except Timeout as error:
        raise ValueError(f"another process is preparing the split {split!r} in {target}: wait, or stop it.") from error


def _dtype(tokenizer: PreTrainedTokenizerFast) -> np.dtype:
    return np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")


def _discard_shards(target: Path, split: str) -> None:
    """Remove what an attempt has left that did not come to its end, temporary files among them (`replacing`)."""
    for pattern in (f"{split}-*.tokens.bin", f"{split}-*.starts.bin", f".{split}-*.bin"):
        for path in target.glob(pattern):
            path.unlink(missing_ok=True)


def _write_shards(
    source: TextSource, target: Path, tokenizer: PreTrainedTokenizerFast, split: str, workers: int, progress: bool
) -> list[dict[str, Any]]:
    """What `_write_shard` returns, of one part of the corpus for each worker."""
    tasks = [(source, target, tokenizer, split, part, workers) for part in range(workers)]
    shards: list[dict[str, Any]] = []

    def documents() -> Generator[None, None, None]:
        if workers == 1:
            shards.append((yield from _write_shard(*tasks[0])))
        else:
            shards.extend((yield from in_processes(_write_shard, tasks)))

    with contextlib.closing(documents()) as done:
        for _ in track(done, f"{split}: documents", progress=progress):
            pass
    return shards


def _write_shard(
    source: TextSource, target: Path, tokenizer: PreTrainedTokenizerFast, split: str, part: int, parts: int
) -> Generator[None, None, dict[str, Any]]:
    """Tokenize one part of the corpus; returns its entry in the description, and what it skipped.

    Yields None for every document that is written.
    """
    if parts > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    name, dtype = f"{split}-{part:05d}", _dtype(tokenizer)
    skipped: collections.Counter[str] = collections.Counter()
    total = count = 0
    checksums = [0, 0]
    with (
        replacing(target / f"{name}.tokens.bin") as tokens_path,
        replacing(target / f"{name}.starts.bin") as starts_path,
        naming(target),
        open(tokens_path, "wb") as tokens_file,
        open(starts_path, "wb") as starts_file,
    ):
        for _, tokens in encode_documents(usable(source.rows(part, parts), skipped), tokenizer):
            for number, (file, data) in enumerate(
                ((tokens_file, tokens.astype(dtype).tobytes()), (starts_file, total.to_bytes(8, "little")))
            ):
                file.write(data)
                checksums[number] = zlib.crc32(data, checksums[number])
            total += len(tokens)
            count += 1
            yield
    return {"name": name, "tokens": total, "documents": count, "crc32": checksums, "skipped": dict(skipped)}


def read_description(folder: Path, split: str) -> dict[str, Any]:
    """What `prepare` has written about a split: its `shards` with their checksums, among others.

    Raises:
        FileNotFoundError: this split has not been prepared.
        UnreadableError: the description cannot be read, or is of another version.
    """
    path = folder / f"{split}.json"
    if not is_prepared(folder, split):
        raise FileNotFoundError(f"{folder} holds no prepared split {split!r}; make it with `holdfast prepare`.")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableError(f"{path} does not describe prepared text; prepare it again.") from error
    if version != FORMAT:
        raise UnreadableError(f"{path} has the format {version}, not {FORMAT}; prepare it again.")
    return description


def _map(path: Path, dtype: np.dtype, count: int, checksum: int, check: bool) -> np.ndarray:
    """The numbers in a file, not read yet; raises UnreadableError when they are not those that were written."""
    size = path.stat().st_size if path.is_file() else 0
    if size != count * dtype.itemsize:
        raise UnreadableError(
            f"{path} has {size} bytes, not {count * dtype.itemsize}: it is damaged; prepare it again."
        )
    if check and _checksum(path) != checksum:
        raise UnreadableError(f"{path} is damaged (its checksum differs); prepare it again.")
    return np.memmap(path, dtype=dtype, mode="r")


def _checksum(path: Path) -> int:
    checksum = 0
    for data in _chunks(path):
        checksum = zlib.crc32(data, checksum)
    return checksum


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            yield data
