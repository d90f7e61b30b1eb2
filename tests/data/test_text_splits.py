"""Which files of a directory are which split, what is left out, and splits that would be one text."""

import logging
from pathlib import Path

import pytest
from text_files import write_rows

from holdfast.data.sources import load_text
from holdfast.data.splits import check_told_apart, files_of_split


def make(folder: Path, *names: str) -> Path:
    for name in names:
        write_rows(folder / name, [name])
    return folder


def names(folder: Path, split: str) -> list[str]:
    return [str(path.relative_to(folder)) for path in files_of_split(folder, split)]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("Training (1).txt", "train"),
        ("data/train-00000-of-00004.parquet", "train"),
        ("my_validation_set_7.txt", "validation"),
        ("squad.dev.jsonl.gz", "validation"),
        ("VAL2.TXT", "validation"),
        ("eval/17.txt", "test"),
        ("train/a-test-of-time.txt", "train"),
        ("train-parts/validation/test.txt", "validation"),
    ],
)
def test_a_path_tells_a_split(tmp_path: Path, name: str, split: str) -> None:
    others = {"train": "train", "validation": "validation", "test": "test"}
    make(tmp_path, name, *(f"{other}/of-others.txt" for other in others if other != split))
    assert names(tmp_path, split) == [name]


def test_a_word_inside_another_tells_nothing(tmp_path: Path) -> None:
    made = ["constraint.txt", "corpdev.txt", "devil.txt", "latest.txt", "trainé.txt", "valley/evaluate.txt"]
    assert names(make(tmp_path, *made), "train") == made


def test_what_is_left_out_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "train.txt", "validation.txt", "moby.txt", "emma.txt")
    for name in ("README.md", ".hidden", ".cache/refs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with caplog.at_level(logging.WARNING, logger="holdfast.data"):
        assert list(load_text(tmp_path)) == ["train.txt"]
        assert list(load_text(tmp_path, split="validation")) == ["validation.txt"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{tmp_path}: files left out: 2 whose names tell no split while those of others do, such")
    assert "such as emma.txt; 1 that are no .parquet, " in message
    assert message.endswith("files, such as README.md.")


def test_nothing_is_told_where_nothing_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    list(load_text(make(tmp_path / "a", "train.txt", "validation.txt")))
    list(load_text(make(tmp_path / "b", "moby.txt", "emma.jsonl")))
    assert not caplog.records


def test_one_title_does_not_take_the_rest_away_in_silence(tmp_path: Path) -> None:
    make(tmp_path, "moby.txt", "a-test-of-time.txt")
    expected = r"\(split train\): .* the splits test only \(a-test-of-time\.txt: test\); .* named train/ and val"
    with pytest.raises(ValueError, match=expected):
        load_text(tmp_path)


def test_a_split_that_no_name_tells(tmp_path: Path) -> None:
    make(tmp_path, "moby.txt", "emma.txt")
    expected = (
        r"\(split validation\): its file names tell no split, so all of it is train; put its files into folders named "
        r"train/ and validation/, begin .* or ask for a split that is there\.$"
    )
    with pytest.raises(ValueError, match=expected):
        load_text(tmp_path, split="validation")
    with pytest.raises(ValueError, match=r"\(split dev\): .*; a directory can have train, validation, test\."):
        load_text(tmp_path, split="dev")


def test_splits_of_one_file_are_one_text(tmp_path: Path) -> None:
    book = write_rows(tmp_path / "book.txt", ["all of it"])
    check_told_apart(book, ["validation"], "do without")
    check_told_apart(tmp_path, ["train", "validation"], "do without")
    check_told_apart("owner/name", ["train", "validation"], "do without")
    expected = r"book\.txt is one file, so its splits 'train' and 'test' would be the same text: .* or do without\."
    with pytest.raises(ValueError, match=expected):
        check_told_apart(book, ["train", "test"], "do without")
    with pytest.raises(ValueError, match="the splits 'train' and 'train' of owner/name are one"):
        check_told_apart("owner/name", ["train", "train"], "do without")
