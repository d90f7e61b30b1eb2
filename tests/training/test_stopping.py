"""Runs that are told to end by a SIGTERM: they write a checkpoint first, and go on as if nothing had been."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import MODEL, TASK, KillAt, KilledError, make_recipe, metrics_of, train_until_killed
from transformers import TrainerCallback, TrainingArguments

from holdfast import HybridConfig, HybridForCausalLM
from holdfast.cli import main
from holdfast.data.needle import NeedleStream
from holdfast.settings import to_toml
from holdfast.training import HybridTrainer, StopOnTermination, TrainingStopped, read_metrics, train


@pytest.fixture
def heard():
    """A handler of one's own, which a run must put back: the signals that it heard."""
    signals: list[int] = []

    def listen(signum, frame):
        signals.append(signum)

    before = signal.signal(signal.SIGTERM, listen)
    yield signals
    assert signal.getsignal(signal.SIGTERM) is listen
    signal.signal(signal.SIGTERM, before)


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


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_is_told_to_end_writes_a_checkpoint(finished, tmp_path, told_at, monkeypatch, heard):
    recipe = make_recipe(tmp_path)
    told_at(5)
    with pytest.raises(TrainingStopped) as stop:
        train(recipe)
    assert (stop.value.code, stop.value.step, heard) == (143, 5, [])
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]
    assert not (run / "summary.json").exists()
    assert not (run / "model.safetensors").exists()
    monkeypatch.undo()
    train(recipe, resume=True)
    assert same_weights(finished[0], run)
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


def test_a_run_that_is_told_in_its_last_step_ends_as_any_and_then_passes_it_on(tmp_path, told_at, heard, monkeypatch):
    told_at(8)
    run = train(make_recipe(tmp_path))
    assert (run / "summary.json").exists()
    assert heard == [signal.SIGTERM]


def test_a_run_that_fails_gives_the_signal_back(tmp_path, heard, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    train_until_killed(make_recipe(tmp_path), 2, monkeypatch)
    assert signal.getsignal(signal.SIGTERM) is before
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def test_where_the_signal_is_ignored_it_stays_so(tmp_path, told_at):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    told_at(3)
    train(make_recipe(tmp_path, max_steps=4))
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_IGN


def test_the_command_says_how_to_go_on(tmp_path, told_at, capsys, monkeypatch):
    recipe = tmp_path / "own.toml"
    recipe.write_text(to_toml(make_recipe(tmp_path)))
    told_at(5)
    assert main(["train", str(recipe)]) == 143
    assert "--resume` continues after step 5" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")  # which leaves that to the first process
    told_at(7)
    assert main(["train", str(recipe), "--resume"]) == 143
    assert "--resume`" not in capsys.readouterr().err


def test_a_run_in_another_thread_leaves_the_signal_alone(tmp_path, heard):
    """Signals arrive in the main thread, and only there can they be asked for."""
    thread = threading.Thread(target=lambda: train(make_recipe(tmp_path, max_steps=2)))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_callback_in_a_trainer_of_ones_own(tmp_path, heard):
    """After an exception nobody calls it: the next training begins anew, and leaves the signal as it was at first."""

    def trainer(*callbacks):
        arguments = TrainingArguments(str(tmp_path), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True)
        model = HybridForCausalLM(HybridConfig(**MODEL))
        data = {"train_dataset": NeedleStream(TASK, size=64), "data_collator": NeedleStream.collate}
        return HybridTrainer(model, arguments, callbacks=list(callbacks), **data)

    stop = StopOnTermination()
    with pytest.raises(KilledError):
        trainer(stop, KillAt(2)).train()
    trainer(stop).train()
    assert not stop.has_stopped


def test_what_it_raises_can_be_sent_to_another_process():
    sent = pickle.loads(pickle.dumps(TrainingStopped(5)))
    assert (sent.code, sent.step) == (143, 5)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="who sent a signal cannot be asked here")
@pytest.mark.parametrize("streamed", [False, True])
def test_workers_that_are_told_too_wait_for_the_run(tmp_path, streamed):
    """As torchrun, `timeout` and schedulers do it: every process of the job hears the signal."""
    text = tmp_path / "text.txt"
    text.write_text("the kelp holds on to the rock and the rock to the sea. " * 400)
    data = f"TextData({str(text)!r}, length=24, in_memory={0 if streamed else 64})"
    program = f"""
import dataclasses, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny_model import make_recipe
from holdfast.training import train
from holdfast.training.recipe import TextData
recipe = make_recipe({str(tmp_path)!r}, max_steps=100_000, save_every=100_000, workers=2)
train(dataclasses.replace(recipe, model=recipe.model | {{"vocab_size": 259}}, data={data}))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not read_metrics(metrics) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    assert "killed by signal" not in errors
    with pytest.raises(ProcessLookupError):  # none is left behind
        os.killpg(process.pid, 0)
