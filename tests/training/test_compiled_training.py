"""A run under torch.compile: the same losses, and compiled once."""

import functools

import pytest
import torch
from transformers import TrainingArguments

from holdfast.data.needle import NeedleTask
from holdfast.training import ControllerConfig, read_metrics, run, train
from holdfast.training.recipe import NeedleData, OutputSection, Recipe, TrainingSection

TASK = NeedleTask(length=24, num_pairs=2, num_keys=4, num_values=4, num_noise=4, window=6)


def make_recipe(directory, **training) -> Recipe:
    options = {
        "gated_deltanet": {"num_heads": 2, "head_dim": 8},
        "learned_eviction": {"num_heads": 2, "head_dim": 8, "window": 6, "budget": 4, "sinks": 1, "dropout": 0.0},
    }
    model = {"vocab_size": TASK.vocab_size, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    return Recipe(
        name="run",
        model=model | {"initializer_range": 0.1, "mixers": list(options), "mixer_options": options},
        training=TrainingSection(max_steps=6, batch_size=2, accumulation=2, log_every=1, **training),
        data=NeedleData(task=TASK),
        controller=ControllerConfig(initial=1e-2, minimum=1e-3, interval=2),
        output=OutputSection(directory=str(directory)),
    )


@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_compiled_run_gives_the_same_losses_and_compiles_once(tmp_path, monkeypatch):
    eager = train(make_recipe(tmp_path / "eager"))
    # Code generation takes minutes on a CPU; what is traced is the same without.
    backend = functools.partial(TrainingArguments, torch_compile_backend="aot_eager")
    monkeypatch.setattr(run, "TrainingArguments", backend)
    torch.compiler.reset()
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    compiled = train(make_recipe(tmp_path / "compiled", compile=True))
    assert torch._dynamo.utils.counters["frames"]["ok"] > frames
    expected, found = (
        [line["loss"] for line in read_metrics(directory / "metrics.jsonl") if "loss" in line]
        for directory in (eager, compiled)
    )
    assert len(found) == 6
    assert found == pytest.approx(expected, rel=1e-4)
