"""Text of any size as an endless stream of packed blocks, with a position that can be saved and restored exactly.

The corpus is read in a fixed number of lanes (see `holdfast.data.lanes`), and the stream takes one block of each lane
in turn. Processes and workers share the lanes among them, so which blocks come, and in which order, depends on the
settings alone: not on the number of workers, nor (for the blocks of a whole step) on the number of processes.
"""

import collections
import dataclasses
import heapq
import itertools
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from holdfast.data.lanes import Block, Cursor, Lane, LaneSettings
from holdfast.data.packing import check_length, check_max_tokens, make_block
from holdfast.data.processes import end_by_parent_only
from holdfast.data.sources import TextSource, describe_skipped, usable
from holdfast.data.tokenizers import fingerprint

__all__ = ["TextStream"]

logger = logging.getLogger(__name__)

FORMAT = 1  # of the saved position
BLOCKS_AHEAD = 32  # that a worker prepares
ROWS_PER_LANE = 100  # that are searched for some text


class TextStream(IterableDataset):
    """Tokenized, packed and shuffled blocks of a corpus, in worker processes of its own.

        stream = TextStream(load_text("corpus/"), tokenizer, length=2048, workers=4)
        stream.set_rank(rank, world_size)  # where several processes train
        for batch in DataLoader(stream, batch_size=8):
            ...
            state = stream.state_dict()  # plain values, ready for JSON
        stream.load_state_dict(state)  # of all ranks: a list of theirs

    A block is what `PackedText` gives. Every document ends with the end token, the next follows at once, and what is
    left at the end of a pass over the corpus begins the next pass: nothing is lost. Rows without text are skipped and
    counted in `skipped`. Iterating continues at the stream's position; there can be one iteration at a time. Memory is
    O(shuffle · length + workers · length), whatever the size of the corpus.

    Args:
        source: the corpus, from `load_text`.
        tokenizer: gives the end token between documents.
        length: tokens per block L.
        isolate: whether blocks say where documents start, as `PackedText.__getitem__` describes.
        seed: of the shuffling, 0 or more.
        shuffle: blocks that are shuffled among each other, over all lanes; 0: none are. As many are held in memory.
        lanes: parts that the corpus is read in; fewer where it has fewer documents. At most as many processes and
            workers can read at once, and it must be a multiple of the number of processes. The order of the blocks
            depends on it. A corpus of fewer files than lanes is read by every lane in full.
        max_tokens: as many tokens of the corpus are read (the same number in each lane), and then again; documents are
            cut for it. None: all.
        repeat: whether the stream goes on when the corpus ends. If not, lanes leave as they end, and the rest of each
            that does not fill a block is left out; processes may then get different numbers of blocks.
        workers: processes that read and tokenize; 0: this one.

    Attributes:
        skipped: rows without text that this process has come across, by what is wrong with them.

    Raises:
        ValueError: a setting is out of range, or the corpus holds no text. While iterating: it cannot be read.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: PreTrainedTokenizerFast,
        length: int,
        *,
        isolate: bool = False,
        seed: int = 0,
        shuffle: int = 4096,
        lanes: int = 16,
        max_tokens: int | None = None,
        repeat: bool = True,
        workers: int = 0,
    ) -> None:
        check_length(length)
        least = {"seed": (seed, 0), "shuffle": (shuffle, 0), "lanes": (lanes, 1), "workers": (workers, 0)}
        for name, (value, lowest) in least.items():
            if value < lowest:
                raise ValueError(f"{name} is {value}; give {lowest} or more.")
        check_max_tokens(max_tokens)
        lanes = _count_lanes(source, lanes)
        if source.files < lanes and os.environ.get("RANK", "0") == "0":  # said once, however many processes train
            logger.warning(
                "%s has fewer files (%d) than lanes (%d), so each lane reads all of it: give no more lanes "
                "(data.lanes of a recipe) than files, split it into more files, or prepare it (`holdfast prepare`).",
                *(source.name, source.files, lanes),
            )
        self.source = source
        self.tokenizer = tokenizer
        self.isolate = isolate
        self.workers = workers
        self.skipped: collections.Counter[str] = collections.Counter()
        self.settings = LaneSettings(
            lanes=lanes,
            length=length,
            window=max(1, shuffle // lanes),
            seed=seed,
            max_tokens=None if max_tokens is None else math.ceil(max_tokens / lanes),
            repeat=repeat,
        )
        # What the order of the blocks depends on.
        self._identity = {"corpus": source.fingerprint, "tokenizer": fingerprint(tokenizer)}
        self._identity |= dataclasses.asdict(self.settings)
        self.set_rank(0, 1)
        self._restart()

    def set_rank(self, rank: int, world_size: int) -> None:
        """Read the lanes `rank`, `rank` + `world_size`, … only.

        If every process takes as many blocks, then together they have taken what one process alone would have taken.

        Raises:
            ValueError: the lanes cannot be shared evenly.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; give 0 to {world_size - 1}, for {world_size} processes.")
        if self.settings.lanes % world_size:
            raise ValueError(
                f"{self.source.name} is read in {self.settings.lanes} lanes, which {world_size} processes cannot share "
                f"evenly; give lanes (data.lanes of a recipe) as a multiple of {world_size}, and a corpus of as many "
                "documents."
            )
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if get_worker_info() is not None:
            raise RuntimeError("a TextStream has workers of its own: give it `workers`, and the DataLoader none.")
        own = self._own_lanes()
        if missing := [number for number in own if number not in self._positions]:
            raise ValueError(f"the position that was loaded lacks lanes {missing}; load that of every process.")
        readers = self._start_readers(own)
        try:
            # Turns follow from what each lane has given, so they go on rightly from any position.
            turns = [(self._positions[number].given, number) for number in own if not self._positions[number].ended]
            heapq.heapify(turns)
            while turns:
                given, number = heapq.heappop(turns)
                sample = next(readers[number])
                if isinstance(sample, _Failure):
                    raise ValueError(sample.message)
                self._count_skipped(sample.skipped)
                self._positions[number] = self._positions[number].after(sample)
                if sample.block is not None:
                    heapq.heappush(turns, (given + 1, number))
                    yield make_block(sample.block.tokens, sample.block.starts, isolate=self.isolate)
            self._restart()
        finally:
            if self.skipped:
                logger.warning("%s: %s", self.source.name, describe_skipped(self.skipped))

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last block that was taken: plain values, of the lanes of this process."""
        lanes = {str(number): dataclasses.asdict(self._positions[number]) for number in self._own_lanes()}
        return {"format": FORMAT, "stream": dict(self._identity), "lanes": lanes}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Continue at a saved position, with any number of workers.

        Args:
            state: what `state_dict` returned; where several processes trained, of all of them, in any order. They may
                be more or fewer now.

        Raises:
            ValueError: naming the setting that is not as it was, or the corpus, if it has changed.
        """
        states = [state] if isinstance(state, Mapping) else list(state)
        positions = {}
        for one in states:
            if one.get("format") != FORMAT:
                raise ValueError(f"the position has the format {one.get('format')}, not {FORMAT}; it cannot be read.")
            for name, value in self._identity.items():
                if one["stream"][name] != value:
                    raise ValueError(
                        f"the position is that of a stream with {name} = {one['stream'][name]!r}, not {value!r}: go on "
                        "with what it was started with, or begin anew under another name."
                    )
            for number, position in one["lanes"].items():
                positions[int(number)] = _Position(**position | {"cursor": Cursor(**position["cursor"])})
        self._positions = positions

    def _restart(self) -> None:
        self._positions = {number: _Position() for number in range(self.settings.lanes)}

    def _own_lanes(self) -> list[int]:
        return list(range(self.rank, self.settings.lanes, self.world_size))

    def _start_readers(self, own: list[int]) -> dict[int, Iterator["_Sample | _Failure"]]:
        """For each lane, the iterator that gives its next block; lanes of one worker share theirs."""
        lanes = {number: Lane(self.source, self.tokenizer, self.settings, number) for number in own}
        workers = min(self.workers, len(own))
        if workers == 0:
            iterator = _take_turns([(lanes[number], self._positions[number]) for number in own])
            return dict.fromkeys(own, iterator)
        readers: dict[int, Iterator[_Sample | _Failure]] = {}
        for worker in range(workers):
            numbers = own[worker::workers]
            dataset = _WorkerLanes([(lanes[number], self._positions[number]) for number in numbers])
            loader = DataLoader(
                dataset,
                batch_size=None,
                num_workers=1,
                prefetch_factor=BLOCKS_AHEAD,
                collate_fn=_unchanged,
                worker_init_fn=_begin_worker,
                generator=torch.Generator(),  # else each would take a number from the generator that training uses
            )
            readers |= dict.fromkeys(numbers, iter(loader))
        return readers

    def _count_skipped(self, skipped: collections.Counter[str]) -> None:
        if skipped and not self.skipped:
            logger.warning("%s: %s so far; more are counted.", self.source.name, describe_skipped(skipped))
        self.skipped.update(skipped)


@dataclasses.dataclass(frozen=True)
class _Sample:
    """The next block of a lane, or None at its end."""

    lane: int
    block: Block | None
    cursor: Cursor | None = None
    """Of its window, with the first block that is given of it."""
    index: int = 0
    """In its window."""
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass(frozen=True)
class _Failure:
    """Why a worker cannot go on; an exception would arrive with the worker's traceback in its message."""

    message: str


@dataclasses.dataclass(frozen=True)
class _Position:
    """Of a lane: the window it is in, the blocks taken of that, and those taken altogether."""

    cursor: Cursor = dataclasses.field(default_factory=Cursor)
    taken: int = 0
    given: int = 0
    ended: bool = False

    def after(self, sample: _Sample) -> "_Position":
        if sample.block is None:
            return dataclasses.replace(self, ended=True)
        cursor = self.cursor if sample.cursor is None else sample.cursor
        return _Position(cursor, sample.index + 1, self.given + 1)


class _WorkerLanes(IterableDataset):
    """Some lanes, read in a worker."""

    def __init__(self, lanes: list[tuple[Lane, _Position]]) -> None:
        self._lanes = lanes

    def __iter__(self) -> Iterator[_Sample | _Failure]:
        try:
            yield from _take_turns(self._lanes)
        except (ValueError, OSError) as error:
            yield _Failure(str(error))


def _take_turns(lanes: Iterable[tuple[Lane, _Position]]) -> Iterator[_Sample]:
    """The blocks of some lanes, in the order in which the whole stream wants them."""
    waiting = [
        (position.given, lane.number, _samples(lane, position)) for lane, position in lanes if not position.ended
    ]
    heapq.heapify(waiting)  # no two have the same number, so iterators are never compared
    while waiting:
        given, number, samples = heapq.heappop(waiting)
        sample = next(samples)
        yield sample
        if sample.block is not None:
            heapq.heappush(waiting, (given + 1, number, samples))


def _samples(lane: Lane, position: _Position) -> Iterator[_Sample]:
    taken = position.taken
    for window in lane.windows(position.cursor):
        for index in range(taken, len(window.blocks)):
            skipped = collections.Counter(lane.skipped)
            lane.skipped.clear()
            cursor = window.cursor if index == taken else None
            yield _Sample(lane.number, window.blocks[index], cursor, index, skipped)
        taken = 0
    yield _Sample(lane.number, None, skipped=lane.skipped)


def _count_lanes(source: TextSource, lanes: int) -> int:
    """As many lanes as asked for, unless the corpus has too few rows with text for each to have one."""
    if source.files >= lanes:
        return lanes
    first = itertools.islice(source.rows(), lanes * ROWS_PER_LANE)
    with_text: list[int] = []
    reached = set()
    for number, _ in usable(((number, value) for number, (_, value) in enumerate(first)), collections.Counter()):
        with_text.append(number)
        reached.add(number % lanes)
        if len(reached) == lanes:
            break
    for fewer in range(lanes, 0, -1):
        if len({number % fewer for number in with_text}) == fewer:
            return fewer
    raise ValueError(f"{source.name} holds no text.")


def _unchanged(sample: Any) -> Any:
    return sample


def _begin_worker(worker: int) -> None:
    """Workers are many already; and what `tokenizers` would say about processes that fork is no concern of users."""
    end_by_parent_only(worker)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
