"""The command line: what it shows, what it writes, and how it refuses."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import HybridConfig, HybridForCausalLM, __version__
from holdfast.cli import COMMANDS, main
from holdfast.cli import info as info_command
from holdfast.data.needle import NeedleTask
from holdfast.data.text import byte_tokenizer, load_text, load_tokenizer, prepare, train_tokenizer
from holdfast.evaluation.needle import NeedleResult
from holdfast.training.trainer import HybridTrainer
from holdfast.units import format_bytes, format_count

RECIPE = """\
name = "tiny"
description = "Seconds of training."

[model]
vocab_size = 27
hidden_size = 16
num_hidden_layers = 2
mixers = ["gated_deltanet", "learned_eviction"]

[model.mixer_options.gated_deltanet]
num_heads = 2
head_dim = 8

[model.mixer_options.learned_eviction]
num_heads = 2
head_dim = 8
window = 8
budget = 6
sinks = 1

[data]
kind = "needle"

[data.task]
length = 32
num_pairs = 4
num_keys = 8
num_values = 8
num_noise = 8
window = 8

[training]
max_steps = 2
batch_size = 4
learning_rate = 1e-3
log_every = 1
"""


def save_model(directory: Path, vocab_size: int, *, text: bool) -> Path:
    """An untrained model with a full-attention layer; with a byte tokenizer where it is one of text."""
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        mixers=["gated_deltanet", "full_attention"],
        mixer_options={"gated_deltanet": {"num_heads": 2, "head_dim": 8}, "full_attention": {"num_heads": 2}},
        initializer_range=0.2,
        eos_token_id=None,
    )
    HybridForCausalLM(config).save_pretrained(directory)
    if text:
        byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "text", 259, text=True))


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail; its one line of error, with the exit status in front."""
    capsys.readouterr()
    status = main(argv)
    error = capsys.readouterr().err
    assert error.startswith("holdfast: ")
    assert error.count("\n") == 1
    return f"{status} {error.strip()}"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_names_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: holdfast {command}" in shown
    assert "examples:" in shown
    assert f"  holdfast {command} " in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"holdfast {__version__}\n"


def test_as_a_process() -> None:
    command = [sys.executable, "-m", "holdfast.cli", "frobnicate"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("holdfast: There is no command 'frobnicate'")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "2 holdfast: There is no command 'nothing'"),
        (["train", "needle-lalt"], "2 holdfast: There is no recipe 'needle-lalt' (did you mean 'needle-lalte'?)"),
        (["train", "absent.toml"], "2 holdfast: There is no recipe file absent.toml"),
        (["train", "--resume"], "2 holdfast: Give the recipe first"),
        (["train", "needle-gdn", "--model.num-hidden-layers", "0"], "2 holdfast: [model]"),
        (
            ["train", "needle-gdn", "--training.max-steps", "0"],
            "2 holdfast: Error parsing training: max_steps must be at least 1",
        ),
        (["info", "absent"], "2 holdfast: There is no recipe 'absent'"),
        (["info", "needle-gdn", "--batch-size", "0"], "2 holdfast: --batch-size is 0"),
        (["evaluate", "needle", "absent"], "2 holdfast: There is no model directory absent"),
        (["evaluate", "needle"], "2 holdfast: Give at least one model directory"),
        (["evaluate", "perplexity", "absent", "--data", "x"], "2 holdfast: There is no model directory absent"),
        (["generate", "absent", "Hello"], "2 holdfast: There is no model directory absent"),
        (["convert", "absent", "target", "--format", "published"], "2 holdfast: There is no model directory absent"),
        (["generate", "absent", "Hello", "--top-k", "3"], "2 holdfast: --temperature, --top-k and --top-p"),
        (["generate", "absent", "Hello", "--max-new-tokens", "0"], "2 holdfast: --max-new-tokens is 0"),
        (["demo", "--steps", "0"], "2 holdfast: steps must be at least 1"),
    ],
)
def test_wrong_calls_are_refused_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *argv).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_close_option_is_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "train", "needle-gdn", "--training.max-step", "3")
    assert "2 holdfast: Unrecognized option: --training.max-step; did you mean --training.max-steps?" in error
    assert "`holdfast train needle-gdn --help`" in error
    error = refused(capsys, "train", "needle-gdn", "--training.save-steps", "3")
    assert "did you mean --training.save-every?" in error
    error = refused(capsys, "train", "needle-gdn", "--training.max-steps", "x")
    assert error.startswith("2 holdfast: --training.max-steps is 'x'; give an integer.")
    assert "'z'" in refused(capsys, "info", "needle-gdn", "--dtype", "z")
    # --turn-length is an option of another evaluation.
    error = refused(capsys, "evaluate", "recall", "model", "--tasks", "squad", "--turn-len", "20")
    assert "did you mean" not in error
    assert "`holdfast evaluate recall --help`" in error


def test_debug_raises_and_an_interrupt_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no recipe"):
        main(["info", "--debug", "absent"])

    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    def broken(arguments: list[str]) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(info_command, "run", interrupted)
    assert refused(capsys, "info", "x") == "130 holdfast: interrupted"
    monkeypatch.setattr(info_command, "run", broken)
    assert refused(capsys, "info", "x") == "1 holdfast: KeyError: 'lost' (--debug shows where)"


def test_list_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("needle-lalte ") and "laLTE on the needle task" in line for line in lines)


def test_train_evaluate_and_ask(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--output.directory", str(tmp_path / "runs")]
    assert main(["train", recipe, "--training.max-steps", "3", "--training.seed", "5", *runs]) == 0
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
    before = (run / "model.safetensors").read_bytes()
    assert "holds a finished run" in refused(capsys, "train", recipe, *runs)
    assert (run / "model.safetensors").read_bytes() == before

    numbers, picture = tmp_path / "numbers.json", tmp_path / "accuracy.png"
    argv = ["evaluate", "needle", str(run), "--samples", "20", "--pairs", "2", "--length", "48", "--window", "30"]
    assert main([*argv, "--json", str(numbers), "--plot", str(picture)]) == 0
    assert "beyond the window" in capsys.readouterr().out
    written = json.loads(numbers.read_text())
    assert written["machine"]["packages"]["torch"]
    assert written["settings"] == {
        "samples": 20, "length": 48, "num_pairs": 2, "num_queries": None, "window": 30, "seed": 0, "dtype": "float32"
    }  # fmt: skip
    result = NeedleResult.from_dict(written["models"]["tiny"])
    expected = NeedleTask(length=48, num_pairs=2, num_keys=8, num_values=8, num_noise=8, window=30)
    assert (result.task, result.samples, result.total.count) == (expected, 20, 40)
    assert picture.stat().st_size > 10_000
    assert "give that many or more" in refused(capsys, "evaluate", "needle", str(run), "--pairs", "9")

    assert main(["generate", str(run), "--needle", "--seed", "4"]) == 0
    shown = capsys.readouterr()
    sample = NeedleTask(length=32, num_pairs=4, num_keys=8, num_values=8, num_noise=8, window=8).sample(4, 1)
    words = NeedleTask(length=32, num_pairs=4, num_keys=8, num_values=8, num_noise=8).describe(sample["input_ids"][0])
    context, _, questions = words.partition(" ?")
    assert f"context: {context} ?" in shown.out
    rows = [line.replace("│", " ").split() for line in shown.out.splitlines() if line.startswith("│")]
    assert [word for row in rows for word in row[:2]] == questions.split()
    assert " of cache, " in shown.err
    assert "draws its own prompt" in refused(capsys, "generate", str(run), "Hello", "--needle")
    assert "has no tokenizer.json" in refused(capsys, "generate", str(run), "Hello")


def test_resume_continues(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", recipe, "--output.directory", str(tmp_path), "--resume"]
    assert main(argv) == 0
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["resumed_from"] is None
    (tmp_path / "tiny" / "summary.json").unlink()
    assert main(argv) == 0
    assert "checkpoint-2" in json.loads((tmp_path / "tiny" / "summary.json").read_text())["resumed_from"]


def test_an_interrupted_run_says_how_it_goes_on(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["train", recipe, "--output.directory", str(tmp_path), "--training.max-steps", "4"]
    argv += ["--training.save-every", "2"]
    steps, step, stop = [], HybridTrainer.training_step, 1

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        steps.append(None)
        if len(steps) == stop:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(HybridTrainer, "training_step", interrupt)
    assert main(argv) == 130
    assert "before the first checkpoint" in capsys.readouterr().err
    stop = len(steps) + 4
    assert main([*argv, "--output.overwrite"]) == 130
    again = f"{tmp_path / 'tiny' / 'recipe.toml'} --resume"
    assert f"`holdfast train {again}` continues after step 2" in capsys.readouterr().err
    assert "resume it (--resume)" in refused(capsys, *argv)
    stop = -1
    assert main(["train", *again.split()]) == 0
    assert "Continuing after step 2 of 4." in capsys.readouterr().err


def test_a_run_is_resumed_where_it_lies_now(
    recipe: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", recipe, "--output.directory", str(tmp_path / "runs"), "--training.max-steps", "2"]
    assert main(argv) == 0
    moved = (tmp_path / "runs" / "tiny").rename(tmp_path / "moved")
    for place in (moved, moved / "recipe.toml"):
        steps = 1 + json.loads((moved / "summary.json").read_text())["steps"]
        assert main(["train", str(place), "--resume", "--training.max-steps", str(steps)]) == 0
        assert json.loads((moved / "summary.json").read_text())["steps"] == steps
    assert not (tmp_path / "runs" / "tiny").exists()
    assert f"`holdfast train {moved} --resume` continues the run" in refused(capsys, "train", str(moved))
    assert f"{moved} --resume` continues" in refused(capsys, "train", str(moved / "checkpoint-4"), "--resume")
    assert "is a directory without a recipe.toml" in refused(capsys, "train", str(tmp_path / "runs"), "--resume")
    assert main(["train", str(moved), "--resume"]) == 0  # as a scheduler does that starts it again and again
    assert "moved is finished; raise training.max_steps to go on" in caplog.text


def test_a_run_that_cannot_be_written(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    error = refused(capsys, "train", recipe, "--output.directory", str(tmp_path / "file"))
    assert f"Cannot write into {tmp_path / 'file' / 'tiny'}: " in error


def test_generate_text(text_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def generated(*options: str) -> str:
        assert main(["generate", text_model, "Kelp ", "--max-new-tokens", "12", *options]) == 0
        shown = capsys.readouterr()
        assert shown.out.startswith("Kelp ")
        assert "tokens/s" in shown.err
        return shown.out

    assert generated() == generated("--seed", "9")  # greedy
    drawn = ["--sample", "--temperature", "3", "--seed"]
    assert generated(*drawn, "1") == generated(*drawn, "1") != generated(*drawn, "2")
    assert "2 holdfast: The prompt is empty" in refused(capsys, "generate", text_model, "")


def test_generating_beyond_the_length_of_training_is_said_once(
    text_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(text_model, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())

    def told(length: int | None, new_tokens: int) -> list[str]:
        known = {} if length is None else {"max_position_embeddings": length}
        (folder / "config.json").write_text(json.dumps(settings | known))
        assert main(["generate", str(folder), "Kelp ", "--max-new-tokens", str(new_tokens)]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if "was trained on" in line]

    del settings["max_position_embeddings"]
    (line,) = told(10, 6)
    assert line.startswith(
        f"{folder} was trained on 10 tokens at a time, and the prompt with --max-new-tokens makes 11:"
    )
    assert told(11, 6) == told(None, 6) == []


def test_prompt_from_standard_input(
    text_model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text("A line")
    with open(tmp_path / "prompt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert main(["generate", text_model, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("A line")


def test_perplexity(text_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "held_out.txt"
    data.write_text("So holds the kelp the stone it grew upon. " * 30)
    argv = ["evaluate", "perplexity", text_model, "--data", str(data), "--length", "64", "--bins", "4"]
    assert main([*argv, "--json", str(tmp_path / "p.json")]) == 0
    assert "bits per token" in capsys.readouterr().out
    written = json.loads((tmp_path / "p.json").read_text())
    assert (written["evaluation"], written["settings"]["data"]) == ("perplexity", "held_out.txt")
    assert written["machine"]["packages"]["torch"]
    assert "commit" in written["machine"]
    numbers = written["models"]["text"]
    assert numbers["tokens"] == numbers["blocks"] * 63 > 1000
    assert len(numbers["bins"]) == 4
    assert main([*argv, "--samples", "2", "--json", str(tmp_path / "p.json")]) == 0
    assert json.loads((tmp_path / "p.json").read_text())["models"]["text"]["blocks"] == 2
    assert "absent.txt" in refused(capsys, "evaluate", "perplexity", text_model, "--data", str(tmp_path / "absent.txt"))
    argv[argv.index(str(data))] = str(tmp_path / "prepared")
    prepare(load_text(data), tmp_path / "prepared", load_tokenizer(text_model), split="validation", progress=False)
    assert main([*argv, "--json", str(tmp_path / "q.json")]) == 0
    assert json.loads((tmp_path / "q.json").read_text())["models"]["text"] == numbers
    shutil.rmtree(tmp_path / "prepared")
    other = train_tokenizer(["kelp"], 259, progress=False)
    prepare(load_text(data), tmp_path / "prepared", other, split="validation", progress=False)
    assert "was prepared with another tokenizer" in refused(capsys, *argv)


def test_info_of_recipes_and_of_a_directory(
    text_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = tmp_path / "cost.json"
    assert main(["info", "gdn-lte-1.4b", text_model, "--json", str(numbers)]) == 0
    shown = capsys.readouterr().out
    costs = json.loads(numbers.read_text())
    assert costs[text_model]["total_parameters"] == HybridForCausalLM.from_pretrained(text_model).num_parameters()
    assert f"{costs['gdn-lte-1.4b']['total_parameters']:,}" in shown
    assert "1,048,576" in shown
    assert "(0.2%)" in shown  # the scorer's share
    assert costs["gdn-lte-1.4b"]["training"]["tokens"] == 30_720 * 2**20
    assert "training" not in costs[text_model]
    assert "activations (estimate)" in shown
    (tmp_path / "empty").mkdir()
    assert "neither a config.json nor a recipe.toml" in refused(capsys, "info", str(tmp_path / "empty"))


def test_convert_passes_everything_on(
    text_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def convert(source: Path, target: str, **options: object) -> str:
        calls.append((str(source), target, options))
        return target

    monkeypatch.setitem(sys.modules, "holdfast.checkpoints", types.SimpleNamespace(convert=convert))
    target = str(tmp_path / "target")
    assert main(["convert", text_model, target, "--format", "published", "--dtype", "bfloat16", "--overwrite"]) == 0
    options = {"format": "published", "overwrite": True, "allow_pickle": False, "dtype": torch.bfloat16}
    assert calls == [(text_model, target, options)]
    assert f"The converted model is in {target}." in capsys.readouterr().out


def test_numbers_are_readable() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 1024, 1536, 10_240, 512 * 1024, 1 << 40)] == [
        "0 B",
        "999 B",
        "0.977 KiB",
        "1.00 KiB",
        "1.50 KiB",
        "10.0 KiB",
        "512 KiB",
        "1.00 TiB",
    ]
    assert [format_count(n) for n in (7, 999, 2_700_000, 999_600)] == ["7", "999", "2.70 M", "1.00 M"]
