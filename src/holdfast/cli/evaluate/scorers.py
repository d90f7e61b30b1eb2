"""`holdfast evaluate scorers`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from holdfast.cli.common import error_console, output_console, read_model
from holdfast.cli.errors import UsageError
from holdfast.cli.evaluate.common import (
    NOT_COVERED,
    Models,
    check_picture,
    model_directories,
    open_log,
    read_haystack,
    require_positive,
    shown_names,
    write_results,
)
from holdfast.cli.evaluate.perplexity import TextBlocks, block_length
from holdfast.cli.evaluate.scorer_measures import Measure, one_pass_measures, own_task_measures, text_measures
from holdfast.cli.evaluate.scorer_tables import Measured, draw, model_cells, tables
from holdfast.settings import suggest

if TYPE_CHECKING:
    from holdfast.data.ruler import Essays
    from holdfast.modeling import HybridForCausalLM

FOR_TEXT = ("split", "column", "config", "length")
"""Options that only blocks of text follow."""


@dataclass(frozen=True)
class Scorers:
    """Who decides what the store keeps: the trained scorer and others at the same budgets, without further training.

    Recall beyond the window on the task of the models' recipe.toml; with --data, perplexity of text; with --tasks,
    RULER's needles, of which one counts as found if the model would go on by exactly the value asked for. Several
    models (seeds of one recipe) are averaged, and so are tasks, in a table of their own.

    Each number has a 95 % interval over samples, or blocks of text, and so has its difference to that of the first
    scorer, sample by sample. They tell what other samples would give; they do not cover other seeds of training.
    """

    models: Models
    """Directories of trained models, or models on the hub (OWNER/NAME[@REVISION]), with learned eviction."""
    budgets: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    """Slots of the store per head."""
    scorers: tuple[str, ...] = ()
    """Scorers to compare; none: all."""
    samples: int | None = None
    """Samples of the needle task (default: 256), or of each of --tasks (default: 64); with --data blocks of text, the
    first ones (default: 64)."""
    tasks: tuple[str, ...] = ()
    """RULER's tasks with one answer, for models that read text: niah_single_1, -2, -3, niah_multikey_1, -2, -3."""
    haystack: tuple[str, ...] = ()
    """Essays for those of --tasks that hide needles in some: text files or directories of them."""
    data: str | None = None
    """Text: a file (parquet, jsonl, json, txt), a directory of them or of prepared text, or a data set on the hub."""
    split: str | None = None
    """Split of the text; a single file is read whole. Default: validation."""
    column: str | None = None
    """That holds the text, in files with columns and in data sets on the hub. Default: text."""
    config: str | None = None
    """Configuration of a data set on the hub."""
    length: int | None = None
    """Tokens per block of text, or per sample of --tasks; default: 512, or what the models were trained on where that
    is less."""
    beyond: bool = False
    """Allow blocks, or samples, longer than a model was trained on."""
    seed: int = 0
    """Of the samples, and of the random scorer."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights, and of what is computed with them."""
    json: Path | None = None
    """Write all numbers to this file (NAME.json), and every measurement beside it to NAME.samples.jsonl, where a run
    that was interrupted goes on."""
    plot: Path | None = None
    """Draw the comparison into this file (png, svg or pdf)."""
    progress: bool = field(default=True)
    """Show which measurement is running."""

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 2:
            raise UsageError(f"--length is {self.length}; give at least 2 tokens.")
        require_positive(self, "budgets", "samples")
        check_picture(self.plot)
        if self.tasks and self.data is not None:
            raise UsageError("--tasks and --data are two measures; give one of them.")
        if self.tasks:
            _refuse_given(self, "with --tasks needles are asked for, and no text is read", *FOR_TEXT[:3])
        elif self.data is None:
            _refuse_given(self, "without --data the samples of the needle task are read", *FOR_TEXT)
        if self.haystack and not self.tasks:
            raise UsageError("--haystack is for --tasks; name some, or leave it out.")

    def run(self) -> list[Table]:
        """Compare, and show tables; returns them."""
        from holdfast.data.progress import track
        from holdfast.evaluation.scorers import SCORERS, compare_scorers

        directories = model_directories(self.models, "scorers")
        scorers = tuple(dict.fromkeys(self.scorers or SCORERS))
        if unknown := [name for name in scorers if name not in SCORERS]:
            raise UsageError(f"There is no scorer {unknown[0]!r}{suggest(unknown[0], SCORERS)}.")
        budgets = tuple(dict.fromkeys(self.budgets))
        # What does not fit is refused before the first is measured.
        scorers = self._fitting(scorers, budgets, directories)
        text, essays = self._text(directories), read_haystack(self.haystack)
        names = shown_names(directories)
        measured: dict[str, Measured] = {}
        for directory, (measure, determining) in self._measures(directories, text, essays).items():
            log = open_log(self.json, f"scorers, {self._what}", directory, determining, "measurements")
            model = read_model(directory, self.dtype)
            compared = compare_scorers(
                model, functools.partial(measure, model), scorers=scorers, budgets=budgets, seed=self.seed, log=log
            )
            total = len(scorers) * len(budgets)
            measured[names[directory]] = {
                (scorer, budget): found
                for scorer, budget, found in track(compared, str(directory), total=total, progress=self.progress)
            }
        trained = {name: _trained_network(directory) for directory, name in names.items()}
        shown = {name: _shown_name(name, trained) for name in scorers}
        made = tables(list(measured.values()), shown, self._what)
        for table in made:
            output_console().print(table)
        output_console().print(NOT_COVERED, soft_wrap=True)
        if self.json is not None:
            models = {
                name: {"trained": trained[name], "cells": model_cells(found, scorers[0])}
                for name, found in measured.items()
            }
            settings = {"measure": self._what, "scorers": list(scorers), "budgets": list(budgets)}
            write_results(self.json, "scorers", settings | self._settings(directories, text, essays), models)
        if self.plot is not None:
            draw(list(measured.values()), shown, self._what, self.plot)
        return made

    def _fitting(self, scorers: Sequence[str], budgets: Sequence[int], directories: Sequence[Path]) -> tuple[str, ...]:
        """Those of the scorers that every model can be scored by; one that was asked for and cannot is an error."""
        _refuse_without_eviction(directories)
        models = {directory: _without_weights(directory) for directory in directories}
        found = []
        for scorer in scorers:
            try:
                for directory, model in models.items():
                    _check_scorer(directory, model, scorer, budgets)
            except UsageError as error:
                if self.scorers or scorer == "trained":  # which fails only where all do
                    raise
                error_console().print(f"{scorer} is left out: {error}", soft_wrap=True)
            else:
                found.append(scorer)
        return tuple(found)

    @property
    def _what(self) -> str:
        if self.tasks:
            return "needles found in one pass"
        return "accuracy beyond the window" if self.data is None else "perplexity"

    @property
    def _samples(self) -> int:
        is_own_task = not self.tasks and self.data is None
        return (256 if is_own_task else 64) if self.samples is None else self.samples

    @property
    def _tasks(self) -> list[str]:
        return sorted(set(self.tasks))

    def _measures(
        self, directories: Sequence[Path], text: TextBlocks | None, essays: Essays | None
    ) -> dict[Path, Measure]:
        """What measures each model, checked against it.

        Raises:
            UsageError: if it does not fit a model.
        """
        drawn: dict[str, Any] = {"seed": self.seed, "dtype": self.dtype}
        if text is not None:
            return text_measures(directories, text, **drawn)
        if not self.tasks:
            return own_task_measures(directories, samples=self._samples, beyond=self.beyond, **drawn)
        length = block_length(directories, self.length, self.beyond)
        return one_pass_measures(directories, self._tasks, length=length, samples=self._samples, essays=essays, **drawn)

    def _text(self, directories: Sequence[Path]) -> TextBlocks | None:
        if self.data is None:
            return None
        length = block_length(directories, self.length, self.beyond)
        split, column = self.split or "validation", self.column or "text"
        return TextBlocks(self.data, split, column, self.config, length, self._samples)

    def _settings(self, directories: Sequence[Path], text: TextBlocks | None, essays: Essays | None) -> dict[str, Any]:
        """What the numbers follow from beside the models, scorers and budgets."""
        settings: dict[str, Any] = {"samples": self._samples} if text is None else text.to_dict()
        if self.tasks:
            length = block_length(directories, self.length, self.beyond)
            settings |= {
                "tasks": self._tasks,
                "length": length,
                "essays": None if essays is None else essays.sha256,
            }
        return settings | {"seed": self.seed, "dtype": self.dtype}


def _refuse_given(command: Scorers, reason: str, *options: str) -> None:
    """Options that would be ignored must not be given."""
    for option in options:
        if getattr(command, option) is not None:
            raise UsageError(f"{reason}; leave --{option.replace('_', '-')} out.")


def _refuse_without_eviction(directories: Sequence[Path]) -> None:
    """Refuse before anything is measured a model that keeps all, or has no store."""
    from holdfast.configuration import HybridConfig

    for directory in directories:
        mixers = set(HybridConfig.from_pretrained(directory).mixers or ())
        if "learned_eviction" not in mixers:
            raise UsageError(
                f"{directory} has no layer that evicts, so no scorer decides anything: its layers are "
                f"{' and '.join(sorted(mixers))}; give a model with learned_eviction."
            )


def _trained_network(directory: Path) -> str:
    """What the trained scorer of a model is."""
    from holdfast.configuration import HybridConfig
    from holdfast.evaluation.scorers import trained_network

    return trained_network(HybridConfig.from_pretrained(directory))


def _shown_name(scorer: str, trained: Mapping[str, str]) -> str:
    """What tables call a scorer; the trained ones are one network, or those of several models that differ."""
    return f"{scorer} ({' and '.join(dict.fromkeys(trained.values()))})" if scorer == "trained" else scorer


def _without_weights(directory: Path) -> HybridForCausalLM:
    """The model saved in `directory`, on the meta device."""
    import torch

    from holdfast.configuration import HybridConfig
    from holdfast.modeling import HybridForCausalLM

    with torch.device("meta"):
        return HybridForCausalLM(HybridConfig.from_pretrained(directory))


def _check_scorer(directory: Path, model: HybridForCausalLM, scorer: str, budgets: Sequence[int]) -> None:
    """Raise UsageError where the model of `directory` cannot be scored by `scorer`, or not with these budgets."""
    from holdfast.evaluation.scorers import scoring

    for budget in budgets:
        try:
            with scoring(model, scorer, budget):
                pass
        except ValueError as error:
            raise UsageError(f"{directory}, scorer {scorer}, budget {budget}: {error}") from error
