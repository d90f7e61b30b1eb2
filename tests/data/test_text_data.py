"""Text in memory: tokenizers that lose nothing, and packing with exact boundaries."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from holdfast.data.text import (
    PackedText,
    byte_tokenizer,
    collate_isolated,
    load_text,
    load_tokenizer,
    pack,
    train_tokenizer,
)
from holdfast.data.tokenizers import fingerprint

CORPUS = ["the whale, the whale!", "a kelp forest under the waves", "hold fast", "Ünïcødé — 海藻 🌊"]
TRAINED = train_tokenizer(CORPUS * 5, 300, progress=False)


@settings(max_examples=150, deadline=None)
@given(text=st.text())
@example(text="<|eos|> <|pad|>")
@example(text=" a , b ' s don't .  \r\n\t\x00")
@example(text="\u2028\ud7ff\U0010ffff")
def test_tokenizers_lose_nothing(text: str) -> None:
    data = byte_tokenizer()(text, split_special_tokens=True)["input_ids"]
    assert bytes(data) == text.encode()
    for tokenizer in (byte_tokenizer(), TRAINED):
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_byte_tokenizer_has_the_special_tokens_behind_the_bytes() -> None:
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert len(tokenizer) == 259
    assert tokenizer.decode([104, 105, 258], skip_special_tokens=True) == "hi"


def test_trained_tokenizer_merges_and_comes_back_from_disk(tmp_path: Path) -> None:
    assert 259 < len(TRAINED) <= 300
    assert (TRAINED.pad_token_id, TRAINED.bos_token_id, TRAINED.eos_token_id) == (0, 1, 2)
    ids = TRAINED("the whale")["input_ids"]
    assert len(ids) < len("the whale")
    TRAINED.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded("the whale")["input_ids"] == ids
    assert (len(loaded), loaded.eos_token_id) == (len(TRAINED), TRAINED.eos_token_id)


def test_tokenizers_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size is 258; .* need 259 or more"):
        train_tokenizer(CORPUS, 258)
    with pytest.raises(ValueError, match=f"cannot load tokenizer {tmp_path}"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_is_not_trained_on_nothing(tmp_path: Path) -> None:
    for nothing in ([], [None, ""]):
        with pytest.raises(ValueError, match="the corpus holds no text to train a tokenizer on"):
            train_tokenizer(nothing, 300, progress=False)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no text to train a tokenizer on"):
        train_tokenizer(load_text(tmp_path / "empty.jsonl"), 300, progress=False)


def test_pack_by_hand() -> None:
    blocks = pack([[1, 2, 3], [], [4, 5, 6, 7, 8], [9], [10, 11]], 4, eos_token_id=0)
    assert blocks.tokens.dtype == np.uint16
    assert [block["input_ids"].tolist() for block in blocks] == [[1, 2, 3, 0], [4, 5, 6, 7], [8, 0, 9, 0]]
    assert all(
        torch.equal(block["labels"], block["input_ids"]) and set(block) == {"input_ids", "labels"} for block in blocks
    )
    assert len(blocks) == 3  # the rest, 10 11 0, is shorter than a block


def test_isolated_blocks_say_where_documents_start() -> None:
    blocks = pack([[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]], 5, eos_token_id=0, isolate=True)
    assert [block["input_ids"].tolist() for block in blocks] == [[1, 2, 3, 0, 4], [5, 6, 7, 8, 0], [9, 0, 10, 11, 0]]
    assert [block["cu_seqlens"].tolist() for block in blocks] == [[0, 4, 5], [0, 5], [0, 2, 5]]
    ignored = -100
    assert blocks[0]["labels"].tolist() == [ignored, 2, 3, 0, ignored]
    assert blocks[1]["labels"].tolist() == [ignored, 6, 7, 8, 0]
    joined = next(iter(DataLoader(blocks, batch_size=3, collate_fn=collate_isolated)))
    assert joined["input_ids"].tolist() == [blocks.tokens.tolist()[:15]]
    assert joined["labels"].shape == (1, 15)
    assert joined["cu_seqlens"].tolist() == [0, 4, 5, 10, 12, 15, 15, 15]  # five documents, and empty ones to 2 ** 3
    assert joined["cu_seqlens"].dtype == joined["input_ids"].dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=4, max_size=20), length=st.integers(2, 7), large=st.booleans())
def test_packed_blocks_are_the_documents(sizes: list[int], length: int, large: bool) -> None:
    """Cut at cu_seqlens and at end tokens, blocks in a row give the documents back."""
    eos = 70_000 if large else 0
    generator = np.random.default_rng(sum(sizes))
    documents = [generator.integers(1, 60_000, size).tolist() for size in sizes]
    stream = [token for document in documents if document for token in [*document, eos]]
    if len(stream) < length:
        with pytest.raises(ValueError, match=f"the text has {len(stream)} tokens"):
            pack(documents, length, eos_token_id=eos)
        return
    blocks = pack(documents, length, eos_token_id=eos, isolate=True)
    assert blocks.tokens.dtype == (np.int32 if large else np.uint16)
    assert len(blocks) == len(stream) // length
    for number, block in enumerate(blocks):
        first = number * length
        assert block["input_ids"].tolist() == stream[first : first + length]
        starts = [n for n in range(length) if n == 0 or stream[first + n - 1] == eos]
        assert block["cu_seqlens"].tolist() == [*starts, length]


def test_texts_are_tokenized_and_bad_rows_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    rows = ["ab", None, "", 7, "\ud800", "c<|eos|>", None]
    with caplog.at_level(logging.WARNING, logger="holdfast.data"):
        blocks = PackedText.from_texts(rows, tokenizer, 3, progress=False)
    assert blocks.tokens.tolist() == [*b"ab", 258, *b"c<|eos|>", 258]
    faults = "2 without text, 1 empty, 1 not of type str, 1 not valid Unicode"
    expected = f"skipped 5 rows that hold no text: {faults}"
    assert [record.getMessage() for record in caplog.records] == [expected]
    caplog.clear()
    PackedText.from_texts(["abc"], tokenizer, 3, progress=False)
    assert not caplog.records


def test_many_texts_stay_in_order() -> None:
    """More characters than are tokenized at once."""
    texts = [chr(97 + n) * 300_000 for n in range(8)]
    blocks = PackedText.from_texts(texts, byte_tokenizer(), 300_001, progress=False)
    assert [block["input_ids"][[0, 299_999, 300_000]].tolist() for block in blocks] == [
        [97 + n, 97 + n, 258] for n in range(8)
    ]


def test_reading_stops_at_max_tokens(caplog: pytest.LogCaptureFixture) -> None:
    blocks = PackedText.from_texts([None, *["abcd"] * 10], byte_tokenizer(), 5, max_tokens=9, progress=False)
    assert len(blocks) == 2
    assert "skipped 1 row" in caplog.text


def test_a_long_document_is_cut_at_max_tokens() -> None:
    for max_tokens, blocks in ((1, 1), (5, 1), (6, 2), (50, 10)):
        cut = PackedText.from_texts(["ab", "c" * 10_000], byte_tokenizer(), 5, max_tokens=max_tokens, progress=False)
        whole = PackedText.from_texts(["ab", "c" * 10_000], byte_tokenizer(), 5, progress=False)
        assert len(cut) == blocks
        assert cut.tokens.tolist() == whole.tokens[: 5 * blocks].tolist()


@pytest.mark.parametrize("max_tokens", [0, -3])
def test_no_tokens_are_no_limit(max_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"max_tokens is {max_tokens}; give 1 or more, or None for all"):
        PackedText.from_texts(["abcdef"], byte_tokenizer(), 2, max_tokens=max_tokens, progress=False)


def test_the_fingerprint_is_that_of_what_texts_become(tmp_path: Path) -> None:
    before = fingerprint(TRAINED)
    TRAINED(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert fingerprint(TRAINED) == before != fingerprint(byte_tokenizer())
    TRAINED.save_pretrained(tmp_path)
    assert fingerprint(load_tokenizer(tmp_path)) == before


def test_the_callers_tokenizer_is_left_as_it_was() -> None:
    tokenizer = byte_tokenizer()
    PackedText.from_texts(["<|eos|>"], tokenizer, 2, progress=False)
    assert not tokenizer.backend_tokenizer.encode_special_tokens
    assert tokenizer("<|eos|>")["input_ids"] == [258]


def test_text_that_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="the text has 3 tokens, fewer than one block of length 4"):
        PackedText.from_texts(["ab"], byte_tokenizer(), 4, progress=False)
    with pytest.raises(ValueError, match="the text has 0 tokens"):
        PackedText.from_texts([None], byte_tokenizer(), 4, progress=False)
    with pytest.raises(ValueError, match="length is 1"):
        pack([[1, 2]], 1, eos_token_id=0)
    blocks = pack([[1, 2]], 3, eos_token_id=0)
    assert torch.equal(blocks[-1]["input_ids"], blocks[0]["input_ids"])
    for index in (1, -2):
        with pytest.raises(IndexError, match="1 blocks"):
            blocks[index]
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        PackedText.from_texts(["ab"], endless, 2)


def test_prompts_of_a_batch_are_padded_on_the_left() -> None:
    tokenizer = load_tokenizer("byte")
    mask = tokenizer(["a", "abc"], padding=True)["attention_mask"]
    assert mask == [[0, 0, 1], [1, 1, 1]]
