"""`holdfast evaluate scorers`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import tyro
from rich.table import Table

from holdfast.cli.common import error_console, model_directory, output_console, read_model, read_task
from holdfast.cli.errors import UsageError
from holdfast.cli.evaluate.common import check_picture, require_positive
from holdfast.files import write_json

Values = dict[str, dict[int, list[float]]]
"""By scorer and budget, a value per model."""


@dataclass(frozen=True)
class Scorers:
    """Who decides what the store keeps: the trained scorer and others at the same budgets, without further training.

    Recall beyond the window on the task of the models' recipe.toml; with --data, perplexity of text. Several models
    (seeds of one recipe) are averaged.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """Directories of trained models with learned eviction."""
    budgets: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    """Slots of the store per head."""
    scorers: tuple[str, ...] = ()
    """Scorers to compare; none: all."""
    samples: int = 256
    """Samples of the needle task."""
    data: str | None = None
    """Text: a file (parquet, jsonl, json, txt), a directory of them, or a data set on the hub."""
    split: str = "validation"
    """Split of the text."""
    length: int = 512
    """Tokens per block of text."""
    max_blocks: int = 64
    """Blocks of text to read."""
    seed: int = 0
    """Of the samples, and of the random scorer."""
    json: Path | None = None
    """Write all numbers to this file."""
    plot: Path | None = None
    """Draw the comparison into this file (png, svg or pdf)."""
    progress: bool = field(default=True)
    """Show which measurement is running."""

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UsageError(f"--length is {self.length}; give at least 2 tokens.")
        require_positive(self, "budgets", "samples", "max_blocks")
        check_picture(self.plot)

    def run(self) -> list[Table]:
        """Compare, and show a table; returns it."""
        from holdfast.data.progress import track
        from holdfast.evaluation.scorers import SCORERS, compare_scorers

        if not self.models:
            raise UsageError("Give at least one model directory: `holdfast evaluate scorers MODEL_DIR`.")
        scorers = tuple(dict.fromkeys(self.scorers or SCORERS))
        if unknown := [name for name in scorers if name not in SCORERS]:
            raise UsageError(f"No scorer is named {unknown[0]}; there are {', '.join(SCORERS)}.")
        budgets = tuple(dict.fromkeys(self.budgets))
        directories = [model_directory(name) for name in self.models]
        scorers = self._fitting(scorers, budgets, directories)  # before the first is measured
        values: Values = {scorer: {budget: [] for budget in budgets} for scorer in scorers}
        for directory in directories:
            model = read_model(directory)
            compared = compare_scorers(
                model, self._measure(model, directory), scorers=scorers, budgets=budgets, seed=self.seed
            )
            total = len(scorers) * len(budgets)
            for scorer, budget, value in track(compared, str(directory), total=total, progress=self.progress):
                values[scorer][budget].append(value)
        table = self._show(values)
        if self.json is not None:
            write_json(self.json, self._record(values))
        if self.plot is not None:
            from holdfast.evaluation.scorers import plot_comparison

            plot_comparison(values, self.plot, what=self._what)
        return [table]

    def _fitting(self, scorers: Sequence[str], budgets: Sequence[int], directories: Sequence[Path]) -> tuple[str, ...]:
        """Those of the scorers that every model can be scored by; one that was asked for and cannot is an error."""
        found = []
        for scorer in scorers:
            try:
                for directory in directories:
                    _check_scorer(directory, scorer, budgets)
            except UsageError as error:
                if self.scorers or scorer == "trained":  # which fails only where all do
                    raise
                error_console().print(f"{scorer} is left out: {error}", soft_wrap=True)
            else:
                found.append(scorer)
        return tuple(found)

    @property
    def _what(self) -> str:
        return "accuracy beyond the window" if self.data is None else "perplexity"

    def _measure(self, model: Any, directory: Path) -> Callable[[], float]:
        if self.data is not None:
            return functools.partial(_perplexity, model, self._blocks(directory))
        try:
            task = read_task(directory)
        except UsageError as error:
            raise UsageError(f"{error} Or give --data TEXT.") from error

        from holdfast.evaluation.needle import evaluate_needle

        def accuracy() -> float:
            result = evaluate_needle(model, task, samples=self.samples, seed=self.seed, progress=False)
            if result.beyond.accuracy is None:
                raise UsageError(f"{directory}: its task asks nothing beyond its window of {task.window} tokens.")
            return result.beyond.accuracy

        return accuracy

    def _blocks(self, directory: Path) -> Sequence[dict[str, Any]]:
        from holdfast.data.text import PackedText, load_text, load_tokenizer

        texts = load_text(self.data or "", split=self.split)
        needed = (self.max_blocks + 1) * self.length
        blocks = PackedText.from_texts(texts, load_tokenizer(directory), self.length, max_tokens=needed)
        return [blocks[index] for index in range(min(len(blocks), self.max_blocks))]

    def _show(self, values: Values) -> Table:
        title = f"{self._what}, by slots per head"
        if len(self.models) > 1:
            title += f"; mean of {len(self.models)} models"
        table = Table(title=title)
        table.add_column("scorer", no_wrap=True)
        for budget in next(iter(values.values())):
            table.add_column(f"{budget:,}", justify="right")
        for scorer, by_budget in values.items():
            shown = "{:.1%}" if self.data is None else "{:.3f}"
            table.add_row(scorer, *(shown.format(mean(found)) for found in by_budget.values()))
        output_console().print(table)
        return table

    def _record(self, values: Values) -> Mapping[str, Any]:
        from holdfast.machine import describe_machine

        return {
            "measure": self._what,
            "models": ["/".join(Path(name).resolve().parts[-2:]) for name in self.models],
            "samples": self.samples if self.data is None else None,
            "length": None if self.data is None else self.length,
            "seed": self.seed,
            "environment": describe_machine(),
            "values": values,
        }


def _check_scorer(directory: Path, scorer: str, budgets: Sequence[int]) -> None:
    """Raise UsageError where the model in `directory` cannot be scored by `scorer`, or not with these budgets."""
    import torch

    from holdfast.configuration import HybridConfig
    from holdfast.evaluation.scorers import scoring
    from holdfast.modeling import HybridForCausalLM

    with torch.device("meta"):
        model = HybridForCausalLM(HybridConfig.from_pretrained(directory))
    for budget in budgets:
        try:
            with scoring(model, scorer, budget):
                pass
        except ValueError as error:
            raise UsageError(f"{directory}, scorer {scorer}, budget {budget}: {error}") from error


def _perplexity(model: Any, blocks: Sequence[dict[str, Any]]) -> float:
    from holdfast.evaluation.perplexity import evaluate_perplexity

    return evaluate_perplexity(model, blocks, progress=False).perplexity
