"""`holdfast evaluate needle`: needles in text as RULER hides them, or the needle task that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.table import Table

from holdfast.cli.common import output_console, read_model, read_task
from holdfast.cli.errors import UsageError, usage_errors
from holdfast.cli.evaluate.common import (
    Models,
    check_picture,
    model_directories,
    open_log,
    read_haystack,
    read_text_models,
    reads_text,
    refuse_lengths,
    refuse_unknown_tokens,
    require_positive,
    show_share,
    shown_names,
    trained_length,
    write_results,
)

if TYPE_CHECKING:
    from holdfast.data.needle import NeedleTask
    from holdfast.evaluation.needle import NeedleResult
    from holdfast.evaluation.ruler import RulerResult, RulerSettings


@dataclass(frozen=True)
class TextOptions:
    """For models that read text: RULER's needles in haystacks."""

    tasks: tuple[str, ...] = ()
    """RULER's names: niah_single_1 (noise; the default), _2 (essays), _3 (essays, UUIDs), niah_multikey_1, _2, _3,
    niah_multivalue, niah_multiquery; or all."""
    haystack: tuple[str, ...] = ()
    """Texts for the tasks with essays: files (txt, parquet, jsonl), directories (all their text files), or data sets on
    the hub (split train)."""
    depths: tuple[float, ...] = tuple(range(0, 101, 10))
    """Where the needle lies, in percent of the haystack."""
    new_tokens: int = 128
    """Tokens of an answer at the most; the haystack leaves room for them."""

    def __post_init__(self) -> None:
        require_positive(self, "new_tokens")


@dataclass(frozen=True)
class OwnTaskOptions:
    """For models of the needle task: what replaces the settings of the run's recipe.toml."""

    pairs: int | None = None
    """Key-value pairs in the context."""
    queries: int | None = None
    """How many of the pairs are asked for."""
    window: int | None = None
    """Window that splits the results into within and beyond; it does not change the samples."""


@dataclass(frozen=True)
class Needle:
    """How well needles are found. Models that read text (with a tokenizer.json) get RULER's tasks: accuracy by length
    and depth. Models of the needle task get that: accuracy by the distance between question and answer."""

    models: Models
    """Directories of trained models, or models on the hub (OWNER/NAME[@REVISION]), all of one kind."""
    length: tuple[int, ...] = ()
    """Tokens per sample. For text one or several; default: the length that every model was trained on. RULER's own are
    `--length 4096 8192 16384 32768 65536 131072`, with --beyond where that is more. For the needle task one; default:
    the recipe's."""
    samples: int | None = None
    """Samples to draw, for text at each length and depth (default: 10), for the needle task in all (default: 512)."""
    batch_size: int | None = None
    """Samples read side by side; default: 4 for text, 64 for the needle task."""
    text: tyro.conf.OmitArgPrefixes[TextOptions] = field(default_factory=TextOptions)
    own: tyro.conf.OmitArgPrefixes[OwnTaskOptions] = field(default_factory=OwnTaskOptions)
    beyond: bool = False
    """Allow lengths beyond the one that a model was trained on."""
    seed: int = 0
    """Of the samples; training sees none of them."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights, and of what is computed with them."""
    json: Path | None = None
    """Write all numbers to this file (NAME.json), and every answer beside it to NAME.samples.jsonl, where a run that
    was interrupted goes on."""
    plot: Path | None = None
    """Draw into this file (png, svg or pdf) a heat map for text, accuracy by distance for the needle task."""

    def __post_init__(self) -> None:
        require_positive(self, "length", "samples", "batch_size")
        check_picture(self.plot)

    def run(self) -> list[Table]:
        """Evaluate, and show a table; returns it."""
        directories = model_directories(self.models, "needle")
        kinds = {reads_text(directory) for directory in directories}
        if len(kinds) > 1:
            raise UsageError("Some of the models read text and some do not; evaluate them in two calls.")
        if kinds == {True}:
            _refuse_changed(self.own, f"{directories[0]} reads text")
            return [self._find_in_text(directories)]
        _refuse_changed(self.text, f"{directories[0]} has no tokenizer.json and so gets the needle task")
        return [self._answer_own_task(directories)]

    def _find_in_text(self, directories: list[Path]) -> Table:
        from holdfast.data.ruler import RULER_TASKS
        from holdfast.evaluation.ruler import RulerSettings, evaluate_ruler, plot_ruler, prompts

        with usage_errors():
            settings = RulerSettings(
                tasks=tuple(RULER_TASKS) if self.text.tasks == ("all",) else self.text.tasks or ("niah_single_1",),
                lengths=self.length or (min(map(trained_length, directories)),),
                depths=self.text.depths,
                samples=10 if self.samples is None else self.samples,
                new_tokens=self.text.new_tokens,
                seed=self.seed,
                essays=read_haystack(self.text.haystack),
            )
        refuse_lengths(directories, max(settings.lengths), self.beyond)
        tokenizers = read_text_models(directories)
        for directory, tokenizer in tokenizers.items():
            with usage_errors():  # a length may be too short for a question
                asked = prompts(settings, tokenizer)
            refuse_unknown_tokens(asked, tokenizer, directory)
        names = shown_names(directories)
        results = {}
        for directory in directories:
            model = read_model(directory, self.dtype)
            log = open_log(self.json, "needle", directory, self._determining(settings))
            results[names[directory]] = evaluate_ruler(
                model,
                tokenizers[directory],
                settings,
                log=log,
                batch_size=4 if self.batch_size is None else self.batch_size,
                beyond=self.beyond,
            )
        table = _show_text(results)
        if self.json is not None:
            models = {name: result.to_dict() for name, result in results.items()}
            write_results(self.json, "needle", {**settings.to_dict(), "dtype": self.dtype}, models)
        if self.plot is not None:
            plot_ruler(results, self.plot)
        return table

    def _determining(self, settings: RulerSettings) -> dict[str, Any]:
        """What an answer follows from beside task, length, depth and index, which name it."""
        values = settings.to_dict()
        return {name: values[name] for name in ("new_tokens", "seed", "essays")} | {"dtype": self.dtype}

    def _answer_own_task(self, directories: list[Path]) -> Table:
        from holdfast.evaluation.needle import evaluate_needle, plot_accuracy_by_distance

        if len(self.length) > 1:
            raise UsageError("The needle task has one --length; give one, and call again for the next.")
        changes = {
            "length": self.length[0] if self.length else None,
            "num_pairs": self.own.pairs,
            "num_queries": self.own.queries,
            "window": self.own.window,
        }
        tasks = {directory: read_task(directory, **changes) for directory in directories}
        for directory, task in tasks.items():
            refuse_lengths([directory], task.length, self.beyond)
        names = shown_names(directories)
        settings = {"seed": self.seed, "dtype": self.dtype}
        samples = 512 if self.samples is None else self.samples
        results = {
            names[directory]: evaluate_needle(
                read_model(directory, self.dtype),
                task,
                samples=samples,
                batch_size=64 if self.batch_size is None else self.batch_size,
                seed=self.seed,
                log=open_log(self.json, "needle task", directory, {**_drawn_by(task), **settings}, "samples"),
            )
            for directory, task in tasks.items()
        }
        table = _show_own_task(results)
        if self.json is not None:
            models = {name: result.to_dict() for name, result in results.items()}
            write_results(self.json, "needle", {"samples": samples, **changes, **settings}, models)
        if self.plot is not None:
            plot_accuracy_by_distance(results, self.plot)
        return table


def _drawn_by(task: NeedleTask) -> dict[str, Any]:
    """The settings of the task that its samples follow from: all but the window, which only splits the results."""
    return {name: value for name, value in asdict(task).items() if name != "window"}


def _refuse_changed(options: TextOptions | OwnTaskOptions, reason: str) -> None:
    """Options for models of the other kind must not be given: they would be ignored."""
    default = type(options)()
    for option in fields(options):
        if getattr(options, option.name) != getattr(default, option.name):
            raise UsageError(f"{reason}; leave --{option.name.replace('_', '-')} out.")


def _show_text(results: Mapping[str, RulerResult]) -> Table:
    """A row for each model and task, a column for each length."""
    table = Table(title="needles found (95 % interval over samples)")
    table.add_column("model")
    table.add_column("task", no_wrap=True)
    lengths = list(dict.fromkeys(cell.length for result in results.values() for cell in result.cells))
    for length in lengths:
        table.add_column(f"{length:,} tokens", justify="right")
    for name, result in results.items():
        table.add_section()
        for task in dict.fromkeys(cell.task for cell in result.cells):
            shown = [show_share(cell.match_all) for cell in result.cells if cell.task == task]
            table.add_row(name, task, *shown)
    output_console().print(table)
    return table


def _show_own_task(results: dict[str, NeedleResult]) -> Table:
    """One row per stretch of distances, one column per model."""
    table = Table(title="accuracy by distance between question and answer (95 % interval)")
    table.add_column("distance", justify="right", no_wrap=True)
    for name in results:
        table.add_column(name, justify="right")
    # Models may have been trained on tasks of different lengths, so distances are matched by value.
    by_distance = {name: {(part.low, part.high): part.tally for part in r.bins} for name, r in results.items()}
    for low, high in sorted({distances for bins in by_distance.values() for distances in bins}):
        cells = [show_share(bins.get((low, high))) for bins in by_distance.values()]
        table.add_row(f"{low:,} to {high:,}", *cells)
    table.add_section()
    table.add_row("within the window", *(show_share(result.within) for result in results.values()))
    table.add_row("beyond the window", *(show_share(result.beyond) for result in results.values()))
    perplexities = (result.total.perplexity for result in results.values())
    table.add_row("perplexity", *("–" if value is None else f"{value:.3f}" for value in perplexities))
    output_console().print(table)
    return table
