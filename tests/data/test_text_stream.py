"""The stream of packed text: nothing lost or twice, one order for any workers and processes, exact positions."""

import itertools
import json
import logging
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from text_files import write_rows
from torch.utils.data import DataLoader

from holdfast.data.sources import HubText, TextSource, load_text
from holdfast.data.stream import TextStream
from holdfast.data.text import PackedText, byte_tokenizer, collate_isolated

END = 258


def corpus(folder: Path, documents: int = 60, files: int = 3, seed: int = 0) -> TextSource:
    """Documents of 1 to 40 letters, each of which no other has: its own character first."""
    generator = np.random.default_rng(seed)
    rows = [
        f"{chr(0x100 + number)}{'abcdefghij' * 4}"[: 1 + int(generator.integers(40))] for number in range(documents)
    ]
    for file in range(files):
        write_rows(folder / f"part{file}.jsonl", rows[file::files])
    return load_text(folder)


def stream(source: TextSource, **options: Any) -> TextStream:
    return TextStream(source, byte_tokenizer(), **({"length": 16, "shuffle": 24, "lanes": 4, "seed": 1} | options))


def take(blocks: TextStream, count: int | None = None) -> list[tuple[int, ...]]:
    return [tuple(block["input_ids"].tolist()) for block in itertools.islice(blocks, count)]


def documents_in(blocks: list[tuple[int, ...]]) -> list[bytes]:
    """What stands between end tokens in blocks that follow each other."""
    joined = itertools.chain.from_iterable(blocks)
    runs = [bytes(run) for is_end, run in itertools.groupby(joined, END.__eq__) if not is_end]
    return runs


@pytest.mark.parametrize("lanes", [1, 3, 4, 16])
def test_every_document_comes_once_and_whole(tmp_path: Path, lanes: int) -> None:
    """Without shuffling, the blocks of a lane in a row are its documents, but for a rest shorter than a block."""
    source = corpus(tmp_path)
    blocks = stream(source, lanes=lanes, shuffle=0, repeat=False, length=4)
    seen: Counter[bytes] = Counter()
    cut = 0
    for lane in range(lanes):
        blocks.set_rank(lane, lanes)
        texts = [text.encode() for _, text in source.rows(lane, lanes)]
        found = documents_in(take(blocks))
        expected = [token for text in texts for token in [*text, END]]
        whole = len(expected) // 4 * 4
        assert [*itertools.chain.from_iterable(take(blocks))] == expected[:whole]
        seen.update(found[:-1])
        cut += 1 + (len(texts) - len(found))
    assert max(seen.values()) == 1
    assert sum(seen.values()) >= 60 - 2 * lanes - cut


@pytest.mark.parametrize("shuffle", [0, 12, 10_000])
def test_a_pass_is_shuffled_but_the_blocks_are_the_same(tmp_path: Path, shuffle: int) -> None:
    source = corpus(tmp_path)
    plain = take(stream(source, shuffle=0, repeat=False))
    shuffled = take(stream(source, shuffle=shuffle, repeat=False))
    assert Counter(shuffled) == Counter(plain)
    assert (shuffled == plain) == (shuffle == 0)
    assert (take(stream(source, shuffle=shuffle, repeat=False, seed=2)) == shuffled) == (shuffle == 0)


def test_one_lane_packs_as_in_memory(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    memory = PackedText.from_texts(source, byte_tokenizer(), 16, isolate=True, progress=False)
    streamed = list(stream(source, lanes=1, shuffle=0, repeat=False, isolate=True))
    assert len(streamed) == len(memory)
    for index, block in enumerate(streamed):
        expected = memory[index]
        assert block.keys() == expected.keys() == {"input_ids", "labels", "cu_seqlens"}
        assert all(torch.equal(block[name], expected[name]) for name in block)
    joined = next(iter(DataLoader(stream(source, isolate=True), batch_size=3, collate_fn=collate_isolated)))
    assert joined["input_ids"].shape == (1, 48)
    assert joined["cu_seqlens"][-1] == 48


def test_passes_follow_each_other_without_losing_a_token(tmp_path: Path) -> None:
    source = corpus(tmp_path, documents=7)
    one = [token for text in source for token in [*text.encode(), END]]
    tokens = [*itertools.chain.from_iterable(take(stream(source, lanes=1, shuffle=0), 40))]
    assert len(tokens) > 3 * len(one)
    assert tokens == list(itertools.islice(itertools.cycle(one), len(tokens)))


def test_every_pass_is_shuffled_anew(tmp_path: Path) -> None:
    source = load_text(write_rows(tmp_path / "a.jsonl", ["x" * 15] * 3 + ["abcdefgh"[n] * 15 for n in range(8)]))
    passes = [take(blocks, 11) for blocks in [stream(source, lanes=1, shuffle=100)] for _ in range(3)]
    assert Counter(passes[0]) == Counter(passes[1]) == Counter(passes[2])
    assert len({tuple(order) for order in passes}) == 3


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_workers_do_not_change_the_order(tmp_path: Path, workers: int) -> None:
    source = corpus(tmp_path)
    assert take(stream(source, workers=workers), 70) == take(stream(source), 70)
    assert take(stream(source, workers=workers, repeat=False)) == take(stream(source, repeat=False))


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_together_take_what_one_takes(tmp_path: Path, world_size: int) -> None:
    source = corpus(tmp_path)
    alone = take(stream(source), 80)
    shares = []
    for rank in range(world_size):
        share = stream(source, workers=rank % 2)
        share.set_rank(rank, world_size)
        shares.append(take(share, 80 // world_size))
    assert [block for turn in zip(*shares, strict=True) for block in turn] == alone


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_any_position_can_be_saved_and_restored(tmp_path: Path, kind: str) -> None:
    source = corpus(tmp_path)
    if kind == "hub":
        source = HubText(str(tmp_path), "train", "text")
    blocks = stream(source)
    expected = take(stream(source), 90)
    for position in range(60 if kind == "files" else 24):
        if kind == "files" or position % 5 == 2:
            resumed = stream(source, workers=2 if position % 20 == 7 else 0)
            resumed.load_state_dict(json.loads(json.dumps(blocks.state_dict())))
            assert take(resumed, 30) == expected[position : position + 30], position
        assert take(blocks, 1) == [expected[position]]  # iterating again continues


def test_the_position_is_that_of_what_was_taken_not_of_what_workers_prepared(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    expected = take(stream(source), 60)
    blocks = stream(source, workers=2)
    batches = iter(DataLoader(blocks, batch_size=5))
    for _ in range(4):
        next(batches)
    resumed = stream(source)
    resumed.load_state_dict(blocks.state_dict())
    assert take(resumed, 40) == expected[20:]


def test_other_numbers_of_processes_continue_together(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    expected = take(stream(source), 80)
    states = []
    for rank in range(2):
        blocks = stream(source)
        blocks.set_rank(rank, 2)
        take(blocks, 10)
        states.append(blocks.state_dict())
    alone = stream(source)
    alone.load_state_dict(states[::-1])
    assert take(alone, 60) == expected[20:]
    shares = []
    for rank in range(4):
        blocks = stream(source)
        blocks.set_rank(rank, 4)
        blocks.load_state_dict(states)
        shares.append(take(blocks, 15))
    assert [block for turn in zip(*shares, strict=True) for block in turn] == expected[20:]
    alone.load_state_dict(states[0])
    with pytest.raises(ValueError, match=r"lacks lanes \[1, 3\]; load that of every process"):
        take(alone, 1)


def test_a_position_of_something_else_is_refused(tmp_path: Path) -> None:
    source = corpus(tmp_path / "a")
    state = stream(source).state_dict()
    for name, value in {"seed": 9, "length": 8, "lanes": 2, "max_tokens": 100}.items():
        with pytest.raises(ValueError, match=f"a stream with {name} = "):
            stream(source, **{name: value}).load_state_dict(state)
    with pytest.raises(ValueError, match="a stream with corpus = '3 files, "):
        stream(corpus(tmp_path / "b", documents=61)).load_state_dict(state)
    with pytest.raises(ValueError, match="the format 7"):
        stream(source).load_state_dict(state | {"format": 7})


def test_max_tokens_makes_a_pass_shorter(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    everything = sum(map(len, take(stream(source, repeat=False))))
    half = take(stream(source, repeat=False, max_tokens=everything // 2))
    assert everything // 2 - 4 * 16 <= sum(map(len, half)) <= everything // 2 + 4 * 41
    endless = stream(source, max_tokens=200, lanes=1, shuffle=0)
    ids = [*itertools.chain.from_iterable(take(endless, 60))]
    assert documents_in([tuple(ids)]).count(next(iter(source)).encode()) >= 4
    resumed = stream(source, max_tokens=200, lanes=1, shuffle=0)
    take(resumed, 21)
    again = stream(source, max_tokens=200, lanes=1, shuffle=0)
    again.load_state_dict(resumed.state_dict())
    assert [*itertools.chain.from_iterable(take(again, 39))] == ids[21 * 16 :]


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_pass_of_max_tokens_cuts_a_long_document(tmp_path: Path, lanes: int) -> None:
    rows = [chr(97 + number) * (5 if number < 3 else 9_000) for number in range(6)]
    source = load_text(write_rows(tmp_path / "a.jsonl", rows))
    options: dict[str, Any] = {"lanes": lanes, "max_tokens": 90, "shuffle": 0, "length": 6}
    once = take(stream(source, repeat=False, **options))
    assert len(once) == 90 // 6
    assert [token for block in once for token in block].count(END) == (4 if lanes == 1 else 6)
    expected = take(stream(source, **options), 60)
    assert expected[:30] == [*once, *once]
    blocks = stream(source, **options)
    for position in range(40):  # the middle of the cut document, and the pass behind it
        resumed = stream(source, **options)
        resumed.load_state_dict(blocks.state_dict())
        assert take(resumed, 20) == expected[position : position + 20]
        take(blocks, 1)


def test_a_corpus_of_few_documents_has_as_many_lanes(tmp_path: Path) -> None:
    gap = stream(load_text(write_rows(tmp_path / "gap.jsonl", ["one text of two", None, "the other"])), lanes=16)
    assert gap.settings.lanes == 1  # every second row has text only
    blocks = stream(load_text(write_rows(tmp_path / "a.jsonl", ["one text of two", "the other", None])), lanes=16)
    assert blocks.settings.lanes == 2
    assert len(take(blocks, 20)) == 20
    with pytest.raises(ValueError, match=r"read in 2 lanes, which 3 processes cannot share evenly"):
        blocks.set_rank(0, 3)
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no text"):
        stream(load_text(write_rows(tmp_path / "empty.jsonl", [None, ""])))


@pytest.mark.parametrize("files", [2, 4])
def test_more_lanes_than_files_are_told(tmp_path: Path, files: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="holdfast.data"):
        stream(corpus(tmp_path, files=files), lanes=4)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (files == 2)
    assert all("has fewer files (2) than lanes (4)" in message for message in messages)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_counted_and_reported_once(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*(f"text number {number}" for number in range(20)), None, 7, "", None]
    source = load_text(write_rows(tmp_path / "a.jsonl", rows))
    blocks = stream(source, lanes=2, repeat=False, shuffle=0, workers=workers)
    with caplog.at_level(logging.WARNING, logger="holdfast.data"):
        take(blocks)
    assert blocks.skipped == {"without text": 2, "not of type str": 1, "empty": 1}
    messages = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert messages[-1].endswith("skipped 4 rows that hold no text: 2 without text, 1 empty, 1 not of type str")
    assert len(messages) <= 2
    assert str(tmp_path / "a.jsonl") in messages[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_on_the_way_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    for number in range(4):
        write_rows(tmp_path / f"{number}.parquet", ["some text"] * 200, row_group_size=50)
    source = load_text(tmp_path)
    damaged = tmp_path / "2.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^cannot read .*2\.parquet: [^\n]*$"):
        take(stream(source, workers=workers), 300)


def test_the_generators_of_training_are_left_alone(tmp_path: Path) -> None:
    """Or dropout would differ between runs with and without workers, and after resuming."""
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(stream(corpus(tmp_path), workers=2), 5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    for name, value in {"length": 1, "lanes": 0, "shuffle": -1, "workers": -1, "seed": -1, "max_tokens": 0}.items():
        with pytest.raises(ValueError, match=f"{name} is {value}; give"):
            stream(source, **{name: value})
    with pytest.raises(ValueError, match="rank is 2; give 0 to 1"):
        stream(source).set_rank(2, 2)
    with pytest.raises(RuntimeError, match="has workers of its own"):
        next(iter(DataLoader(stream(source), num_workers=1)))


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python and Arrow hold at the peak, for 600 documents and for five times as many."""
    monkeypatch.setattr("holdfast.data.tokenizers.CHARACTERS_AT_ONCE", 20_000)
    peaks = []
    for documents in (600, 3_000):
        folder = tmp_path / str(documents)
        write_rows(folder / "a.parquet", ["a kelp forest under the waves " * 4] * documents, row_group_size=500)
        write_rows(folder / "b.jsonl", ["a kelp forest under the waves " * 4] * documents)
        blocks = stream(load_text(folder), length=128, shuffle=64, lanes=2, repeat=False)
        take(blocks, 10)
        tracemalloc.start()
        count = arrow = 0
        for _ in blocks:
            count += 1
            arrow = max(arrow, pa.total_allocated_bytes())
        peaks.append(tracemalloc.get_traced_memory()[1] + arrow)
        tracemalloc.stop()
        assert count > documents
    assert peaks[1] < 1.2 * peaks[0]
