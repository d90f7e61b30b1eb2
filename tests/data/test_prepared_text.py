"""Prepared text: the same blocks as in memory, and damage that is found and named."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from text_files import write_rows

from holdfast.data.packing import pack
from holdfast.data.prepared import is_prepared, open_prepared, prepare
from holdfast.data.sources import load_text
from holdfast.data.text import PackedText, byte_tokenizer, load_tokenizer, train_tokenizer

ROWS = [f"document {number}: " + "kelp " * (number % 6) for number in range(31)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "corpus.parquet", [*ROWS, None, ""])


@pytest.mark.parametrize("isolate", [False, True])
def test_one_shard_holds_the_blocks_of_text_in_memory(corpus: Path, tmp_path: Path, isolate: bool) -> None:
    tokenizer = train_tokenizer(ROWS, 300, progress=False)
    written = prepare(load_text(corpus), tmp_path / "out", tokenizer, split="train", progress=False)
    memory = PackedText.from_texts(ROWS, tokenizer, 16, isolate=isolate, progress=False)
    assert (written.documents, written.tokens, written.bytes) == (31, len(memory.tokens), 2 * len(memory.tokens))
    assert written.skipped == {"without text": 1, "empty": 1}
    blocks = open_prepared(tmp_path / "out", 16, isolate=isolate)
    assert len(blocks) == len(memory)
    for index in range(len(memory)):
        assert all(torch.equal(blocks[index][name], memory[index][name]) for name in memory[index])
    assert isinstance(blocks.datasets[0].tokens, np.memmap)
    assert load_tokenizer(tmp_path / "out")(ROWS[3])["input_ids"] == tokenizer(ROWS[3])["input_ids"]


def test_shards_of_several_workers_hold_every_document_once(corpus: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    prepare(load_text(corpus), tmp_path / "out", tokenizer, workers=3, progress=False)
    shards = open_prepared(tmp_path / "out", 8).datasets
    assert len(shards) == 3
    found = []
    for shard in shards:
        edges = [*shard.starts.tolist(), len(shard.tokens)]
        found += [bytes(shard.tokens[a : b - 1].tolist()).decode() for a, b in itertools.pairwise(edges)]
    assert sorted(found) == sorted(ROWS)


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra {number}>" for number in range(1 << 16)])
    source = load_text(write_rows(tmp_path / "a.jsonl", ["abc<extra 65535>"]))
    written = prepare(source, tmp_path / "out", tokenizer, progress=False)
    blocks = open_prepared(tmp_path / "out", 5)
    assert written.bytes == 4 * written.tokens
    assert blocks[0]["input_ids"].tolist() == [*b"abc", 259 + 65535, 258]


def test_the_format_is_what_the_documentation_says(corpus: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    prepare(load_text(corpus), tmp_path / "out", tokenizer, split="validation", progress=False)
    tokens = np.fromfile(tmp_path / "out" / "validation-00000.tokens.bin", dtype="<u2")
    starts = np.fromfile(tmp_path / "out" / "validation-00000.starts.bin", dtype="<u8")
    expected = pack([list(row.encode()) for row in ROWS], 2, eos_token_id=258)
    assert (tokens == expected.tokens).all()
    assert (starts == expected.starts).all()
    description = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert (description["format"], description["dtype"], description["vocab_size"]) == (1, "uint16", 259)
    assert [shard["documents"] for shard in description["shards"]] == [31]


def test_damage_is_found_and_named(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    prepare(load_text(corpus), folder, byte_tokenizer(), progress=False)
    for name in ("train-00000.tokens.bin", "train-00000.starts.bin"):
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-2])
        with pytest.raises(ValueError, match=rf"{name} has {len(whole) - 2} bytes, not {len(whole)}: it is damaged"):
            open_prepared(folder, 8)
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(ValueError, match=rf"{name} is damaged \(its checksum differs\)"):
            open_prepared(folder, 8)
        open_prepared(folder, 8, check=False)
        path.write_bytes(whole)
    open_prepared(folder, 8, check=True)
    (folder / "train.json").write_text("{")
    with pytest.raises(ValueError, match=r"train\.json does not describe prepared text"):
        open_prepared(folder, 8)
    (folder / "train.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="the format 9, not 1"):
        open_prepared(folder, 8)


def test_what_is_not_finished_is_not_prepared(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    prepare(load_text(corpus), folder, byte_tokenizer(), progress=False)
    assert is_prepared(folder)
    assert is_prepared(folder, "train")
    assert not is_prepared(folder, "validation")
    assert not is_prepared(corpus.parent)
    (folder / "train.json").unlink()
    assert not is_prepared(folder, "train")
    with pytest.raises(FileNotFoundError, match="holds no prepared split 'train'; make it with `holdfast prepare`"):
        open_prepared(folder, 8)


def test_a_directory_holds_splits_of_one_tokenizer(corpus: Path, tmp_path: Path) -> None:
    folder, source = tmp_path / "out", load_text(corpus)
    prepare(source, folder, byte_tokenizer(), progress=False)
    with pytest.raises(ValueError, match="holds a prepared split 'train' already"):
        prepare(source, folder, byte_tokenizer(), progress=False)
    other = train_tokenizer(ROWS, 300, progress=False)
    with pytest.raises(ValueError, match="holds the split 'train' with another tokenizer"):
        prepare(source, folder, other, split="validation", progress=False)
    prepare(source, folder, byte_tokenizer(), split="validation", progress=False)
    assert len(open_prepared(folder, 8, split="validation")) == len(open_prepared(folder, 8))


def test_what_an_interrupted_attempt_has_left_is_removed(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    prepare(load_text(corpus), folder, byte_tokenizer(), split="validation", progress=False)
    others = sorted(path.name for path in folder.iterdir())
    for name in ("train-00007.tokens.bin", "train-00007.starts.bin", ".train-00001.tokens-x1.bin"):
        (folder / name).write_bytes(b"left")
    prepare(load_text(corpus), folder, byte_tokenizer(), progress=False)
    own = ["train-00000.starts.bin", "train-00000.tokens.bin", "train.json"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*others, *own])


@pytest.mark.parametrize("workers", [1, 3])
def test_an_attempt_that_fails_leaves_nothing(tmp_path: Path, workers: int) -> None:
    for number in range(3):
        write_rows(tmp_path / "corpus" / f"{number}.parquet", ["some text"] * 300, row_group_size=50)
    source = load_text(tmp_path / "corpus")
    damaged = tmp_path / "corpus" / "2.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^cannot read .*2\.parquet: [^\n]*$"):
        prepare(source, tmp_path / "out", byte_tokenizer(), workers=workers, progress=False)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_are_counted_as_they_are_written(
    corpus: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.data.progress.SECONDS_BETWEEN_LINES", -1.0)
    prepare(load_text(corpus), tmp_path / "out", byte_tokenizer(), workers=workers)
    assert capsys.readouterr().err.splitlines() == [f"train: documents: {done}" for done in range(31)]


def test_what_cannot_be_prepared(tmp_path: Path) -> None:
    empty = load_text(write_rows(tmp_path / "a.jsonl", [None, ""]))
    with pytest.raises(ValueError, match=r"a\.jsonl holds no text"):
        prepare(empty, tmp_path / "out", byte_tokenizer(), progress=False)
    with pytest.raises(ValueError, match="split is 'a/b'"):
        prepare(empty, tmp_path / "out", byte_tokenizer(), split="a/b")
    with pytest.raises(ValueError, match="workers is 0"):
        prepare(empty, tmp_path / "out", byte_tokenizer(), workers=0)
    short = load_text(write_rows(tmp_path / "b.jsonl", ["ab"]))
    prepare(short, tmp_path / "out", byte_tokenizer(), progress=False)
    with pytest.raises(ValueError, match="has 3 tokens, too few for a block of 4"):
        open_prepared(tmp_path / "out", 4)
    with pytest.raises(ValueError, match=r"b\.jsonl is a file; give a directory"):
        prepare(short, tmp_path / "b.jsonl", byte_tokenizer(), progress=False)
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        prepare(short, tmp_path / "other", endless)
