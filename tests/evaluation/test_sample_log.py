"""The log of answers: what is found again, what is not taken for another's, what a killed run leaves."""

import json
from pathlib import Path

import pytest

from holdfast.evaluation.sample_log import SampleLog, model_fingerprint, text_fingerprint


def test_answers_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    first = SampleLog(path, {"seed": 0})
    assert first.records == {}
    assert not path.exists()
    first.append({"a/0": {"given": "ä", "right": True}, "a/1": {"given": "b\n", "right": False}})
    first.append({"a/2": {"given": "", "right": False}})
    again = SampleLog(str(path), {"seed": 0})
    assert again.records == first.records
    assert list(again.records) == ["a/0", "a/1", "a/2"]
    assert [json.loads(line)["sample"] for line in path.read_text().splitlines()] == list(again.records)


def test_answers_of_other_settings_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    one, other = SampleLog(path, {"seed": 0}), SampleLog(path, {"seed": 1})
    one.append({"a": {"given": "one"}})
    other.append({"a": {"given": "other"}})
    assert SampleLog(path, {"seed": 0}).records == {"a": {"given": "one"}}
    assert SampleLog(path, {"seed": 1}).records == {"a": {"given": "other"}}
    assert SampleLog(path, {"seed": 2}).records == {}


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_cut_off_is_dropped_and_written_anew(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log.jsonl"
    SampleLog(path, {}).append({"a": {"given": "one"}, "b": {"given": "zwö", "right": True}})
    path.write_bytes(path.read_bytes()[:-cut])
    log = SampleLog(path, {})
    assert log.records == {"a": {"given": "one"}}
    log.append({"b": {"given": "three"}})
    assert SampleLog(path, {}).records == {"a": {"given": "one"}, "b": {"given": "three"}}


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"run": "x"}', "\x00\x00"])
def test_another_file_is_refused_and_left_as_it_is(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    SampleLog(path, {}).append({"a": {}})
    with path.open("a") as file:
        file.write(f"{line}\nrest")
    before = path.read_bytes()
    with pytest.raises(
        ValueError,
        match=r"line 2 of .*log\.jsonl is no answer of an evaluation; remove that line, or give another file",
    ):
        SampleLog(path, {})
    assert path.read_bytes() == before


def test_without_a_path_nothing_is_kept() -> None:
    log = SampleLog(None, {})
    log.append({"a": {"given": "one"}})
    assert log.records == {"a": {"given": "one"}}
    assert SampleLog(None, {}).records == {}


def test_a_fingerprint_tells_models_apart_wherever_they_are(tmp_path: Path) -> None:
    def save(name: str, weights: bytes, config: str = "{}") -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "config.json").write_text(config)
        return model_fingerprint(tmp_path / name)

    large = bytes(3 << 20)
    same = [save("a", large), save("b", large)]
    middle = large[: 1 << 21] + b"x" + large[(1 << 21) + 1 :]
    others = [save("c", large[:-1] + b"x"), save("d", middle), save("e", large[1:]), save("f", large, "{ }")]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 5
    (tmp_path / "a" / "recipe.toml").write_text("window = 6")
    assert model_fingerprint(tmp_path / "a") != same[0]


def test_a_text_is_known_by_its_contents(tmp_path: Path) -> None:
    for folder, last in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "one.txt").write_text("same")
        (tmp_path / folder / "deep" / "two.txt").write_text(last)
    same, copy, other = (text_fingerprint(str(tmp_path / folder)) for folder in "abc")
    assert same == copy != other
    assert text_fingerprint(str(tmp_path / "a/one.txt")) == text_fingerprint(str(tmp_path / "b/one.txt"))
    assert text_fingerprint("owner/name") == "owner/name"  # on the hub
