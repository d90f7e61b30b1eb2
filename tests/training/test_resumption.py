"""Runs that are killed at any moment, disks that are full, checkpoints that are damaged, runs that go on."""

import dataclasses
import json
import multiprocessing
import os
import random
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import MODEL, TASK
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from holdfast import HybridForCausalLM
from holdfast.cli import main
from holdfast.settings import to_toml
from holdfast.training import (
    CheckpointError,
    ControllerConfig,
    HybridTrainer,
    RetentionSchedule,
    RunDirectoryError,
    checkpointing,
    read_metrics,
    train,
)
from holdfast.training.checkpointing import explaining_reads
from holdfast.training.recipe import NeedleData, OutputSection, Recipe, TextData, TrainingSection, load_recipe


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Processes are forked here: GNU's OpenMP would wait in them for threads that they do not have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_recipe(directory: Path, **training) -> Recipe:
    """Twelve steps with all that has a state: dropout, exploration, accumulation, a frozen scorer, a damped λ, Adam."""
    settings = {"max_steps": 12, "batch_size": 2, "accumulation": 2, "learning_rate": 1e-2, "warmup_steps": 2}
    return Recipe(
        name="run",
        model=MODEL,
        training=TrainingSection(**(settings | {"log_every": 1, "save_every": 3} | training)),
        data=NeedleData(task=TASK),
        controller=ControllerConfig(initial=1e-2, minimum=1e-3, interval=2, proportional=True, damping=2.0),
        retention=RetentionSchedule(scorer_freeze_steps=2, exploration=0.5, exploration_end=1.0),
        output=OutputSection(directory=str(directory)),
    )


def losses(run: Path) -> list[dict]:
    """Every logged number that does not depend on the clock."""
    lines = read_metrics(run / "metrics.jsonl")
    timed = {"seconds", "tokens_per_second", "utilisation"}
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if "loss" in line]


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def in_a_process(work, kill_after: float | None = None) -> int:
    """Run `work` in a process of its own, killed after so many seconds; its exit status, −9 where it was killed."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(kill_after)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(number: int, function):
    """`function`, but the process dies in place of call `number`, counted from 1."""
    calls = [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            die()
        return function(*args, **kwargs)

    return counted


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    return train(make_recipe(tmp_path_factory.mktemp("uninterrupted")))


def while_training(monkeypatch) -> None:
    class DieAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                die()

    original = HybridTrainer.__init__

    def with_killer(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(DieAt())

    monkeypatch.setattr(HybridTrainer, "__init__", with_killer)


# A checkpoint is three calls of torch.save, and one more for the arguments; from the third on, the oldest is removed.
# Before that, what the run replaced is removed once: nothing, here.
MOMENTS = {
    "while training": (while_training, 6),
    "before a checkpoint is complete": (lambda m: m.setattr(torch, "save", on_call(7, torch.save)), 3),
    "before it has its name": (
        lambda m: m.setattr(checkpointing, "publish_directory", on_call(3, checkpointing.publish_directory)),
        6,
    ),
    "while an old one is removed": (
        lambda m: m.setattr(checkpointing.shutil, "rmtree", on_call(3, lambda *a, **k: None)),
        9,
    ),
    "before the model is in its place": (lambda m: m.setattr(HybridTrainer, "save_final", die), 12),
    "while the model is written": (
        lambda m: m.setattr(HybridForCausalLM, "save_pretrained", on_call(5, HybridForCausalLM.save_pretrained)),
        12,
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment(moment, uninterrupted, tmp_path, monkeypatch):
    prepare, last = MOMENTS[moment]
    recipe = make_recipe(tmp_path)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        prepare(patch)
        assert in_a_process(lambda: train(recipe)) == -signal.SIGKILL
    assert get_last_checkpoint(run) == str(run / f"checkpoint-{last}")  # what the Trainer itself would resume
    assert not (run / "summary.json").exists()
    warnings: list[str] = []
    monkeypatch.setattr(checkpointing.logger, "warning", warnings.append)
    train(recipe, resume=True)
    assert same_weights(run, uninterrupted)
    assert losses(run) == losses(uninterrupted)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in uninterrupted.iterdir())
    left = moment not in ("while training", "before the model is in its place")
    assert any("removed what an interrupted run left incomplete (" in line for line in warnings) == left


def test_killed_again_and_again_at_any_moment(uninterrupted, tmp_path):
    recipe, draw = make_recipe(tmp_path), random.Random(0)
    run = tmp_path / "run"
    kills = 0
    while in_a_process(lambda: train(recipe, resume=True), draw.uniform(0.05, 0.4) if kills < 12 else None):
        kills += 1
        assert kills <= 12
        newest = get_last_checkpoint(run) if run.exists() else None
        if newest is not None:
            state = TrainerState.load_from_json(os.path.join(newest, "trainer_state.json"))
            assert newest.endswith(f"checkpoint-{state.global_step}")
    assert kills > 2
    assert same_weights(run, uninterrupted)
    assert losses(run) == losses(uninterrupted)


def test_shuffled_text_resumes_in_its_second_epoch(tmp_path, monkeypatch):
    rows = [{"text": f"{number}: the kelp holds on to the rock, " * (1 + number % 3)} for number in range(7)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(name: str) -> Recipe:
        made = make_recipe(tmp_path / name, batch_size=1)
        data = TextData(str(tmp_path / "train.jsonl"), length=32)
        return dataclasses.replace(made, model=MODEL | {"vocab_size": 259}, data=data)

    whole = train(recipe("whole"))
    with monkeypatch.context() as patch:
        while_training(patch)
        assert in_a_process(lambda: train(recipe("killed"))) == -signal.SIGKILL
    assert losses(train(recipe("killed"), resume=True)) == losses(whole)


@pytest.mark.parametrize(
    ("file", "what"),
    [("model.safetensors", "weights"), ("optimizer.pt", "optimizer state"), ("rng_state.pth", "random state")],
)
@pytest.mark.parametrize("damage", ["short", "garbage"])
def test_a_damaged_checkpoint_is_named(file, what, damage, tmp_path, capsys):
    recipe = make_recipe(tmp_path, max_steps=3)
    run = train(recipe)
    (run / "summary.json").unlink()
    content = (run / "checkpoint-3" / file).read_bytes()
    broken = content[: len(content) // 2] if damage == "short" else os.urandom(len(content))
    (run / "checkpoint-3" / file).write_bytes(broken)
    longer = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, max_steps=6))
    with pytest.raises(CheckpointError, match=rf"The {what} of .*checkpoint-3 cannot be read \(.*\): remove"):
        train(longer, resume=True)
    (tmp_path / "longer.toml").write_text(to_toml(longer))
    capsys.readouterr()
    assert main(["train", str(tmp_path / "longer.toml"), "--resume"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "checkpoint-3" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"holdfast: The {what} of ")


@pytest.mark.parametrize("content", ['{"format"', '{"format": 1}', "[]", '{"lanes": {"0": {}}}', '{"lanes": []}'])
def test_a_damaged_position_in_the_data_is_named(content, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"{row}: kelp"}) + "\n" for row in range(64)))
    data = TextData(str(tmp_path / "rows.jsonl"), length=32, in_memory=0, lanes=4, shuffle=8)
    recipe = dataclasses.replace(make_recipe(tmp_path, max_steps=3), model=MODEL | {"vocab_size": 259}, data=data)
    run = train(recipe)
    (run / "summary.json").unlink()
    file = run / "checkpoint-3" / "data_position" / "rank-00000.json"
    if "lanes" in content:  # damaged further down
        content = json.dumps(json.loads(file.read_text()) | json.loads(content))
    file.write_text(content)
    longer = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, max_steps=6))
    with pytest.raises(CheckpointError, match=r"The data position of .*checkpoint-3 cannot be read \(.+\): remove"):
        train(longer, resume=True)


@pytest.mark.parametrize("content", [b"\x80\x02t.", b"\x80\x02h\x07.", b"\x80\x02X\x04\0\0\0\xff\xff\xff\xff.", b""])
def test_every_failure_to_unpickle_is_explained(content, tmp_path):
    """Bytes that end in an IndexError, a KeyError, a UnicodeDecodeError and an EOFError."""
    (tmp_path / "state.pt").write_bytes(content)
    with (
        pytest.raises(CheckpointError, match=r"The state of here cannot be read \(.+\): remove"),
        explaining_reads("here", "state"),
    ):
        torch.load(tmp_path / "state.pt", weights_only=True)


def test_a_checkpoint_without_its_state_is_passed_over(uninterrupted, tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path)
    with monkeypatch.context() as patch:
        while_training(patch)
        assert in_a_process(lambda: train(recipe)) == -signal.SIGKILL
    state = tmp_path / "run" / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:20])
    assert losses(train(recipe, resume=True)) == losses(uninterrupted)


def test_a_full_disk_ends_the_run_in_one_line(tmp_path, capfd):
    path = tmp_path / "full.toml"
    path.write_text(to_toml(make_recipe(tmp_path)))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))  # as if the disk were full there
        os._exit(main(["train", str(path)]))

    assert in_a_process(limited) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("holdfast: The checkpoint of step 3 could not be written to ")
    assert "File too large" in lines[-1] or "os error 27" in lines[-1]
    assert [line for line in lines if line.startswith("holdfast: ")] == lines[-1:]
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "recipe.toml"]
    train(make_recipe(tmp_path), resume=True)  # once there is room again


def test_a_checkpoint_may_be_given_by_its_path(tmp_path):
    recipe = make_recipe(tmp_path, max_steps=6)
    run = train(recipe)
    (run / "summary.json").unlink()
    (run / "checkpoint-3").rename(tmp_path / "kept")
    train(recipe, resume=str(tmp_path / "kept"))
    assert [line["step"] for line in losses(run)] == list(range(1, 7))
    with pytest.raises(CheckpointError, match=r"The training state of .*absent cannot be read"):
        train(dataclasses.replace(recipe, name="other"), resume=str(tmp_path / "absent"))


def test_a_finished_run_goes_on_with_more_steps(tmp_path):
    recipe = make_recipe(tmp_path, max_steps=6)
    run = train(recipe)
    weights = (run / "model.safetensors").stat().st_mtime_ns
    assert train(recipe, resume=True) == run  # nothing is left to do, and to say so is no failure
    assert (run / "model.safetensors").stat().st_mtime_ns == weights
    with pytest.raises(RunDirectoryError, match=r"finished run: raise training\.max_steps above 6 to go on"):
        train(make_recipe(tmp_path, max_steps=5), resume=True)
    longer = make_recipe(tmp_path, max_steps=10)
    train(longer, resume=True)
    lines = losses(run)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[-1]["learning_rate"] < lines[7]["learning_rate"] > lines[5]["learning_rate"]  # the longer schedule
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 10
    assert summary["training_loss"] == pytest.approx(sum(line["loss"] for line in lines) / 10)  # of both parts
    assert summary["seconds"] >= read_metrics(run / "metrics.jsonl")[-1]["seconds"] - 0.1
    (run / "summary.json").unlink()
    with pytest.raises(CheckpointError, match=r"max_steps is 8, but .*checkpoint-10 is past it"):
        train(make_recipe(tmp_path, max_steps=8), resume=True)
    assert load_recipe(run / "recipe.toml").training.max_steps == 10  # what was refused has changed nothing
