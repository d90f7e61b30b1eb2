"""Blocks of text to train and evaluate on, as a recipe asks for them."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerFast

from holdfast.data.prepared import read_description
from holdfast.data.sources import LocalText
from holdfast.data.splits import check_told_apart
from holdfast.data.text import (
    PackedText,
    TextSource,
    TextStream,
    is_prepared,
    load_text,
    open_prepared,
    train_tokenizer,
)
from holdfast.files import UnreadableError
from holdfast.training.recipe import TextData

WITHOUT_EVALUATIONS = "train without evaluations (--data.validation-split None)"
"""A way out of text that lacks a split for them."""


def training_blocks(data: TextData, tokenizer: PreTrainedTokenizerFast, *, seed: int, workers: int) -> Dataset:
    """What `data` says to train on: prepared blocks, small local text in memory, or else a stream.

    Args:
        data: the recipe's section.
        tokenizer: of the model. Prepared blocks hold the tokens of the tokenizer that stands beside them.
        seed: of a stream's shuffling; the other data sets leave that to the sampler.
        workers: processes of a stream; the other data sets leave that to the DataLoader.

    Raises:
        FileNotFoundError, ValueError: as `load_text`, `open_prepared`, `TextStream` and `PackedText` do.
    """
    if is_prepared(data.source):
        return _prepared(data, data.split, data.max_tokens)
    source = _open(data, data.split)
    if isinstance(source, LocalText) and source.size <= data.in_memory << 20:
        return PackedText.from_texts(source, tokenizer, data.length, isolate=data.isolate, max_tokens=data.max_tokens)
    return TextStream(
        source,
        tokenizer,
        data.length,
        isolate=data.isolate,
        seed=seed,
        shuffle=data.shuffle,
        lanes=data.lanes,
        max_tokens=data.max_tokens,
        workers=workers,
    )


def evaluation_blocks(data: TextData, tokenizer: PreTrainedTokenizerFast) -> Dataset | None:
    """The first blocks of the validation split, in memory or mapped; None where `data` names no such split.

    Raises:
        FileNotFoundError, ValueError: as `check_evaluation`, `load_text`, `open_prepared` and `PackedText` do.
    """
    check_evaluation(data)
    if data.validation_split is None:
        return None
    if is_prepared(data.source):
        return _prepared(data, data.validation_split, data.validation_tokens)
    return PackedText.from_texts(
        _open(data, data.validation_split),
        tokenizer,
        data.length,
        isolate=data.isolate,
        max_tokens=data.validation_tokens,
    )


def check_evaluation(data: TextData) -> None:
    """Raise where `data` would evaluate on the text that it trains on. Takes no time.

    Raises:
        FileNotFoundError: prepared text lacks one of the splits.
        ValueError: naming the source and the ways out.
    """
    if data.validation_split is None:
        return
    check_told_apart(data.source, (data.split, data.validation_split), WITHOUT_EVALUATIONS)
    if is_prepared(data.source) and _contents(data, data.split) == _contents(data, data.validation_split):
        raise ValueError(
            f"{data.source} holds the same text as {data.split!r} and as {data.validation_split!r}: prepare them of "
            f"different files, or {WITHOUT_EVALUATIONS}."
        )


def identify(blocks: Dataset, data: TextData, split: str) -> dict[str, int] | None:
    """What tells the blocks of `training_blocks` and `evaluation_blocks` from others: number, and checksum of tokens.

    None of a stream: the position in it, which checkpoints hold, says of which corpus it is. O(tokens) in memory, O(1)
    for prepared blocks, whose checksums are known.
    """
    if isinstance(blocks, PackedText):
        return {"blocks": len(blocks), "checksum": zlib.crc32(blocks.tokens.data)}
    if is_prepared(data.source):
        shards = read_description(Path(data.source), split)["shards"]
        return {"blocks": len(blocks), "checksum": zlib.crc32(json.dumps(shards, sort_keys=True).encode())}  # type: ignore[arg-type]
    return None


def own_tokenizer(data: TextData, vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the text to train on.

    Raises:
        ValueError: that text is on the hub, all of which would be read for it.
    """
    source = _open(data, data.split)
    if not isinstance(source, LocalText):
        raise ValueError(
            f"data.tokenizer is 'train', for which all of {data.source} would be read: train one on a part of it first "
            "(`holdfast tokenizer`), and give its directory."
        )
    return train_tokenizer(source, vocab_size)


def _open(data: TextData, split: str) -> TextSource:
    """The text of a split; errors name the settings of the recipe."""
    try:
        return load_text(data.source, split=split, text_column=data.column, config=data.config)
    except (FileNotFoundError, ValueError) as error:
        kind = next(kind for kind in (FileNotFoundError, UnreadableError, ValueError) if isinstance(error, kind))
        way_out = f", or {WITHOUT_EVALUATIONS}" if split == data.validation_split else ""
        raise kind(f"{str(error).rstrip('.')} (--data.source of the recipe{way_out}).") from error


def _contents(data: TextData, split: str) -> list[list[int]]:
    """Checksums of the shards of a prepared split."""
    return [shard["crc32"] for shard in read_description(Path(data.source), split)["shards"]]


def _prepared(data: TextData, split: str, max_tokens: int | None) -> Dataset:
    blocks = open_prepared(data.source, data.length, split=split, isolate=data.isolate)
    if max_tokens is None or math.ceil(max_tokens / data.length) >= len(blocks):
        return blocks
    return Subset(blocks, range(math.ceil(max_tokens / data.length)))
