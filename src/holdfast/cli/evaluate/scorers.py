"""`holdfast evaluate scorers`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.table import Table

from holdfast.cli.common import error_console, output_console, read_model, read_task
from holdfast.cli.errors import UsageError
from holdfast.cli.evaluate.common import (
    check_picture,
    model_directories,
    open_log,
    read_haystack,
    read_text_models,
    refuse_lengths,
    require_positive,
    usage_errors,
)
from holdfast.cli.evaluate.perplexity import TextBlocks, block_length
from holdfast.files import write_json

if TYPE_CHECKING:
    from holdfast.data.needle import NeedleTask
    from holdfast.data.ruler import RulerSample
    from holdfast.modeling import HybridForCausalLM

Found = float | dict[str, Any]
"""A perplexity, or of an accuracy the counts with which a `Share` is made."""
Measure = tuple[Callable[[Any], Found], dict[str, Any]]
"""What measures a model, and plain values that the measurement follows from."""
FOR_TEXT = ("split", "length", "max_blocks")
"""Options that only blocks of text follow."""
NEW_TOKENS = 48
"""Of a sample of RULER's tasks, left free for the answer: a UUID, byte by byte, takes 37."""
Values = dict[str, dict[int, list[float]]]
"""By scorer and budget, a value per model."""
Shares = dict[str, dict[int, list[dict[str, Any]]]]
"""By scorer and budget, counts, accuracy and interval per model."""


@dataclass(frozen=True)
class Scorers:
    """Who decides what the store keeps: the trained scorer and others at the same budgets, without further training.

    Recall beyond the window on the task of the models' recipe.toml; with --data, perplexity of text; with --tasks,
    RULER's needles, of which one counts as found if the model would go on by exactly the value asked for. Several
    models (seeds of one recipe) are averaged.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """Directories of trained models, or models on the hub (OWNER/NAME[@REVISION]), with learned eviction."""
    budgets: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    """Slots of the store per head."""
    scorers: tuple[str, ...] = ()
    """Scorers to compare; none: all."""
    samples: int | None = None
    """Samples of the needle task (default: 256), or of each of --tasks (default: 64)."""
    tasks: tuple[str, ...] = ()
    """RULER's tasks with one answer, for models that read text: niah_single_1, -2, -3, niah_multikey_1, -2, -3."""
    haystack: tuple[str, ...] = ()
    """Essays for those of --tasks that hide needles in some: text files or directories of them."""
    data: str | None = None
    """Text: a file (parquet, jsonl, json, txt), a directory of them or of prepared text, or a data set on the hub."""
    split: str | None = None
    """Split of the text; a single file is read whole. Default: validation."""
    length: int | None = None
    """Tokens per block of text, or per sample of --tasks; default: 512, or what the models were trained on where that
    is less."""
    max_blocks: int | None = None
    """Blocks of text to read; default: the first 64."""
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
        require_positive(self, "budgets", "samples", "max_blocks")
        check_picture(self.plot)
        if self.tasks and self.data is not None:
            raise UsageError("--tasks and --data are two measures; give one of them.")
        if self.tasks:
            _refuse_given(self, "with --tasks needles are asked for, and no text is read", "split", "max_blocks")
        elif self.data is None:
            _refuse_given(self, "without --data the samples of the needle task are read", *FOR_TEXT)
        else:
            _refuse_given(self, "with --data blocks of text are read, and no samples", "samples")
        if self.haystack and not self.tasks:
            raise UsageError("--haystack is for --tasks; name some, or leave it out.")

    def run(self) -> list[Table]:
        """Compare, and show a table; returns it."""
        from holdfast.data.progress import track
        from holdfast.evaluation.scorers import SCORERS, compare_scorers

        directories = list(dict.fromkeys(model_directories(self.models, "scorers")))  # none counts twice
        scorers = tuple(dict.fromkeys(self.scorers or SCORERS))
        if unknown := [name for name in scorers if name not in SCORERS]:
            raise UsageError(f"No scorer is named {unknown[0]}; there are {', '.join(SCORERS)}.")
        budgets = tuple(dict.fromkeys(self.budgets))
        # What does not fit is refused before the first is measured.
        scorers = self._fitting(scorers, budgets, directories)
        text = self._text(directories)
        if text is not None:
            measures = self._perplexities(directories, text)
        else:
            measures = self._needles(directories) if self.tasks else self._accuracies(directories)
        values: Values = {scorer: {budget: [] for budget in budgets} for scorer in scorers}
        shares: Shares = {scorer: {budget: [] for budget in budgets} for scorer in scorers}
        for directory, (measure, determining) in measures.items():
            log = open_log(self.json, f"scorers, {self._what}", directory, determining, "measurements")
            model = read_model(directory, self.dtype)
            compared = compare_scorers(
                model, functools.partial(measure, model), scorers=scorers, budgets=budgets, seed=self.seed, log=log
            )
            total = len(scorers) * len(budgets)
            for scorer, budget, found in track(compared, str(directory), total=total, progress=self.progress):
                if isinstance(found, dict):
                    shares[scorer][budget].append(found)
                values[scorer][budget].append(found["accuracy"] if isinstance(found, dict) else found)
        trained = _trained_networks(directories)
        named = {f"{name} ({trained})" if name == "trained" else name: row for name, row in values.items()}
        table = self._show(named, len(directories))
        if self.json is not None:
            counted = {} if text is not None else {"shares": shares}
            write_json(self.json, {**self._record(directories, values, trained, text), **counted})
        if self.plot is not None:
            from holdfast.evaluation.scorers import plot_comparison

            plot_comparison(named, self.plot, what=self._what)
        return [table]

    def _fitting(self, scorers: Sequence[str], budgets: Sequence[int], directories: Sequence[Path]) -> tuple[str, ...]:
        """Those of the scorers that every model can be scored by; one that was asked for and cannot is an error."""
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
        return (64 if self.tasks else 256) if self.samples is None else self.samples

    def _accuracies(self, directories: Sequence[Path]) -> dict[Path, Measure]:
        """Of the models' own needle tasks.

        Raises:
            UsageError: if one has none, or one that is longer than it was told.
        """
        try:
            tasks = {directory: read_task(directory) for directory in directories}
        except UsageError as error:
            raise UsageError(f"{error} Or give --data TEXT.") from error
        for directory, task in tasks.items():
            refuse_lengths([directory], task.length, self.beyond)
        drawn = {"samples": self._samples, "seed": self.seed}
        return {
            directory: (
                functools.partial(_accuracy, directory, task, **drawn),
                {"task": asdict(task), **drawn, "dtype": self.dtype},
            )
            for directory, task in tasks.items()
        }

    def _needles(self, directories: Sequence[Path]) -> dict[Path, Measure]:
        """Of RULER's tasks, at depths from one end of the haystack to the other.

        Raises:
            UsageError: if a task is unknown or asks for several values, or a model or a length does not fit.
        """
        from holdfast.data.ruler import RULER_TASKS, RulerSampler
        from holdfast.evaluation.forced import answer_tokens

        if unknown := [task for task in self.tasks if task not in RULER_TASKS]:
            raise UsageError(f"There is no task {unknown[0]}; give some of {', '.join(RULER_TASKS)}.")
        length, essays = block_length(directories, self.length, self.beyond), read_haystack(self.haystack)
        depths = [100 * (index + 0.5) / self._samples for index in range(self._samples)]
        given = {"length": length, "essays": None if essays is None else essays.sha256}
        given |= {"seed": self.seed, "dtype": self.dtype}
        measures: dict[Path, Measure] = {}
        for directory, tokenizer in read_text_models(directories).items():
            samples = []
            for task in sorted(set(self.tasks)):
                with usage_errors():
                    sampler = RulerSampler(
                        RULER_TASKS[task], tokenizer, length, essays=essays, new_tokens=NEW_TOKENS, seed=self.seed
                    )
                    samples += [sampler.sample(depth, index) for index, depth in enumerate(depths)]
            with usage_errors():
                for sample in samples:
                    answer_tokens(tokenizer, sample)
            determining = {"tasks": sorted(set(self.tasks)), "samples": self._samples, **given}
            measures[directory] = (functools.partial(_found, tokenizer, samples), determining)
        return measures

    def _text(self, directories: Sequence[Path]) -> TextBlocks | None:
        if self.data is None:
            return None
        length = block_length(directories, self.length, self.beyond)
        blocks = 64 if self.max_blocks is None else self.max_blocks
        return TextBlocks(self.data, self.split or "validation", "text", None, length, blocks)

    def _perplexities(self, directories: Sequence[Path], text: TextBlocks) -> dict[Path, Measure]:
        """Of text.

        Raises:
            UsageError: if a model cannot read it.
        """
        from holdfast.evaluation.perplexity import block_digest

        measures: dict[Path, Measure] = {}
        for directory, tokenizer in read_text_models(directories, english=False).items():
            packed = text.read(tokenizer, directory)
            blocks = [packed[index] for index in range(min(len(packed), text.max_blocks or len(packed)))]
            digests = [block_digest(block) for block in blocks]
            determining = {"blocks": digests, "seed": self.seed, "dtype": self.dtype}
            measures[directory] = (functools.partial(_perplexity, blocks), determining)
        return measures

    def _show(self, values: Values, models: int) -> Table:
        title = f"{self._what}, by slots per head"
        if models > 1:
            title += f"; mean of {models} models"
        table = Table(title=title)
        table.add_column("scorer", no_wrap=True)
        for budget in next(iter(values.values())):
            table.add_column(f"{budget:,}", justify="right")
        for scorer, by_budget in values.items():
            shown = "{:.1%}" if self.data is None else "{:.3f}"
            table.add_row(scorer, *(shown.format(mean(found)) for found in by_budget.values()))
        output_console().print(table)
        return table

    def _record(
        self, directories: Sequence[Path], values: Values, trained: str, text: TextBlocks | None
    ) -> Mapping[str, Any]:
        from holdfast.machine import describe_machine

        return {
            "measure": self._what,
            "models": ["/".join(directory.resolve().parts[-2:]) for directory in directories],
            "trained": trained,
            "tasks": sorted(set(self.tasks)),
            "samples": self._samples if text is None else None,
            "text": None if text is None else text.to_dict(),
            "length": block_length(directories, self.length, True) if self.tasks or text is not None else None,
            "seed": self.seed,
            "dtype": self.dtype,
            "environment": describe_machine(),
            "values": values,
        }


def _refuse_given(command: Scorers, reason: str, *options: str) -> None:
    """Options that would be ignored must not be given."""
    for option in options:
        if getattr(command, option) is not None:
            raise UsageError(f"{reason}; leave --{option.replace('_', '-')} out.")


def _trained_networks(directories: Sequence[Path]) -> str:
    """What the trained scorers are: one network, or those of several models that differ."""
    from holdfast.configuration import HybridConfig
    from holdfast.evaluation.scorers import trained_network

    return " and ".join(dict.fromkeys(trained_network(HybridConfig.from_pretrained(each)) for each in directories))


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


def _accuracy(directory: Path, task: NeedleTask, model: Any, *, samples: int, seed: int) -> dict[str, Any]:
    from holdfast.evaluation.needle import evaluate_needle

    result = evaluate_needle(model, task, samples=samples, seed=seed, progress=False)
    if result.beyond.accuracy is None:
        raise UsageError(f"{directory}: its task asks nothing beyond its window of {task.window} tokens.")
    return result.beyond.to_dict()


def _found(tokenizer: Any, samples: Sequence[RulerSample], model: Any) -> dict[str, Any]:
    from holdfast.evaluation.forced import ask_in_one_pass

    return ask_in_one_pass(model, tokenizer, samples).to_dict()


def _perplexity(blocks: Sequence[dict[str, Any]], model: Any) -> float:
    from holdfast.evaluation.perplexity import evaluate_perplexity

    batch_size = max(1, min(8, 16_384 // len(blocks[0]["input_ids"])))
    return evaluate_perplexity(model, blocks, batch_size=batch_size, progress=False).perplexity
