"""`holdfast tokenizer`, `prepare` and `bench data`: what they write, and how they refuse."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from text_files import write_rows
from torch.utils.data import ConcatDataset

from holdfast.cli import main
from holdfast.cli.train import chosen_recipe
from holdfast.data.text import TextStream, load_tokenizer, open_prepared
from holdfast.training.recipe import TextData
from holdfast.training.text_blocks import training_blocks

SENTENCE = "the kelp holds on to the rock and the rock holds on to the sea. "


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", [f"{number}: {SENTENCE}" for number in range(50)])
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong call gets."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_tokenizer_and_a_prepared_corpus(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, target = str(tmp_path / "own"), str(tmp_path / "prepared")
    assert main(["tokenizer", str(corpus), own, "--vocab-size", "290"]) == 0
    assert "A tokenizer of 290 tokens is in" in capsys.readouterr().out
    tokenizer = load_tokenizer(own)
    assert tokenizer.padding_side == "left"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert main(["prepare", str(corpus), target, "--tokenizer", own, "--splits", "train", "validation"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "train: " in shown
    assert "tokens of 50 documents in" in shown
    assert len(open_prepared(target, 16, split="validation")) == len(open_prepared(target, 16)) > 10
    assert "holds a tokenizer already" in refused(capsys, "tokenizer", str(corpus), own, "--vocab-size", "290")


def test_the_commands_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand there, but for the size of what they make; of training, the settings and the data."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        write_rows(Path("corpus") / f"{split}.jsonl", [f"{number}: {SENTENCE}" for number in range(300)])
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    lines = [line.split("#")[0].split()[1:] for line in page.splitlines() if line.startswith("holdfast ")]
    assert [line[0] for line in lines] == ["tokenizer", "train", "prepare", "train"]
    kinds = []
    for command, *arguments in lines:
        if command != "train":
            assert main([command, *(argument.replace("32000", "300") for argument in arguments)]) == 0
            continue
        data = chosen_recipe(arguments[0], arguments[1:]).data
        assert isinstance(data, TextData)
        data = dataclasses.replace(data, in_memory=0, length=64, lanes=2)
        kinds.append(type(training_blocks(data, load_tokenizer("tokenizers/mine"), seed=0, workers=0)))
    assert kinds == [TextStream, ConcatDataset]
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(code.replace("2048", "64"), "docs/data.md", "exec"), names)
    assert names["batch"]["input_ids"].shape[1] == 64


def test_a_tokenizer_of_the_first_characters(corpus: Path, tmp_path: Path) -> None:
    tokens = {}
    for characters in (10, 100_000):
        out = tmp_path / str(characters)
        call = ["tokenizer", str(corpus), str(out), "--vocab-size", "400", "--characters", str(characters)]
        assert main(call) == 0
        tokens[characters] = len(load_tokenizer(out))
    assert tokens[10] < tokens[100_000]


def test_wrong_calls(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert "no column 'body'" in refused(capsys, "prepare", str(corpus), out, "--tokenizer", "byte", "--column", "body")
    assert "split test" in refused(capsys, "prepare", str(corpus), out, "--tokenizer", "byte", "--splits", "test")
    assert "--workers is 0" in refused(capsys, "prepare", str(corpus), out, "--tokenizer", "byte", "--workers", "0")
    assert "does not exist" in refused(capsys, "tokenizer", "./nothing", out, "--vocab-size", "300")
    assert "--characters is 0" in refused(
        capsys, "tokenizer", str(corpus), out, "--vocab-size", "300", "--characters", "0"
    )
    assert not (tmp_path / "out").exists()
    assert "vocab_size is 100" in refused(capsys, "tokenizer", str(corpus), out, "--vocab-size", "100")


def test_splits_of_one_file_are_not_prepared(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["prepare", str(corpus / "train.jsonl"), str(tmp_path / "out"), "--tokenizer", "byte", "--splits"]
    message = refused(capsys, *call, "train", "validation")
    assert "train.jsonl is one file, so its splits 'train' and 'validation' would be the same text" in message
    assert "--splits train" in message
    assert not (tmp_path / "out").exists()
    assert main([*call, "validation"]) == 0


def test_every_target_and_every_file_is_checked_before_the_first_is_prepared(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["prepare", str(corpus), str(tmp_path / "out"), "--tokenizer", "byte", "--splits"]
    assert main([*call, "validation"]) == 0
    assert "holds a prepared split 'validation' already" in refused(capsys, *call, "train", "validation")
    for split in ("train", "validation"):
        for number in range(2):
            path = write_rows(tmp_path / "damaged" / f"{split}-{number}.parquet", [SENTENCE] * 50)
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["prepare", str(tmp_path / "damaged"), *call[2:], "train", "test"]) == 2
    assert main(["prepare", str(tmp_path / "damaged"), str(tmp_path / "new"), *call[3:], "train", "validation"]) == 1
    assert "validation-1.parquet" in capsys.readouterr().err
    assert not (tmp_path / "out" / "train.json").exists()
    assert not (tmp_path / "new").exists()


def test_bench_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "data.json"
    call = "bench data --documents 300 --tokenizers byte bpe --workers 0 1 --seconds 0.05 --length 64 --shuffle 4"
    assert main([*call.split(), "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert [(rate["tokenizer"], rate["workers"]) for rate in report["rates"]] == [
        ("byte", 0),
        ("byte", 1),
        ("bpe", 0),
        ("bpe", 1),
    ]
    assert all(rate["tokens_per_second"] > 0 for rate in report["rates"])
    assert report["memory"]["peak_bytes"] >= max(report["memory"]["resident_bytes"]) > 0
    assert report["machine"]["packages"]["holdfast"]
    assert "Resident memory" in capsys.readouterr().out
    assert "must be at least 1" in refused(capsys, "bench", "data", "--documents", "0")
