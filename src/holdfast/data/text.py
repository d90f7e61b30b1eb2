"""Real text: read it, make tokens of it, pack the tokens into blocks of one length, in memory.

texts = load_text("books/", split="train")
tokenizer = load_tokenizer("byte")
blocks = PackedText.from_texts(texts, tokenizer, length=512)
blocks[0]["input_ids"]  # int64 [512]
"""

import collections
import copy
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from holdfast.data.progress import track

__all__ = [
    "PackedText",
    "TextDocuments",
    "byte_tokenizer",
    "collate_isolated",
    "load_text",
    "load_tokenizer",
    "pack",
    "train_tokenizer",
]

logger = logging.getLogger(__name__)

IGNORED = -100  # the label that transformers' losses leave out
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
SPECIAL_TOKENS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
CHARACTERS_AT_ONCE = 1 << 20  # tokenized per call: enough to keep every core busy, little memory


def load_text(
    path_or_hub_name: str | Path,
    *,
    split: str = "train",
    text_column: str = "text",
    config: str | None = None,
    streaming: bool = True,
) -> "TextDocuments":
    """Open a corpus: a local file, a directory of files, or a dataset on the Hugging Face hub.

    Args:
        path_or_hub_name: a .parquet, .jsonl, .json or .txt file (one document per row; a .txt file is one document), a
            directory of them, or the name of a dataset on the hub.
        split: a file is read whole, whatever its name; in a directory this is the part of the file names that says the
            split (`train.parquet`); on the hub it is the split of that dataset.
        text_column: the column that holds the text.
        config: configuration of a hub dataset, such as `sample-100BT`.
        streaming: read while iterating. Otherwise `datasets` makes a copy in its cache first.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the file type is unknown, the corpus cannot be read, or it has no such column.
    """
    source = str(path_or_hub_name)
    path = Path(source).expanduser()
    arguments = {"split": split, "streaming": streaming, **_reader_arguments(path, source, split)}
    if config is not None:
        arguments["name"] = config
    from datasets import load_dataset  # takes a second to import, and only this function needs it

    try:
        dataset = load_dataset(**arguments)
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except Exception as error:
        raise ValueError(f"cannot read {source} (split {split}): {error}") from error
    if columns and text_column not in columns:
        raise ValueError(f"{source} has no column {text_column!r}; give text_column as one of {', '.join(columns)}.")
    return TextDocuments(dataset, source, text_column)


class TextDocuments:
    """The texts of a corpus, in order; iterate as often as you like. Rows that hold no text come as they are.

    Attributes:
        dataset: the underlying `datasets.Dataset` or `datasets.IterableDataset`.
        source: the path or the name on the hub.
    """

    def __init__(self, dataset: Any, source: str, text_column: str) -> None:
        self.dataset = dataset
        self.source = source
        self._column = text_column

    def __iter__(self) -> Iterator[Any]:
        try:
            for row in self.dataset.select_columns([self._column]):
                yield row[self._column]
        except Exception as error:
            raise ValueError(f"cannot read {self.source}: {error}") from error


class PackedText(Dataset):
    """Blocks of one length cut from a token stream, as a map-style dataset.

    Every document ends with the end token and the next follows at once; a rest shorter than a block is left out. Two
    bytes a token for vocabularies up to 65,536, else four.

    Args:
        tokens: the stream, integers [N].
        starts: where in the stream documents start, rising integers.
        length: tokens per block L.
        isolate: see `__getitem__`.

    Raises:
        ValueError: `length` is below 2, or the stream is shorter than one block.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, length: int, *, isolate: bool = False) -> None:
        if length < 2:
            raise ValueError(f"length is {length}; give at least 2, for a token to predict and one to predict it from.")
        if len(tokens) < length:
            raise ValueError(
                f"the text has {len(tokens)} tokens, fewer than one block of length {length}; "
                "give more text or a smaller length."
            )
        self.tokens = tokens
        self.starts = starts
        self.length = length
        self.isolate = isolate

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[Any],
        tokenizer: PreTrainedTokenizerFast,
        length: int,
        *,
        isolate: bool = False,
        max_tokens: int | None = None,
        progress: bool = True,
    ) -> "PackedText":
        """Tokenize and pack texts. Rows that are no text are skipped, and counted in one warning.

        A text never yields special tokens: one that contains `<|eos|>` is encoded character by character there.

        Args:
            texts: documents, such as those of `load_text`.
            tokenizer: gives the end token between documents.
            length: tokens per block L.
            isolate: see `__getitem__`.
            max_tokens: stop reading after about as many tokens; None reads everything.
            progress: show a progress bar when standard error is a terminal.

        Raises:
            ValueError: the tokenizer has no end token, or there is not enough text for one block.
        """
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; set tokenizer.eos_token.")
        documents = _tokenize(track(texts, "tokenizing", progress=progress), tokenizer)
        if max_tokens is not None:
            documents = _first(documents, max_tokens)
        return pack(documents, length, eos_token_id=tokenizer.eos_token_id, isolate=isolate)

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One block: `input_ids` and `labels`, int64 [L].

        With `isolate`, also `cu_seqlens`, int64 [documents + 1]: the offsets in the block at which its documents start,
        and L. Labels are −100 at those starts, since nothing before them may be used to predict them. Batch such blocks
        with `collate_isolated`.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} is out of range; this text has {len(self)} blocks.")
        first = (index % len(self)) * self.length
        input_ids = torch.from_numpy(self.tokens[first : first + self.length].astype(np.int64))
        block = {"input_ids": input_ids, "labels": input_ids.clone()}
        if self.isolate:
            inside = np.searchsorted(self.starts, [first + 1, first + self.length])
            offsets = torch.tensor([0, *(self.starts[slice(*inside)] - first), self.length])
            block["labels"][offsets[:-1]] = IGNORED
            block["cu_seqlens"] = offsets
        return block


def pack(
    documents: Iterable[Sequence[int] | np.ndarray], length: int, *, eos_token_id: int, isolate: bool = False
) -> PackedText:
    """Pack token sequences into blocks of `length`, an end token behind each; empty sequences are left out."""
    pieces: list[np.ndarray] = []
    starts: list[int] = []
    total = 0
    for document in documents:
        if len(document) == 0:
            continue
        starts.append(total)
        pieces.append(np.append(np.asarray(document, dtype=np.int32), np.int32(eos_token_id)))
        total += len(pieces[-1])
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
    if total and tokens.max() <= np.iinfo(np.uint16).max:
        tokens = tokens.astype(np.uint16)
    return PackedText(tokens, np.array(starts, dtype=np.int64), length, isolate=isolate)


def collate_isolated(blocks: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join B blocks of an isolating `PackedText` into one row, as packed sequences are given to a model.

    Returns:
        `input_ids` and `labels`, int64 [1, B·L], and `cu_seqlens`, int64 [documents + 1], that ends with B·L.
    """
    joined = {name: torch.cat([block[name] for block in blocks]).unsqueeze(0) for name in ("input_ids", "labels")}
    lengths = torch.cat([block["cu_seqlens"].diff() for block in blocks])
    joined["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return joined


def load_tokenizer(name_or_directory: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer called `byte`, one saved in a directory, or one of the hub.

    Raises:
        ValueError: it cannot be loaded, or is not of the fast kind.
    """
    name = str(name_or_directory)
    if name == "byte":
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(f"cannot load tokenizer {name}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer {name} is not a fast tokenizer; give one that has a tokenizer.json.")
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, its id the byte; 256 pad, 257 bos, 258 eos. Needs no download and loses nothing."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _finish(tokenizer)


def train_tokenizer(texts: Iterable[Any], vocab_size: int, *, progress: bool = True) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; save it with `save_pretrained`. Rows that are no text are skipped.

    Ids: 0 pad, 1 bos, 2 eos, then the 256 bytes, then the merges. Loses nothing, whatever the text.

    Args:
        texts: documents to learn from.
        vocab_size: number of ids, special tokens included; fewer when the texts have no more to merge.
        progress: show a progress bar when standard error is a terminal.

    Raises:
        ValueError: `vocab_size` has no room for the bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; the bytes and special tokens need {smallest} or more.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress and sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_usable(texts), trainer)
    return _finish(tokenizer)


def _reader_arguments(path: Path, source: str, split: str) -> dict[str, Any]:
    """What tells `datasets.load_dataset` how to read `source`."""
    if path.is_dir():
        found = {file.suffix for file in path.iterdir() if file.suffix in READERS}
        if not found:
            raise ValueError(f"{source} holds no text files; give a directory of {', '.join(READERS)} files.")
        return {"path": str(path)} | ({"sample_by": "document"} if found == {".txt"} else {})
    if path.is_file():
        reader = READERS.get(path.suffix)
        if reader is None:
            raise ValueError(f"{source} is of an unknown type; give a {', '.join(READERS)} file.")
        arguments: dict[str, Any] = {"path": reader, "data_files": {split: str(path)}}
        return arguments | ({"sample_by": "document"} if reader == "text" else {})
    if path.suffix in READERS or source.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{source} does not exist; give a file, a directory or the name of a hub dataset.")
    return {"path": source}


def _usable(texts: Iterable[Any]) -> Iterator[str]:
    """The texts among the rows; says once, at the end, how many rows were left out and why."""
    total = 0
    skipped: collections.Counter[str] = collections.Counter()
    try:
        for text in texts:
            total += 1
            fault = _fault(text)
            if fault is None:
                yield text
            else:
                skipped[fault] += 1
    finally:  # also when the reader had enough and stopped early
        if skipped:
            reasons = ", ".join(f"{count} {fault}" for fault, count in skipped.most_common())
            logger.warning("skipped %d of %d rows: %s", skipped.total(), total, reasons)


def _fault(text: Any) -> str | None:
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


def _tokenize(texts: Iterable[Any], tokenizer: PreTrainedTokenizerFast) -> Iterator[np.ndarray]:
    """Token ids of each usable text, int32."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True  # as text, that is: data must not be able to write control tokens
    backend.no_truncation()
    backend.no_padding()
    for batch in _batches(_usable(texts)):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            yield np.asarray(encoding.ids, dtype=np.int32)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _first(documents: Iterator[np.ndarray], max_tokens: int) -> Iterator[np.ndarray]:
    total = 0
    for document in documents:
        yield document
        total += len(document)
        if total >= max_tokens:
            return


def _finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))  # here, so that their ids follow this order
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # a batch of prompts must end in tokens, not in pads, to be continued
        **SPECIAL_TOKENS,
    )


def _byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself if visible, else one from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]
