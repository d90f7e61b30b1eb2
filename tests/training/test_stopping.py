"""Runs that are told to end by a SIGTERM: they write a checkpoint first, and go on as if nothing had been."""

import os
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_recipe, metrics_of
from transformers import TrainerCallback

from holdfast.cli import main
from holdfast.settings import to_toml
from holdfast.training import HybridTrainer, TrainingStopped, read_metrics, train


@pytest.fixture
def told_at(monkeypatch):
    """Has this process told to end while it is in a step."""

    class Tell(TrainerCallback):
        def __init__(self, step: int) -> None:
            self.step = step

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == self.step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    original = HybridTrainer.__init__

    def tell(step: int) -> None:
        def telling(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.add_callback(Tell(step))

        monkeypatch.setattr(HybridTrainer, "__init__", telling)

    return tell


def test_a_run_that_is_told_to_end_writes_a_checkpoint(finished, tmp_path, told_at, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    recipe = make_recipe(tmp_path)
    told_at(5)
    with pytest.raises(TrainingStopped) as stop:
        train(recipe)
    assert (stop.value.code, stop.value.step) == (143, 5)
    assert signal.getsignal(signal.SIGTERM) == handler
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]
    assert not (run / "summary.json").exists()
    assert not (run / "model.safetensors").exists()
    monkeypatch.undo()
    train(recipe, resume=True)
    expected, found = load_file(finished[0] / "model.safetensors"), load_file(run / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    # One line more, at step 5: the last two steps before the end, apart.
    assert [line["step"] for line in metrics_of(finished[0])] == [2, 3, 4, 6, 8]
    assert [line["step"] for line in metrics_of(run)] == [2, 3, 4, 5, 6, 8]
    before, after = ({line["step"]: line["lm_loss"] for line in metrics_of(place)} for place in (finished[0], run))
    assert before[6] == pytest.approx((after[5] + after[6]) / 2, rel=1e-6)
    assert [before[step] for step in (2, 3, 4, 8)] == [after[step] for step in (2, 3, 4, 8)]


def test_an_evaluation_that_is_due_is_left_out(tmp_path, told_at):
    told_at(4)
    with pytest.raises(TrainingStopped):
        train(make_recipe(tmp_path, eval_every=2))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval_loss" in line] == [2]


def test_a_run_that_is_told_in_its_last_step_ends_as_any(tmp_path, told_at):
    told_at(8)
    assert (train(make_recipe(tmp_path)) / "summary.json").exists()


def test_the_command_says_how_to_go_on(tmp_path, told_at, capsys):
    recipe = tmp_path / "own.toml"
    recipe.write_text(to_toml(make_recipe(tmp_path)))
    told_at(5)
    assert main(["train", str(recipe)]) == 143
    assert "--resume` continues after step 5" in capsys.readouterr().err


def test_a_run_in_another_thread_leaves_the_signal_alone(tmp_path):
    """Signals arrive in the main thread, and only there can they be asked for."""
    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: train(make_recipe(tmp_path, max_steps=2)))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "summary.json").exists()
    assert signal.getsignal(signal.SIGTERM) == handler
