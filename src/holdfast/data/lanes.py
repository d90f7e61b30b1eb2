"""One lane of a text stream: a part of the corpus, read again and again, packed, and shuffled window by window.

What a lane yields depends on its settings and its number alone, so a lane can begin anywhere that it has been: at the
start of any window, which a few numbers say (`Cursor`). A window is a few hundred blocks that are shuffled among
themselves; it ends early where the corpus ends, so that every block comes once in each pass.
"""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from holdfast.data.sources import TextSource, usable
from holdfast.data.tokenizers import encode_documents

__all__ = ["Block", "Cursor", "Lane", "LaneSettings", "Window"]


@dataclasses.dataclass(frozen=True)
class LaneSettings:
    """What all lanes of a stream have in common.

    Attributes:
        lanes: number of parts that the corpus is read in.
        length: tokens per block.
        window: blocks that are shuffled among themselves; 1: in the order of the corpus.
        seed: of the shuffling.
        max_tokens: tokens of the lane after which a pass ends, in the middle of a document if need be; None: where its
            part of the corpus ends.
        repeat: whether a pass is followed by another.
    """

    lanes: int
    length: int
    window: int
    seed: int
    max_tokens: int | None
    repeat: bool


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where a window begins: token `skip` of the document at `place`, in the given pass over the corpus.

    Attributes:
        window: number of the window in the lane.
        epoch: number of the pass.
        place: of the document's row, as `TextSource.rows` gives it; None: the first.
        skip: tokens of that document that belong to the window before.
        read: tokens of this pass before that document.
    """

    window: int = 0
    epoch: int = 0
    place: Any = None
    skip: int = 0
    read: int = 0


@dataclasses.dataclass(frozen=True)
class Block:
    """Packed tokens, int32 [length], and the offsets at which documents start in them."""

    tokens: np.ndarray
    starts: list[int]


@dataclasses.dataclass(frozen=True)
class Window:
    """Shuffled blocks, and the cursor from which the lane yields them again."""

    cursor: Cursor
    blocks: list[Block]


class Lane:
    """Windows of one part of a corpus.

    Args:
        source: the corpus.
        tokenizer: gives the end token between documents.
        number: of the part, 0 to `settings.lanes` − 1.

    Attributes:
        skipped: rows without text so far, by what is wrong with them.
    """

    def __init__(
        self, source: TextSource, tokenizer: PreTrainedTokenizerFast, settings: LaneSettings, number: int
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.settings = settings
        self.number = number
        self.skipped: collections.Counter[str] = collections.Counter()

    def windows(self, start: Cursor) -> Iterator[Window]:
        """The windows from `start` on; endless if the settings say so. Memory O(window · length).

        Raises:
            ValueError: the corpus cannot be read, or this part of it holds no text.
        """
        packer = _Packer(self.settings.length)
        number = start.window
        for document in self._documents(start):
            if document is None:  # the end of a pass; what does not fill a block is carried into the next
                if packer.blocks:
                    yield self._shuffled(packer.take(), number)
                    number += 1
                continue
            cursor, tokens = document
            position = cursor.skip
            while position < len(tokens):
                position = packer.add(tokens, position, cursor)
                if len(packer.blocks) == self._size(number):
                    yield self._shuffled(packer.take(), number)
                    number += 1

    def _size(self, number: int) -> int:
        """Blocks of a window. First windows differ, lest all lanes need new ones at the same time ever after."""
        settings = self.settings
        return settings.window if number else max(1, settings.window * (self.number + 1) // settings.lanes)

    def _shuffled(self, packed: list[tuple[Cursor, Block]], number: int) -> Window:
        order = np.random.default_rng([self.settings.seed, self.number, number]).permutation(len(packed))
        blocks = [packed[index][1] for index in (order if self.settings.window > 1 else range(len(packed)))]
        return Window(dataclasses.replace(packed[0][0], window=number), blocks)

    def _documents(self, start: Cursor) -> Iterator[tuple[Cursor, np.ndarray] | None]:
        """Documents with where they stand, an end token behind each; None at the end of every pass."""
        settings, cursor = self.settings, start
        while True:
            rows = usable(self.source.rows(self.number, settings.lanes, cursor.place), self.skipped)
            found = False
            for place, tokens in encode_documents(rows, self.tokenizer):
                found = True
                tokens = self._cut(tokens, cursor.read)
                cursor = dataclasses.replace(cursor, place=place)
                yield cursor, tokens
                cursor = dataclasses.replace(cursor, skip=0, read=cursor.read + len(tokens))
                if settings.max_tokens is not None and cursor.read >= settings.max_tokens:
                    break
            if not found:
                raise ValueError(
                    f"{self.source.name}: part {self.number} of {settings.lanes} holds no text; give fewer lanes."
                )
            yield None
            if not settings.repeat:
                return
            cursor = Cursor(epoch=cursor.epoch + 1)

    def _cut(self, tokens: np.ndarray, read: int) -> np.ndarray:
        """What a pass that has read so many tokens may take of a document, the end token behind it all the same."""
        limit = self.settings.max_tokens
        if limit is None or read + len(tokens) <= limit:
            return tokens
        return np.append(tokens[: limit - read - 1], tokens[-1:])


class _Packer:
    """Cuts a run of tokens into blocks, and knows where each began."""

    def __init__(self, length: int) -> None:
        self.blocks: list[tuple[Cursor, Block]] = []
        self._length = length
        self._filled = 0

    def add(self, tokens: np.ndarray, position: int, cursor: Cursor) -> int:
        """Take what fits of a document into the block, from token `position` on; returns the position behind that."""
        if not self._filled:
            self._origin = dataclasses.replace(cursor, skip=position)
            self._tokens = np.empty(self._length, dtype=np.int32)
            self._starts: list[int] = []
        if position == 0:
            self._starts.append(self._filled)
        count = min(self._length - self._filled, len(tokens) - position)
        self._tokens[self._filled : self._filled + count] = tokens[position : position + count]
        self._filled += count
        if self._filled == self._length:
            self.blocks.append((self._origin, Block(self._tokens, self._starts)))
            self._filled = 0
        return position + count

    def take(self) -> list[tuple[Cursor, Block]]:
        """The full blocks, which are then gone from here."""
        taken, self.blocks = self.blocks, []
        return taken
