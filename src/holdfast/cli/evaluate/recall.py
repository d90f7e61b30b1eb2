"""`holdfast evaluate recall`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.table import Table

from holdfast.cli.common import output_console, read_model
from holdfast.cli.errors import UsageError
from holdfast.cli.evaluate.common import (
    model_directories,
    open_log,
    read_text_models,
    require_positive,
    show_share,
    shown_names,
    usage_errors,
    write_results,
)

if TYPE_CHECKING:
    from holdfast.data.recall import RecallSample
    from holdfast.evaluation.recall import RecallResult


@dataclass(frozen=True)
class Recall:
    """How often the answer stands in what a model writes after a document: FDA, SWDE and SQuAD completion."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Directories of trained models, or models on the hub (OWNER/NAME[@REVISION]), with their tokenizers."""
    tasks: tuple[Literal["fda", "swde", "squad"], ...] = ("fda", "swde", "squad")
    data: str | None = None
    """For one task, a file instead of its data set on the hub: parquet, jsonl or json with columns text and value, for
    squad also SQuAD's published JSON; or the name of another data set."""
    limit: int | None = None
    """Ask so many samples of a task at the most, drawn at random."""
    seed: int = 0
    """Of what is drawn with --limit."""
    new_tokens: int = 48
    """Tokens of a continuation at the most; it also ends at a line break."""
    batch_size: int = 8
    beyond: bool = False
    """Allow prompts beyond the length that a model was trained on."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    json: Path | None = None
    """Write all numbers to this file, and every continuation to FILE.samples.jsonl, where a run that was interrupted
    goes on."""

    def __post_init__(self) -> None:
        require_positive(self, "limit", "new_tokens", "batch_size")

    def run(self) -> list[Table]:
        """Evaluate, and show a table; returns it."""
        from holdfast.data.recall import load_recall
        from holdfast.evaluation.recall import evaluate_recall

        directories = model_directories(self.models, "recall")
        if self.data is not None and len(self.tasks) != 1:
            raise UsageError("--data holds one task; say which with --tasks.")
        with usage_errors():
            samples: dict[str, list[RecallSample]] = {
                task: load_recall(task, self.data, limit=self.limit, seed=self.seed) for task in self.tasks
            }
        tokenizers = read_text_models(directories)
        for directory, tokenizer in tokenizers.items():
            self._refuse_long(directory, samples, tokenizer)
        names = shown_names(directories)
        results: dict[str, dict[str, RecallResult]] = {}
        for directory in directories:
            model = read_model(directory, self.dtype)
            determining = {"dtype": self.dtype, "new_tokens": self.new_tokens}
            results[names[directory]] = {
                task: evaluate_recall(
                    model,
                    tokenizers[directory],
                    asked,
                    new_tokens=self.new_tokens,
                    log=open_log(self.json, f"recall {task}", directory, determining),
                    batch_size=self.batch_size,
                    beyond=self.beyond,
                )
                for task, asked in samples.items()
            }
        table = _show(results)
        if self.json is not None:
            self._write(self.json, results)
        return [table]

    def _refuse_long(self, directory: Path, samples: Mapping[str, list[RecallSample]], tokenizer: Any) -> None:
        """Refuse prompts that leave less room for an answer than the model was trained on, unless `beyond`."""
        from holdfast.configuration import HybridConfig

        prompts = [sample.prompt for asked in samples.values() for sample in asked]
        lengths = [len(ids) + self.new_tokens for ids in tokenizer(prompts).input_ids]
        told = HybridConfig.from_pretrained(directory).max_position_embeddings
        if (too_long := sum(length > told for length in lengths)) and not self.beyond:
            raise UsageError(
                f"{too_long:,} of {len(lengths):,} prompts with answers of {self.new_tokens} tokens are longer than "
                f"the {told:,} tokens that {directory} was trained on (max_position_embeddings), the longest "
                f"{max(lengths):,}; give --beyond to ask them all the same, or ask fewer with --limit."
            )

    def _write(self, path: Path, results: Mapping[str, Mapping[str, RecallResult]]) -> None:
        settings = {
            "tasks": list(self.tasks),
            "data": None if self.data is None else Path(self.data).name,
            "limit": self.limit,
            "new_tokens": self.new_tokens,
            "dtype": self.dtype,
            "seed": self.seed,
        }
        models = {name: {task: r.to_dict() for task, r in tasks.items()} for name, tasks in results.items()}
        write_results(path, "recall", settings, models)


def _show(results: Mapping[str, Mapping[str, RecallResult]]) -> Table:
    """A row for each model, a column for each task."""
    table = Table(title="answers found in one line of continuation (95 % interval)")
    table.add_column("model")
    columns = next(iter(results.values()))
    for task, result in columns.items():
        table.add_column(f"{task}, {result.contains.count:,} samples", justify="right")
    for name, tasks in results.items():
        table.add_row(name, *(show_share(result.contains) for result in tasks.values()))
    output_console().print(table)
    return table
