"""`holdfast evaluate recall`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from holdfast.cli.common import error_console, output_console, read_model
from holdfast.cli.errors import UsageError, one_line, usage_errors
from holdfast.cli.evaluate.common import (
    Models,
    model_directories,
    open_log,
    read_text_models,
    refuse_unknown_tokens,
    require_positive,
    show_share,
    shown_names,
    write_results,
)
from holdfast.files import UnreadableError

if TYPE_CHECKING:
    from holdfast.data.recall import RecallSample
    from holdfast.evaluation.recall import RecallResult


@dataclass(frozen=True)
class Recall:
    """How often the answer stands in what a model writes after a document: FDA, SWDE and SQuAD completion."""

    models: Models
    """Directories of trained models, or models on the hub (OWNER/NAME[@REVISION]), with their tokenizers."""
    tasks: tuple[Literal["fda", "swde", "squad"], ...] = ()
    """Default: all; of a file as SQuAD publishes it, squad."""
    data: str | None = None
    """For one task, a file instead of its data set on the hub: parquet, jsonl or json with columns text and value, for
    squad also SQuAD's published JSON; or the name of another data set."""
    samples: int | None = None
    """Ask so many samples of a task at the most, drawn at random."""
    seed: int = 0
    """Of what is drawn with --samples."""
    new_tokens: int = 48
    """Tokens of a continuation at the most; it also ends at a line break."""
    batch_size: int = 8
    beyond: bool = False
    """Allow prompts beyond the length that a model was trained on."""
    skip_long: bool = False
    """Leave out, for all models, the prompts that are too long for one of them, and say how many."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    json: Path | None = None
    """Write all numbers to this file, and every continuation to FILE.samples.jsonl, where a run that was interrupted
    goes on."""

    def __post_init__(self) -> None:
        require_positive(self, "samples", "new_tokens", "batch_size")
        if self.beyond and self.skip_long:
            raise UsageError("--beyond asks what is too long, and --skip-long leaves it out; give one of them.")

    def run(self) -> list[Table]:
        """Evaluate, and show a table; returns it."""
        from holdfast.evaluation.recall import evaluate_recall

        directories = model_directories(self.models, "recall")
        tokenizers = read_text_models(directories)
        samples: dict[str, list[RecallSample]] = {task: self._load(task) for task in self._tasks()}
        samples = self._that_fit(samples, tokenizers)
        for directory, tokenizer in tokenizers.items():
            prompts = (tokenizer(sample.prompt).input_ids for asked in samples.values() for sample in asked)
            refuse_unknown_tokens(prompts, tokenizer, directory)
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

    def _tasks(self) -> tuple[str, ...]:
        """Those that are asked for, or all; of a file the one that it holds."""
        from holdfast.data.recall import RECALL_TASKS, is_published_squad

        tasks: tuple[str, ...] = self.tasks or tuple(RECALL_TASKS)
        if self.data is None:
            return tasks
        if is_published_squad(self.data):
            if self.tasks not in ((), ("squad",)):
                raise UsageError(f"--data is {self.data}, SQuAD's questions; leave --tasks out, or give --tasks squad.")
            return ("squad",)
        if len(tasks) > 1:
            raise UsageError("--data holds one task; say which with --tasks.")
        return tasks

    def _load(self, task: str) -> list[RecallSample]:
        from holdfast.data.recall import load_recall

        if self.data is not None:
            with usage_errors("--data"):
                return load_recall(task, self.data, limit=self.samples, seed=self.seed)
        try:
            return load_recall(task, limit=self.samples, seed=self.seed)
        except UnreadableError:
            raise
        except (ValueError, FileNotFoundError) as error:
            advice = f"or give a file of the task: --tasks {task} --data FILE"
            raise UsageError(f"{one_line(error)}; {advice}") from error

    def _that_fit(
        self, samples: Mapping[str, list[RecallSample]], tokenizers: Mapping[Path, Any]
    ) -> dict[str, list[RecallSample]]:
        """The samples that, with an answer, are no longer than any model was trained on; all of them if `beyond`."""
        from holdfast.configuration import HybridConfig

        if self.beyond:
            return dict(samples)
        told = {directory: HybridConfig.from_pretrained(directory).max_position_embeddings for directory in tokenizers}
        limits = " or ".join(f"the {length:,} tokens that {name} was trained on" for name, length in told.items())
        fitting = {task: list(asked) for task, asked in samples.items()}
        for asked, (directory, tokenizer) in itertools.product(fitting.values(), tokenizers.items()):
            prompts = tokenizer([sample.prompt for sample in asked]).input_ids if asked else []
            room = told[directory] - self.new_tokens
            asked[:] = [sample for sample, ids in zip(asked, prompts, strict=True) if len(ids) <= room]
        for task, asked in fitting.items():
            count, answers = len(samples[task]) - len(asked), f"answers of {self.new_tokens} tokens"
            what = f"{count:,} of {len(samples[task]):,} prompts of {task} with {answers} are longer than {limits}"
            if count and not (self.skip_long and asked):
                advice = "--beyond to ask them all the same" + (", or --skip-long to leave them out" if asked else "")
                raise UsageError(f"{what} (max_position_embeddings); give {advice}.")
            if count:
                error_console().print(f"{what}: left out.", soft_wrap=True)
        return fitting

    def _write(self, path: Path, results: Mapping[str, Mapping[str, RecallResult]]) -> None:
        settings = {
            "tasks": list(next(iter(results.values()))),
            "data": None if self.data is None else Path(self.data).name,
            "samples": self.samples,
            "new_tokens": self.new_tokens,
            "dtype": self.dtype,
            "seed": self.seed,
            "skip_long": self.skip_long,
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
