"""The same kind of fault has the same exit status, and a line that names the file, whichever command meets it."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast import HybridConfig, HybridForCausalLM
from holdfast.cli import main
from holdfast.data.text import byte_tokenizer

COMMANDS = {
    "perplexity": "evaluate perplexity MODEL --data TEXT --length 32 --samples 1",
    "needle": "evaluate needle MODEL --length 1024 --samples 1 --depths 0",
    "turns": "evaluate turns MODEL --samples 1 --turns 2",
    "scorers": "evaluate scorers MODEL --data TEXT --length 32 --samples 1 --budgets 8 --scorers trained",
    "efficiency": "evaluate efficiency MODEL --data TEXT --contexts 16 --steps 2 --repeats 1 --no-memory",
    "generate": "generate MODEL hello --max-new-tokens 1",
    "inspect": "inspect MODEL hello --output page.html",
    "convert": "convert MODEL made --format published",
}
OF_TEXT = {
    "perplexity": "evaluate perplexity MODEL --data TEXT --length 32",
    "scorers": "evaluate scorers MODEL --data TEXT --length 32 --budgets 8 --scorers trained",
    "efficiency": "evaluate efficiency MODEL --data TEXT --contexts 16",
    "haystack": "evaluate needle MODEL --tasks niah_single_2 --haystack TEXT --length 1024",
    "recall": "evaluate recall MODEL --tasks squad --data TEXT",
    "prepare": "prepare TEXT made --tokenizer byte",
    "tokenizer": "tokenizer TEXT made --vocab-size 300",
    "train": "train text.toml --data.source TEXT --output.directory made",
    "inspect": "inspect MODEL --file TEXT",
}
RECIPE = """\
name = "tiny"
[model]
vocab_size = 259
hidden_size = 16
num_hidden_layers = 1
mixers = ["gated_deltanet"]
mixer_options = { gated_deltanet = { num_heads = 2, head_dim = 8 } }
[data]
kind = "text"
source = "nowhere"
length = 16
[training]
max_steps = 1
batch_size = 1
learning_rate = 1e-3
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that reads text, in the working directory; beside it a text and a recipe."""
    torch.manual_seed(0)
    options = {
        "gated_deltanet": {"num_heads": 2, "head_dim": 8},
        "learned_eviction": {"num_heads": 2, "window": 8, "budget": 4, "sinks": 1},
    }
    config = HybridConfig(vocab_size=259, hidden_size=16, num_hidden_layers=2, mixer_options=options)
    HybridForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("It was the best of times. " * 50)
    (tmp_path / "text.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model"


def status_and_line(call: str, capfd: pytest.CaptureFixture[str], model: str = "model", text: str = "text.txt") -> str:
    capfd.readouterr()
    status = main(call.replace("MODEL", model).replace("TEXT", text).split())
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("holdfast: ")]
    assert len(lines) == 1
    return f"{status} {lines[0].removeprefix('holdfast: ')}"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_a_tensor(path: Path) -> None:
    state = load_file(path)
    del state["model.norm.weight"]
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("command", COMMANDS)
def test_faults_of_models(command: str, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    call = COMMANDS[command]
    assert status_and_line(call, capfd, "absent").startswith("2 There is no model directory absent")
    Path("empty").mkdir()
    assert status_and_line(call, capfd, "empty").startswith("2 empty holds no saved model (no config.json)")
    faults = [
        ("config.json", cut, "config.json"),
        ("config.json", lambda path: path.write_text('{"model_type": "llama"}'), "is 'llama'"),
        ("model.safetensors", cut, "model.safetensors cannot be read ("),
        ("model.safetensors", lambda path: path.write_bytes(b""), "model.safetensors cannot be read ("),
        ("model.safetensors", lambda path: path.unlink(), "model.safetensors"),
        ("model.safetensors", drop_a_tensor, "missing model.norm.weight"),
        ("tokenizer.json", cut, "tokenizer.json cannot be read: it is no JSON ("),
        ("tokenizer.json", lambda path: path.write_bytes(b""), "tokenizer.json cannot be read: it is no JSON ("),
        ("tokenizer_config.json", cut, "tokenizer_config.json cannot be read: it is no JSON ("),
    ]
    for number, (name, damage, told) in enumerate(faults):
        folder = Path(f"damaged-{number}")
        shutil.copytree(model, folder)
        damage(folder / name)
        line = status_and_line(call, capfd, str(folder))
        assert line.startswith("1 "), line
        assert told in line
        assert str(folder) in line
    assert not Path("made").exists()


@pytest.mark.parametrize("command", OF_TEXT)
def test_faults_of_texts(command: str, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    call, damaged = OF_TEXT[command], "damaged.txt" if command == "inspect" else "damaged.parquet"
    line = status_and_line(call, capfd, text="./absent.txt")
    assert line.startswith("2 ")
    assert "absent.txt" in line
    Path(damaged).write_bytes(b"\xff\xfe\xfa nonsense")
    line = status_and_line(call, capfd, text=damaged)
    assert line.startswith("1 ")
    assert damaged in line
    assert not Path("made").exists()


def test_faults_of_tokenizers_by_name(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    (model / "tokenizer.json").write_text("{}")
    for call in (
        "prepare text.txt made --tokenizer MODEL",
        "train text.toml --data.source text.txt --data.tokenizer MODEL --output.directory made",
    ):
        line = status_and_line(call, capfd, "./absent")
        assert line.startswith("2 cannot load tokenizer absent: there is no such directory")
        assert status_and_line(call, capfd, "empty") == "2 cannot load tokenizer empty: it holds no tokenizer.json."
        line = status_and_line(call, capfd, "model")
        assert line.startswith("1 model/tokenizer.json cannot be read as a tokenizer (")


def test_a_place_that_is_taken(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model, "copy")
    line = status_and_line("convert MODEL copy --format published", capfd)
    assert line == "2 copy exists already; give another TARGET, or --overwrite to replace it."
    line = status_and_line("convert MODEL MODEL --format published --overwrite", capfd)
    assert line == f"2 {model} holds the source, which would be lost: choose another target."
    assert main(["convert", "model", "copy", "--format", "published", "--overwrite"]) == 0
    for call in (
        "prepare text.txt prepared --tokenizer byte",
        "tokenizer text.txt tokenizer --vocab-size 270",
        "train text.toml --data.source text.txt --output.directory runs --training.max-steps 1",
    ):
        assert main(call.split()) == 0
        assert status_and_line(call, capfd).startswith("2 ")
    Path("demo").mkdir()
    Path("demo/mine").touch()
    assert "2 demo holds something that no demo wrote" in status_and_line("demo --output demo", capfd)
    assert Path("demo/mine").exists()


@pytest.mark.parametrize(
    "call",
    [
        "evaluate needle MODEL",
        "evaluate recall MODEL --tasks squad --data text.txt",
        "evaluate turns MODEL",
        "evaluate scorers MODEL --data text.txt",
        "evaluate efficiency MODEL",
        "evaluate all MODEL --output made",
        "info MODEL",
        "report MODEL",
    ],
)
def test_the_same_thing_twice(call: str, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert status_and_line(call, capfd, "model model") == "2 model is given twice; give it once."
    for again in ("./model", str(model), "../" + model.parent.name + "/model/"):
        line = status_and_line(call, capfd, f"model {again}")
        assert re.fullmatch(r"2 model is given twice(, as \S*/model/? too)?; give it once\.", line)
    assert not Path("made").exists()
    assert "gdn-lte-1.4b is given twice" in status_and_line("info gdn-lte-1.4b gdn-swa-1.4b gdn-lte-1.4b", capfd)


def test_conversion_does_not_go_on_without_a_damaged_file(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (model / "generation_config.json").write_text("{ nope")
    line = status_and_line("convert MODEL made --format holdfast", capfd)
    assert line.startswith("1 model/generation_config.json cannot be read: it is no JSON (")
    assert not Path("made").exists()
