"""Packing token sequences into blocks of one length, held in memory or mapped from a file."""

import math
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from holdfast.data.progress import track
from holdfast.data.sources import count_bad_rows
from holdfast.data.tokenizers import encode_documents

__all__ = ["PackedText", "check_length", "check_max_tokens", "collate_isolated", "make_block", "pack"]

IGNORED = -100  # the label that transformers' losses leave out


class PackedText(Dataset):
    """Blocks of one length cut from a token stream, as a map-style dataset.

    Every document ends with the end token and the next follows at once; a rest shorter than a block is left out. Two
    bytes a token for vocabularies up to 65,536, else four.

    Args:
        tokens: the stream, integers [N], which may be mapped from a file.
        starts: where in the stream documents start, rising integers.
        length: tokens per block L.
        isolate: see `__getitem__`.

    Raises:
        ValueError: `length` is below 2, or the stream is shorter than one block.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, length: int, *, isolate: bool = False) -> None:
        check_length(length)
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
        """Tokenize and pack texts in memory. Rows that are no text are skipped, and counted in one warning.

        Args:
            texts: documents, such as those of `load_text`.
            tokenizer: gives the end token between documents.
            length: tokens per block L.
            isolate: see `__getitem__`.
            max_tokens: keep the first blocks, as few as hold so many tokens, and read no further; the last document
                is cut there. None: all.
            progress: show a progress bar when standard error is a terminal.

        Raises:
            ValueError: the tokenizer has no end token, `max_tokens` is below 1, or there is not enough text for one
                block.
        """
        check_max_tokens(max_tokens)
        limit = math.inf if max_tokens is None else math.ceil(max_tokens / length) * length
        count = len(texts) if isinstance(texts, Sized) else None
        rows = ((None, text) for text in track(count_bad_rows(texts), "tokenizing", total=count, progress=progress))
        pieces: list[np.ndarray] = []
        total = 0
        for _, document in encode_documents(rows, tokenizer):
            pieces.append(document[: min(len(document), limit - total)])
            total += len(pieces[-1])
            if total == limit:
                break
        return _join(pieces, length, isolate)

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
        inside = np.searchsorted(self.starts, [first, first + self.length])
        starts = self.starts[slice(*inside)] - first
        return make_block(self.tokens[first : first + self.length], starts, isolate=self.isolate)


def check_length(length: int) -> None:
    """Raise ValueError when `length` is too short for a block."""
    if length < 2:
        raise ValueError(f"length is {length}; give at least 2, for a token to predict and one to predict it from.")


def check_max_tokens(max_tokens: int | None) -> None:
    """Raise ValueError when a limit on the tokens leaves none."""
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; give 1 or more, or None for all.")


def make_block(tokens: np.ndarray, starts: np.ndarray | Sequence[int], *, isolate: bool) -> dict[str, torch.Tensor]:
    """What `PackedText.__getitem__` returns, of the tokens of a block [L] and the offsets at which documents start."""
    input_ids = torch.from_numpy(tokens.astype(np.int64))
    block = {"input_ids": input_ids, "labels": input_ids.clone()}
    if isolate:
        offsets = torch.tensor([0, *(int(start) for start in starts if start > 0), len(tokens)])
        block["labels"][offsets[:-1]] = IGNORED
        block["cu_seqlens"] = offsets
    return block


def pack(
    documents: Iterable[Sequence[int] | np.ndarray], length: int, *, eos_token_id: int, isolate: bool = False
) -> PackedText:
    """Pack token sequences into blocks of `length`, an end token behind each; empty sequences are left out."""
    pieces = [np.append(np.asarray(document, dtype=np.int32), np.int32(eos_token_id)) for document in documents]
    return _join([piece for piece in pieces if len(piece) > 1], length, isolate)


def collate_isolated(blocks: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join B blocks of an isolating `PackedText` or `TextStream` into one row, as packed sequences go to a model.

    Returns:
        `input_ids` and `labels`, int64 [1, B·L], and `cu_seqlens`, int64 [documents + 1], that ends with B·L. Empty
        documents at the end make its length a power of 2, so that compiled models meet few shapes.
    """
    joined = {name: torch.cat([block[name] for block in blocks]).unsqueeze(0) for name in ("input_ids", "labels")}
    lengths = torch.cat([block["cu_seqlens"].diff() for block in blocks])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    empty = (1 << len(lengths).bit_length()) - len(offsets)
    joined["cu_seqlens"] = torch.cat([offsets, offsets[-1:].expand(empty)])
    return joined


def _join(pieces: list[np.ndarray], length: int, isolate: bool) -> PackedText:
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
    if len(tokens) and tokens.max() <= np.iinfo(np.uint16).max:
        tokens = tokens.astype(np.uint16)
    starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])], dtype=np.int64)
    return PackedText(tokens, starts, length, isolate=isolate)
