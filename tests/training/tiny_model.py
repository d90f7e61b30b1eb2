"""A model and a task so small that a training step takes milliseconds, and runs of it."""

import pytest
from transformers import TrainerCallback

from holdfast.data.needle import NeedleTask
from holdfast.training import (
    ControllerConfig,
    HybridTrainer,
    RetentionSchedule,
    read_metrics,
    train,
)
from holdfast.training.recipe import NeedleData, OutputSection, Recipe, TrainingSection
from holdfast.training.speed import CLOCK_METRICS

TASK = NeedleTask(length=32, num_pairs=3, num_keys=5, num_values=5, num_noise=4, window=8)
MODEL = {
    "vocab_size": TASK.vocab_size,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "initializer_range": 0.1,
    "mixers": ["gated_deltanet", "learned_eviction"],
    "mixer_options": {
        "gated_deltanet": {"num_heads": 2, "head_dim": 8},
        "learned_eviction": {"num_heads": 2, "head_dim": 8, "window": 8, "budget": 4, "sinks": 1, "dropout": 0.2},
    },
}


def make_recipe(directory, name="run", **training) -> Recipe:
    """Eight steps with everything that has a state: dropout, exploration, accumulation, a frozen scorer, λ, Adam."""
    settings = {"max_steps": 8, "batch_size": 2, "accumulation": 2, "learning_rate": 1e-2, "log_every": 2}
    return Recipe(
        name=name,
        model=MODEL,
        training=TrainingSection(
            **(settings | {"save_every": 3, "warmup_steps": min(2, training.get("max_steps", 8))} | training)
        ),
        data=NeedleData(task=TASK, curriculum=((0, 1, TASK.length), (4, 3, TASK.length)), eval_samples=4),
        controller=ControllerConfig(initial=1e-2, minimum=1e-3, interval=2),
        retention=RetentionSchedule(scorer_freeze_steps=2, exploration=0.5, exploration_end=1.0),
        output=OutputSection(directory=str(directory)),
    )


class KilledError(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


def train_until_killed(recipe: Recipe, step: int, monkeypatch, **options) -> None:
    original = HybridTrainer.__init__

    def with_killer(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(KillAt(step))

    with monkeypatch.context() as patch:
        patch.setattr(HybridTrainer, "__init__", with_killer)
        with pytest.raises(KilledError):
            train(recipe, **options)


def metrics_of(directory) -> list[dict]:
    """The metrics that do not depend on the clock."""
    lines = read_metrics(directory / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in CLOCK_METRICS} for line in lines if "loss" in line]
