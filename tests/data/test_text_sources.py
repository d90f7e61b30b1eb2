"""Reading text: every format, splits, parts that are disjoint and complete, going on from any row, and bad files."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from text_files import write_rows

from holdfast.data.sources import HubText, TextSource, count_bad_rows, load_text, usable

ROWED = ["parquet", "jsonl", "json", "jsonl.gz", "jsonl.zst"]


@pytest.mark.parametrize("ending", ROWED)
def test_a_file_is_read_row_by_row_and_again(tmp_path: Path, ending: str) -> None:
    rows = ["one", None, "", "two\nlines", "海藻"]
    texts = load_text(write_rows(tmp_path / f"corpus.{ending}", rows), split="validation")
    assert list(texts) == rows
    assert list(texts) == rows


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    assert list(load_text(write_rows(tmp_path / "book.txt", ["one", "two"]))) == ["one\n\ntwo"]
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress("drei 海".encode()))
    assert list(load_text(tmp_path / "book.txt.gz")) == ["drei 海"]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "jsonl.zst", "txt"])
def test_a_directory_has_splits_by_file_name(tmp_path: Path, ending: str) -> None:
    for split in ("train", "validation"):
        for number in range(2):
            write_rows(tmp_path / "data" / f"{split}-{number:05d}-of-00002.{ending}", [f"{split} text\nno {number}"])
    assert list(load_text(tmp_path, split="validation")) == ["validation text\nno 0", "validation text\nno 1"]
    assert list(load_text(str(tmp_path))) == ["train text\nno 0", "train text\nno 1"]
    with pytest.raises(ValueError, match=rf"cannot read {tmp_path} \(split test\): .* train, validation only"):
        load_text(tmp_path, split="test")
    assert len(list(load_text(tmp_path, split=None))) == 4
    with pytest.raises(ValueError, match="owner/name is a data set of the hub; give one of its splits"):
        load_text("owner/name", split=None)


def test_files_without_a_split_in_their_names_are_to_train_on(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ["a"])
    write_rows(tmp_path / "deeper" / "constraint.txt", ["b"])  # `train` is no word of its own in there
    assert list(load_text(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("ending", ["PARQUET", "JSONL", "Json", "jsonl.GZ", "JSONL.ZST", "Txt", "TXT.gz", "TXT.ZST"])
def test_endings_count_in_any_case(tmp_path: Path, ending: str) -> None:
    lower = write_rows(tmp_path / f"corpus.{ending.lower()}", ["Kelp 海藻"])
    if lower.name.endswith((".txt.gz", ".txt.zst")):
        with pa.CompressedOutputStream(str(lower), "gzip" if lower.suffix == ".gz" else "zstd") as file:
            file.write("Kelp 海藻".encode())
    lower.rename(tmp_path / "part").rename(tmp_path / f"CORPUS.{ending}")
    assert list(load_text(tmp_path)) == list(load_text(tmp_path / f"CORPUS.{ending}")) == ["Kelp 海藻"]


def corpora(folder: Path) -> dict[str, TextSource]:
    """The same 23 rows in files of every kind, few and many, with small groups; and read by `datasets`."""
    rows = [f"row {number}" * (1 + number % 3) for number in range(23)]
    found: dict[str, TextSource] = {}
    for ending in ROWED:
        found[ending] = load_text(write_rows(folder / f"one.{ending}", rows, **_groups(ending)))
        for number in range(5):
            write_rows(folder / ending / f"{number}.{ending}", rows[number::5], **_groups(ending))
        found[f"{ending} in 5 files"] = load_text(folder / ending)
    for number in range(5):
        write_rows(folder / "hub" / f"train-{number}.parquet", rows[number::5], row_group_size=2)
    found["hub"] = HubText(str(folder / "hub"), "train", "text")
    return found


def _groups(ending: str) -> dict[str, int]:
    return {"row_group_size": 4} if ending == "parquet" else {}


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_parts_are_the_corpus_and_any_row_is_a_start(tmp_path: Path, parts: int) -> None:
    for name, source in corpora(tmp_path).items():
        seen: list[str] = []
        for part in range(parts):
            rows = list(source.rows(part, parts))
            values = [value for _, value in rows]
            for index, (place, _) in enumerate(rows):
                again = source.rows(part, parts, json.loads(json.dumps(place)))
                assert [value for _, value in again] == values[index:], (name, part, index)
            seen += values
        assert Counter(seen) == Counter(source), name
        assert len(seen) == 23


def test_streaming_through_datasets(tmp_path: Path) -> None:
    write_rows(tmp_path / "train-0.jsonl", ["a", "b"])
    source = HubText(str(tmp_path), "train", "text")
    assert list(source) == list(source) == ["a", "b"]
    with pytest.raises(ValueError, match=r"cannot read .* \(split train\): it has no column 'body'; .* id, text"):
        HubText(str(tmp_path), "train", "body")
    with pytest.raises(ValueError, match=r"cannot read .* \(split test\)"):
        HubText(str(tmp_path), "test", "text")


def test_a_broken_file_of_datasets_is_reported(tmp_path: Path) -> None:
    write_rows(tmp_path / "train-0.parquet", ["a", "b"])
    source = HubText(str(tmp_path), "train", "text")
    (tmp_path / "train-0.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=rf"cannot read {tmp_path} \(split train\)"):
        list(source)


def test_the_fingerprint_tells_that_a_corpus_has_changed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "corpus.jsonl", ["a", "b"])
    before = load_text(path).fingerprint
    assert load_text(path).fingerprint == before
    write_rows(path, ["a", "bb"])
    assert load_text(path).fingerprint != before


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.parquet does not exist"):
        load_text(tmp_path / "nowhere.parquet")
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        load_text(str(tmp_path / "nothing"))
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.docx is of an unknown type"):
        load_text(tmp_path / "notes.docx")
    with pytest.raises(ValueError, match="holds no text files"):
        load_text(tmp_path)
    for ending in ("parquet", "jsonl", "json"):
        corpus = write_rows(tmp_path / f"corpus.{ending}", ["a"])
        expected = rf"cannot read .*corpus\.{ending}: it has no column 'body'; give the column as one of id, text"
        with pytest.raises(ValueError, match=expected):
            load_text(corpus, text_column="body")
        with pytest.raises(ValueError, match="is local, but config is 'x'"):
            load_text(corpus, config="x")


@pytest.mark.parametrize("ending", ["parquet", "json", "jsonl.gz", "jsonl.zst"])
def test_a_damaged_file_is_named(tmp_path: Path, ending: str) -> None:
    whole = write_rows(tmp_path / f"a.{ending}", ["begin"])
    damaged = write_rows(tmp_path / f"b.{ending}", [f"{number} row" for number in range(3000)])
    damaged.write_bytes(damaged.read_bytes()[:-100])
    source = load_text(tmp_path)
    assert whole.name == "a." + ending
    with pytest.raises(ValueError, match=rf"cannot read .*b\.{ending}: \S"):
        list(source)


def test_bad_rows_are_counted_by_what_is_wrong_with_them(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b"{broken",
        b'{"id": 3}',
        b'{"text": 7}',
        b'{"text": ""}',
        b'{"text": "\xff\xfe"}',
        b'{"text": "\\ud800"}',
        b"[1, 2]",
        b"  ",
        b'{"text": "good too"}',
    ]
    (tmp_path / "corpus.jsonl").write_bytes(b"\n".join(lines))
    skipped: Counter[str] = Counter()
    rows = list(usable(load_text(tmp_path).rows(), skipped))
    assert [text for _, text in rows] == ["good", "good too"]
    assert skipped == {
        "not valid JSON": 1,
        "without text": 1,
        "not of type str": 1,
        "empty": 1,
        "not valid UTF-8": 1,
        "not valid Unicode": 1,
        "not a JSON object": 1,
    }


DEEP = '{"text": "a", "more": ' + "[" * 100_000 + "]" * 100_000 + "}"


def test_a_row_nested_too_deeply_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(DEEP + '\n{"text": "good"}\n' + DEEP + "\n")
    skipped: Counter[str] = Counter()
    assert [text for _, text in usable(load_text(tmp_path).rows(), skipped)] == ["good"]
    assert skipped == {"nested too deeply": 2}
    (tmp_path / "corpus.json").write_text(f"[{DEEP}]")
    with pytest.raises(ValueError, match=r"cannot read .*corpus\.json: a row is nested too deeply; .*\.jsonl"):
        load_text(tmp_path / "corpus.json")


def test_json_lines_by_another_name_are_recognised(tmp_path: Path) -> None:
    for text in ('{"text": "a"}\n{"text": "b"}\n', '{"text": "a"}'):
        (tmp_path / "corpus.json").write_text(text)
        expected = r"cannot read .*corpus\.json: a \.json file must hold a list of objects; name .* JSON lines \.jsonl"
        with pytest.raises(ValueError, match=expected):
            load_text(tmp_path)


def test_bad_rows_in_memory_name_their_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, rows in {"a": ["good"], "b": ["good", None, ""], "c": [None, "good"]}.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    assert list(count_bad_rows(load_text(tmp_path))) == ["good"] * 3
    assert list(count_bad_rows(load_text(tmp_path / "c.jsonl"))) == ["good"]
    expected = "skipped 3 rows that hold no text: 2 without text, 1 empty; the first in "
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: {expected}{tmp_path / 'b.jsonl'}",
        f"{tmp_path / 'c.jsonl'}: skipped 1 rows that hold no text: 1 without text",
    ]


def test_bytes_that_are_no_text_spoil_their_row_only(tmp_path: Path) -> None:
    column = pa.array([b"good", b"\xff\xfe", None, b"too"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "corpus.parquet")
    (tmp_path / "other.txt").write_bytes(b"\xff\xfe")
    skipped: Counter[str] = Counter()
    assert [text for _, text in usable(load_text(tmp_path).rows(), skipped)] == ["good", "too"]
    assert skipped == {"not valid UTF-8": 2, "without text": 1}


@pytest.mark.parametrize(
    "name", ["data/books", "here/books", "a/b/c", "./a/b", "../a", "~/a", "/a/b", "books/", "a/b.txt"]
)
def test_a_missing_path_is_not_asked_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("holdfast.data.sources.HubText", None)  # calling it is a TypeError
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist; give .* the name of a hub data set\\.$"):
        load_text(name)


@pytest.mark.parametrize("name", ["wikitext", "someone/books"])
def test_where_the_hub_has_nothing_either_both_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match=f"nothing lies at the path {name}, and as a data set of the hub cannot read"):
        load_text(name)
