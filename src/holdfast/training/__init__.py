"""Training: the budget controller, the retention schedule, recipes, and the glue to transformers' Trainer."""

from __future__ import annotations

import importlib
from typing import Any

from holdfast.settings import SettingsError
from holdfast.training.controller import BudgetController, CollapsedHead, ControllerConfig, RetentionWatch
from holdfast.training.schedule import RetentionSchedule, learned_eviction_layers

# These import transformers' Trainer, which takes seconds: only when asked for.
_LAZY = {
    "CheckpointError": "checkpointing",
    "HybridTrainer": "trainer",
    "MetricsFile": "metrics",
    "ProgressBar": "metrics",
    "Recipe": "recipe",
    "RetentionCallback": "callbacks",
    "RunDirectoryError": "run_directory",
    "StopOnTermination": "stopping",
    "TrainingDivergedError": "trainer",
    "TrainingStopped": "stopping",
    "list_recipes": "recipe",
    "load_recipe": "recipe",
    "parameter_groups": "trainer",
    "read_metrics": "metrics",
    "train": "run",
}

__all__ = [
    "BudgetController",
    "CollapsedHead",
    "ControllerConfig",
    "RetentionSchedule",
    "RetentionWatch",
    "SettingsError",
    "learned_eviction_layers",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"holdfast.training.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
