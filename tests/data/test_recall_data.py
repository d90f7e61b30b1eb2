"""FDA, SWDE and SQuAD: which prompts and answers come from which files."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from holdfast.data.recall import RecallSample, is_published_squad, load_recall
from holdfast.files import UnreadableError

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Sea_shells",
            "paragraphs": [
                {
                    "context": " Shells lie on the shore. They are white. ",
                    "qas": [
                        {
                            "question": "Where do shells lie?  ",
                            "id": "1",
                            "answers": [
                                {"text": "on the shore ", "answer_start": 10},
                                {"text": "the shore", "answer_start": 13},
                                {"text": "on the shore", "answer_start": 10},
                            ],
                            "is_impossible": False,
                        },
                        {"question": "Who sells them?", "id": "2", "answers": [], "is_impossible": True},
                    ],
                },
                {
                    "context": "Kelp grows fast.",
                    "qas": [{"question": "What grows?", "id": "3", "answers": [{"text": "Kelp", "answer_start": 0}]}],
                },
            ],
        }
    ],
}
ROWS = [
    {"text": "\nThe device is a pump.\nProduct code: ", "value": " ABC "},
    {"text": "Nothing is known. Colour:", "value": " "},
    {"text": "It weighs 3 kg. Weight:", "value": "3 kg"},
]


def test_published_squad(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(SQUAD))
    first = (
        "Title: Sea shells\n\nBackground: Shells lie on the shore. They are white.\n\nQuestion: Where do shells lie?"
    )
    samples = load_recall("squad", path)
    assert samples == [
        RecallSample(f"{first}\n\nAnswer:", ("on the shore", "the shore"), passage=0),
        RecallSample(
            "Title: Sea shells\n\nBackground: Kelp grows fast.\n\nQuestion: What grows?\n\nAnswer:",
            ("Kelp",),
            passage=1,
        ),
    ]
    assert load_recall("squad", str(path), limit=2) == samples


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_limit_draws_from_all_samples_and_keeps_their_order(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"many.{ending}"
    if ending == "jsonl":
        path.write_text("\n".join(json.dumps({"text": f"The number {n} is", "value": f"{n}"}) for n in range(300)))
    else:
        asked = [{"question": f"{n}?", "answers": [{"text": f"{n}"}]} for n in range(300)]
        paragraphs = [{"context": "C", "qas": asked[start : start + 5]} for start in range(0, 300, 5)]
        path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    whole = load_recall("squad", path)
    drawn = [load_recall("squad", path, limit=30, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] == load_recall("squad", path, limit=30)
    assert drawn[0] != drawn[2]
    places = [[whole.index(sample) for sample in samples] for samples in drawn]
    assert all(found == sorted(set(found)) and len(found) == 30 for found in places)
    assert all(min(found) < 60 and max(found) >= 240 for found in places)
    assert load_recall("squad", path, limit=1000) == whole


def test_a_blank_answer_is_none(tmp_path: Path) -> None:
    """Every text contains it."""
    asked = (("A?", [" "]), ("B?", ["", "b"]))
    questions = [{"question": question, "answers": [{"text": text} for text in given]} for question, given in asked]
    article = {"title": "T", "paragraphs": [{"context": "C", "qas": questions}]}
    (tmp_path / "squad.json").write_text(json.dumps({"data": [article]}))
    assert [sample.answers for sample in load_recall("squad", str(tmp_path / "squad.json"))] == [("b",)]


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "json"])
@pytest.mark.parametrize("task", ["fda", "swde", "squad"])
def test_rows_are_stripped_and_those_without_an_answer_left_out(tmp_path: Path, task: str, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        path.write_text(json.dumps(ROWS) if ending == "json" else "\n".join(map(json.dumps, ROWS)))
    assert load_recall(task, path) == [
        RecallSample("The device is a pump.\nProduct code:", ("ABC",)),
        RecallSample("It weighs 3 kg. Weight:", ("3 kg",)),
    ]


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no recall task drop; give one of fda, swde, squad"):
        load_recall("drop")
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl does not exist"):
        load_recall("fda", tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="limit is 0"):
        load_recall("fda", limit=0)
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"data": [{"title": "A", "paragraphs": [{"context": "B"}]}]}))
    with pytest.raises(ValueError, match=r"not as SQuAD publishes its questions \('qas'\)"):
        load_recall("squad", broken)
    broken.write_text(json.dumps({"data": []}))
    with pytest.raises(ValueError, match="holds no sample with an answer"):
        load_recall("squad", broken)
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "?", "answer": "!"}\n')
    with pytest.raises(ValueError, match="no column 'text'"):
        load_recall("fda", other)
    other.write_text('{"text": "?"}\n')
    with pytest.raises(ValueError, match="no column 'value'"):
        load_recall("fda", other)
    other.write_text('{"text": "?", "value": "!"}\n{"text": "?", "value": 3}\n')
    with pytest.raises(ValueError, match="a row without a text or a value"):
        load_recall("fda", other)
    (tmp_path / "other.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"cannot read .*other\.parquet"):
        load_recall("swde", tmp_path / "other.parquet")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("dev.json", json.dumps(SQUAD), True),
        ("dev.jsonl", json.dumps(SQUAD), False),
        ("rows.json", json.dumps({"data": [{"text": "a", "value": "b"}]}), False),
        ("none.json", json.dumps({"data": []}), False),
        ("list.json", json.dumps([{"paragraphs": []}]), False),
        ("broken.json", "{", False),
    ],
)
def test_what_squads_own_file_is(tmp_path: Path, name: str, content: str, expected: bool) -> None:
    (tmp_path / name).write_text(content)
    assert is_published_squad(tmp_path / name) is expected
    assert not is_published_squad(tmp_path / "absent.json")


def test_a_file_of_squad_that_is_cut_short_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    for start in ('{"version": "v2.0", "data": [', '{ "data": [{"title": "x"'):
        path.write_text(start)
        with pytest.raises(UnreadableError, match=r"dev\.json: it begins as SQuAD's questions and is no JSON"):
            is_published_squad(path)
