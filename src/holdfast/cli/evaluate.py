"""`holdfast evaluate`: needle, perplexity, and lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.table import Table

from holdfast.cli.common import model_directory, output_console, read_model, read_task
from holdfast.cli.errors import UsageError
from holdfast.cli.evaluate_scorers import Scorers
from holdfast.cli.parsing import parse
from holdfast.files import write_json

if TYPE_CHECKING:
    from holdfast.evaluation.needle import NeedleResult, Tally

DESCRIPTION = """\
Measure trained models.

examples:
  holdfast evaluate needle runs/needle-lalte runs/needle-gdn --plot accuracy.png
  holdfast evaluate needle runs/needle-lalte --length 1024 --pairs 32
  holdfast evaluate perplexity runs/books-lalte --data data/books --split validation --length 2048
  holdfast evaluate lm-eval runs/books-lalte --tasks lambada_openai,arc_easy --batch_size 8

`lm-eval MODEL_DIR` takes all options of `lm-eval run` (lm-evaluation-harness, `pip install 'holdfast[eval]'`).
"""


@dataclass(frozen=True)
class Needle:
    """Recall of key-value pairs by distance, on the task of the run's recipe.toml unless something else is given."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Directories of trained models."""
    length: int | None = None
    """Tokens per sample."""
    pairs: int | None = None
    """Key-value pairs in the context."""
    queries: int | None = None
    """How many of the pairs are asked for."""
    window: int | None = None
    """Window that splits the results into within and beyond; it does not change the samples."""
    samples: int = 512
    """Samples to draw, all with new seeds: training sees none of them."""
    batch_size: int = 64
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    json: Path | None = None
    """Write all numbers to this file."""
    plot: Path | None = None
    """Draw accuracy by distance into this file (png, svg or pdf)."""

    def run(self) -> None:
        """Evaluate, and show a table."""
        from holdfast.evaluation.needle import evaluate_needle, plot_accuracy_by_distance

        if not self.models:
            raise UsageError("Give at least one model directory: `holdfast evaluate needle MODEL_DIR`.")
        directories = [model_directory(name) for name in self.models]
        changes = {
            "length": self.length,
            "num_pairs": self.pairs,
            "num_queries": self.queries,
            "window": self.window,
        }
        tasks = [read_task(directory, **changes) for directory in directories]
        results = {
            str(directory): evaluate_needle(
                read_model(directory, self.dtype),
                task,
                samples=self.samples,
                batch_size=self.batch_size,
                seed=self.seed,
            )
            for directory, task in zip(directories, tasks, strict=True)
        }
        _show_needle(results)
        if self.json is not None:
            write_json(self.json, {name: result.to_dict() for name, result in results.items()})
        if self.plot is not None:
            plot_accuracy_by_distance(results, self.plot)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of text, overall and by position in the context."""

    model: tyro.conf.Positional[str]
    """Directory of a trained model with its tokenizer."""
    data: str
    """A file (parquet, jsonl, json, txt), a directory of them or of prepared text, or the name of a hub data set."""
    split: str = "validation"
    """Split of a directory or of a data set; a single file is read whole."""
    column: str = "text"
    config: str | None = None
    """Configuration of a data set on the hub."""
    length: int = 512
    """Tokens per block; it may be longer than in training."""
    batch_size: int = 8
    max_blocks: int | None = None
    """Read the first blocks only."""
    bins: int = 8
    """Parts of the context that are shown one by one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    json: Path | None = None
    """Write all numbers to this file."""

    def run(self) -> None:
        """Evaluate, and show a table."""
        from holdfast.data.text import PackedText, is_prepared, load_text, load_tokenizer, open_prepared
        from holdfast.data.tokenizers import fingerprint
        from holdfast.evaluation.perplexity import evaluate_perplexity

        if self.length < 2:
            raise UsageError(f"--length is {self.length}; give at least 2 tokens.")
        directory = model_directory(self.model)
        tokenizer = load_tokenizer(directory)
        if is_prepared(self.data):
            if fingerprint(load_tokenizer(self.data)) != fingerprint(tokenizer):
                raise UsageError(f"{self.data} was prepared with another tokenizer than that of {directory}.")
            blocks: Any = open_prepared(self.data, self.length, split=self.split)
        else:
            texts = load_text(self.data, split=self.split, text_column=self.column, config=self.config)
            max_tokens = None if self.max_blocks is None else (self.max_blocks + 1) * self.length
            blocks = PackedText.from_texts(texts, tokenizer, self.length, max_tokens=max_tokens)
        result = evaluate_perplexity(
            read_model(directory, self.dtype),
            (blocks[index] for index in range(len(blocks))),
            batch_size=self.batch_size,
            max_blocks=self.max_blocks,
            position_bins=self.bins,
        )
        table = Table(title=f"{directory}: {result.tokens:,} tokens in {result.blocks:,} blocks of {self.length:,}")
        for heading in ("positions", "tokens", "perplexity"):
            table.add_column(heading, justify="right")
        for part in result.bins:
            shown = "–" if part.perplexity is None else f"{part.perplexity:.3f}"
            table.add_row(f"{part.start:,} to {part.stop - 1:,}", f"{part.tokens:,}", shown)
        table.add_section()
        table.add_row("all", f"{result.tokens:,}", f"{result.perplexity:.3f}")
        output_console().print(table)
        output_console().print(f"{result.bits_per_token:.4f} bits per token")
        if self.json is not None:
            write_json(self.json, result.to_dict())


EVALUATIONS = (
    Annotated[Needle, tyro.conf.subcommand("needle")]
    | Annotated[Perplexity, tyro.conf.subcommand("perplexity")]
    | Annotated[Scorers, tyro.conf.subcommand("scorers")]
)


def run(arguments: Sequence[str]) -> None:
    """Parse and run one of the evaluations."""
    if arguments and arguments[0] == "lm-eval":  # whose options are not known here
        return _lm_eval(arguments[1:])
    parse(EVALUATIONS, arguments or ["--help"], prog="holdfast evaluate", description=DESCRIPTION).run()


def _lm_eval(arguments: Sequence[str]) -> None:
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        raise UsageError("Give the model first: `holdfast evaluate lm-eval MODEL_DIR --tasks TASKS [OPTIONS]`.")
    try:
        from holdfast.evaluation.harness import run_harness
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; `pip install 'holdfast[eval]'` brings it.") from error
    asks = arguments[0] in ("-h", "--help")
    run_harness("MODEL_DIR" if asks else str(model_directory(arguments[0])), ["--help"] if asks else arguments[1:])


def _show_needle(results: dict[str, NeedleResult]) -> None:
    """One row per stretch of distances, one column per model."""
    table = Table(title="accuracy by distance between question and answer (95 % interval)")
    table.add_column("distance", justify="right", no_wrap=True)
    for name in results:
        table.add_column(name, justify="right")
    # Models may have been trained on tasks of different lengths, so distances are matched by value.
    by_distance = {name: {(part.low, part.high): part.tally for part in r.bins} for name, r in results.items()}
    for low, high in sorted({distances for bins in by_distance.values() for distances in bins}):
        cells = [_share(bins.get((low, high))) for bins in by_distance.values()]
        table.add_row(f"{low:,} to {high:,}", *cells)
    table.add_section()
    table.add_row("within the window", *(_share(result.within) for result in results.values()))
    table.add_row("beyond the window", *(_share(result.beyond) for result in results.values()))
    perplexities = (result.total.perplexity for result in results.values())
    table.add_row("perplexity", *("–" if value is None else f"{value:.3f}" for value in perplexities))
    output_console().print(table)


def _share(tally: Tally | None) -> str:
    if tally is None or tally.interval is None:
        return "–"
    low, high = tally.interval
    return f"{tally.accuracy:.1%} ({low:.1%} to {high:.1%})"
