"""What a run has written so far, finished or not, as numbers over its steps."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.settings import SettingsError
from holdfast.training.metrics import read_metrics
from holdfast.training.recipe import Recipe, load_recipe
from holdfast.training.run_directory import METRICS_FILE, RECIPE_FILE, SUMMARY_FILE

__all__ = ["NothingLoggedError", "RunHistory", "read_history"]


class NothingLoggedError(FileNotFoundError):
    """A run has come to no loss yet."""


@dataclass(frozen=True)
class RunHistory:
    """The metrics of a run.

    Attributes:
        name: what the run is called: its directory, as it was given.
        records: lines of metrics.jsonl, in the order of their steps.
        finished: whether the run has come to its end.
        planned_steps: of the whole run; None where its recipe cannot be read.
        budget: pairs that each head is to keep; None without learned eviction, or without a recipe.
        layers: the model's layer of each row of the counts; empty where that is not known.
    """

    name: str
    records: list[dict[str, Any]]
    finished: bool
    planned_steps: int | None
    budget: int | None
    layers: list[int]

    @property
    def last_step(self) -> int:
        """The last step with a metric."""
        return int(self.records[-1]["step"])

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [N] and values [N] fp64 of a metric, N = 0 if there are none; what was not finite is NaN."""
        found = [(record["step"], record[name]) for record in self.records if name in record]
        values = [math.nan if value is None else float(value) for _, value in found]
        return np.array([step for step, _ in found]), np.array(values)

    def by_head(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [N] and values [N, L, Hkv] fp64 of a metric per layer and head, such as "kept"; N = 0 if none."""
        found = [(record["step"], record[name]) for record in self.records if isinstance(record.get(name), list)]
        steps = np.array([step for step, _ in found])
        return steps, np.array([values for _, values in found], dtype=float) if found else np.zeros((0, 0, 0))

    def recent(self, values: np.ndarray) -> np.ndarray:
        """The mean over the last tenth of `values` [N, …], at least one of them."""
        return values[-max(1, len(values) // 10) :].mean(axis=0)

    def head_names(self, layers: int, heads: int) -> list[str]:
        """`layer 3, head 0` for every row of the counts and every head."""
        known = self.layers if len(self.layers) == layers else range(layers)
        return [f"layer {layer}, head {head}" for layer in known for head in range(heads)]


def read_history(directory: str | os.PathLike[str]) -> RunHistory:
    """Read the metrics of the run in `directory`; it may be running still.

    Raises:
        FileNotFoundError: if there is no such directory.
        NothingLoggedError: if there is no loss in it yet.
        ValueError: naming the file and the line, if the metrics are damaged.
    """
    run = Path(directory)
    if not run.is_dir():
        raise FileNotFoundError(f"There is no run directory {run}; give one that `holdfast train` wrote.")
    records = [record for record in read_metrics(run / METRICS_FILE) if "step" in record]
    if not any("loss" in record for record in records):
        raise NothingLoggedError(f"{run} has no losses in {METRICS_FILE}; has the run come to its first log?")
    try:
        recipe = load_recipe(run / RECIPE_FILE)
    except (FileNotFoundError, SettingsError):  # of another version, or moved: the metrics can be shown without it
        return RunHistory(str(directory), records, (run / SUMMARY_FILE).exists(), None, None, [])
    budget, layers = _eviction(recipe)
    finished = (run / SUMMARY_FILE).exists()
    return RunHistory(str(directory), records, finished, recipe.training.max_steps, budget, layers)


def _eviction(recipe: Recipe) -> tuple[int | None, list[int]]:
    """The budget, and the numbers of the layers with learned eviction."""
    config = recipe.build_config()
    layers = [number for number, mixer in enumerate(config.mixers or ()) if mixer == "learned_eviction"]
    if not layers:
        return None, []
    assert config.mixer_options is not None
    return recipe.controller.budget or config.mixer_options["learned_eviction"]["budget"], layers
