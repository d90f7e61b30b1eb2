"""`holdfast evaluate efficiency`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from holdfast.bench.settings import BenchSettings, SizeName
from holdfast.cli.bench import format_rate, format_seconds
from holdfast.cli.common import error_console, output_console, quieten_transformers
from holdfast.cli.errors import UsageError, usage_errors
from holdfast.cli.evaluate.common import (
    ModelsIfAny,
    check_picture,
    model_directories,
    open_log,
    read_text_models,
    require_positive,
    shown_names,
    write_results,
)
from holdfast.cli.evaluate.perplexity import TextBlocks
from holdfast.units import format_bytes, format_count

if TYPE_CHECKING:
    from torch import Tensor

    from holdfast.bench.accuracy import Accuracy
    from holdfast.bench.costs import Cost, ModelCosts
    from holdfast.bench.efficiency import EfficiencyPlan, Subject
    from holdfast.evaluation.sample_log import SampleLog

ABSENT = "not measured"
SPEED = "speed (all rows together; *: one reading, longer than --limit)"
LATENCY = "latency (per token of a row)"
SCORERS = "retention scorers (share of the time)"
MEMORY = "memory (peak: beyond the weights, while reading)"
HELD = "held (pairs of key and value, mean over KV heads)"
UNTRAINED = (
    "Untrained models that read random tokens: what laLTE holds is the capacity of its store, not what a trained "
    "scorer would keep."
)
RANDOM = "The models read random tokens; of text they may keep more or fewer (evaluate efficiency --data)."
MODELS = "models (heads of softmax attention: of queries, and KV of keys and values)"


@dataclass(frozen=True)
class Efficiency:
    """What models cost side by side, by context: speed of reading and generating, latency, peak memory, bytes of cache,
    pairs held per head, the scorers' share of the time, parameters and operations.

    Without models: every mixture of mixers in this library, untrained, with equally many parameters, not with equally
    many heads (the table of models has both). They read random tokens, so what laLTE holds then is the capacity of its
    store, and no trained scorer's choice. Models take turns, so that a machine whose speed drifts is fair to all."""

    models: ModelsIfAny = ()
    """Directories of trained models, or models on the hub (OWNER/NAME[@REVISION]); none: untrained ones of --size."""
    size: SizeName = "43m"
    """Of untrained models. 30m: 8 layers, hidden size 512, 30 million parameters each; 43m: 12 layers, 46 million."""
    data: str | None = None
    """Text for trained models to read, so that what they hold is what their scorers keep of text: a file (parquet,
    jsonl, json, txt), a directory of them or of prepared text, or the name of a hub data set. Left out: random tokens.
    """
    split: str | None = None
    """Split of a directory or of a data set (default: validation)."""
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    """Tokens read before the steps that are timed."""
    batch_sizes: tuple[int, ...] = (1,)
    """Rows read and generated at once."""
    steps: int = 200
    """Generated tokens of every row that are timed."""
    repeats: int = 3
    """Readings of every context that are timed."""
    chunk: int = 2048
    """Tokens that a model reads in one call."""
    limit: float = 60.0
    """Seconds after which a model takes no further turn at a context. What a lower one cut short is measured again."""
    longest: float | None = None
    """Seconds that reading a context once may take; one that would take longer, or needs more memory than is free, is
    not measured. Left out: --limit."""
    memory: bool = True
    """Measure peak memory: one more reading each, off CUDA in a new process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on CUDA, float32 elsewhere."""
    threads: int | None = None
    """Of PyTorch on the CPU; left out: as many as PyTorch takes (OMP_NUM_THREADS)."""
    seed: int = 0
    """Of the tokens read, and of random weights."""
    accuracy: Path | None = None
    """What `holdfast evaluate needle --json` or `holdfast demo` (results.json) wrote about the same models, for
    --pareto."""
    json: Path | None = None
    """Write all numbers to this file (NAME.json), and each as soon as it is measured beside it to NAME.samples.jsonl,
    where a run that was interrupted goes on."""
    plot: Path | None = None
    """Draw costs by context into this file (png, svg or pdf)."""
    pareto: Path | None = None
    """Draw accuracy against bytes of cache and against latency into this file; needs --accuracy."""

    def __post_init__(self) -> None:
        require_positive(self, "contexts", "batch_sizes", "steps", "repeats", "chunk", "threads")
        if not (self.contexts and self.batch_sizes):
            raise UsageError("Give at least one of --contexts and one of --batch-sizes.")
        for option, seconds in (("--limit", self.limit), ("--longest", self.longest)):
            if seconds is not None and not seconds > 0:
                raise UsageError(f"{option} is {seconds:g}; give more than 0 seconds.")
        check_picture(self.plot)
        check_picture(self.pareto, "--pareto")
        if (self.pareto is None) != (self.accuracy is None):
            raise UsageError("--pareto and --accuracy go together; give both or neither.")
        if self.pareto is not None and not self.models:
            raise UsageError("--pareto needs trained models, whose accuracies --accuracy holds; name them.")
        if self.data is not None and not self.models:
            raise UsageError("--data is text for trained models to read; name them.")
        if self.split is not None and self.data is None:
            raise UsageError("--split is of --data; give both.")

    def run(self) -> list[Table]:
        """Measure, and show tables; returns them."""
        from holdfast.bench.efficiency import EfficiencyPlan, measure_efficiency

        subjects = self._subjects()
        accuracies = self._accuracies([subject.name for subject in subjects])
        with usage_errors():
            device, dtype = BenchSettings(
                device=self.device, dtype=self.dtype, threads=self.threads, seed=self.seed
            ).resolve()
        quieten_transformers()
        names = ("contexts", "batch_sizes", "steps", "repeats", "chunk", "limit", "memory", "seed")
        plan = EfficiencyPlan(**{name: getattr(self, name) for name in names}, longest=self.longest or self.limit)
        settings = {**plan.determining(), "dtype": str(dtype).removeprefix("torch.")}
        logs = {subject.name: self._log(subject, settings) for subject in subjects}
        results = measure_efficiency(subjects, plan, device=device, dtype=dtype, logs=logs)
        tables = _tables(results, plan, text=self.data is not None)
        output_console().print(*tables)
        if self.json is not None:
            also = ("contexts", "batch_sizes", "limit", "longest")
            text = {} if self.data is None else {"data": Path(self.data).name, "split": self.split or "validation"}
            chosen = {**settings, **text, **{name: getattr(plan, name) for name in also}}
            models = {name: costs.to_dict() for name, costs in results.items()}
            write_results(self.json, "efficiency", chosen, models)
        self._draw(results, accuracies, settings["dtype"])
        return tables

    def _accuracies(self, names: Sequence[str]) -> dict[str, list[Accuracy]]:
        """Of the models with these names; checked now, since to measure costs may take hours."""
        from holdfast.bench.accuracy import read_accuracies

        if self.accuracy is None:
            return {}
        with usage_errors():
            found = read_accuracies(self.accuracy)
        if not found.keys() & set(names):
            others = ", ".join(found) or "no model"
            raise UsageError(
                f"{self.accuracy} has accuracies of {others}, not of {', '.join(names)}; give another file."
            )
        return found

    def _subjects(self) -> list[Subject]:
        from holdfast.bench.efficiency import Subject
        from holdfast.bench.models import SIZES, equal_configs

        if self.models:
            names = shown_names(model_directories(self.models, "efficiency"))
            return [Subject(name, directory, self._text(directory)) for directory, name in names.items()]
        return [Subject(name, config) for name, config in equal_configs(SIZES[self.size]).items()]

    def _text(self, directory: Path) -> Tensor | None:
        """Of --data, as many rows and tokens as are read at the most, int64 [rows, T]."""
        if self.data is None:
            return None
        import torch

        rows, tokens = max(self.batch_sizes), max(self.contexts)
        tokenizer = read_text_models([directory], english=False)[directory]
        blocks = TextBlocks(self.data, self.split or "validation", "text", None, tokens, rows).read(
            tokenizer, directory
        )
        if len(blocks) < rows:
            raise UsageError(
                f"{self.data} has {len(blocks)} rows of {tokens:,} tokens for {directory}, and {rows} are asked for; "
                "give more text, or smaller --contexts or --batch-sizes."
            )
        return torch.stack([blocks[row]["input_ids"] for row in range(rows)])

    def _log(self, subject: Subject, settings: Mapping[str, Any]) -> SampleLog:
        """The log of one model on this machine."""
        from holdfast.machine import describe_machine

        machine = describe_machine()
        where = {name: machine[name] for name in ("processor", "threads")} | {"device": self.device} | subject.log_key()
        return open_log(self.json, "efficiency", subject.source, {**settings, **where}, what="measurements")

    def _draw(self, results: Mapping[str, ModelCosts], accuracies: Mapping[str, list[Accuracy]], dtype: str) -> None:
        from holdfast.bench.efficiency_plots import pareto_points, plot_costs, plot_pareto
        from holdfast.bench.plots import machine_line
        from holdfast.machine import describe_machine

        # What was measured is shown and written by now, and stays so where it is too little for a picture.
        if self.plot is not None:
            with _remark("--plot"):
                plot_costs(results, self.plot, machine=machine_line(describe_machine(), dtype))
        if self.pareto is not None:
            with _remark("--pareto"):
                plot_pareto(pareto_points(results, accuracies), self.pareto)


@contextmanager
def _remark(option: str) -> Iterator[None]:
    """Say why a picture is not drawn."""
    try:
        yield
    except ValueError as error:
        error_console().print(f"{option} is not drawn: {error}", soft_wrap=True)


def _tables(results: Mapping[str, ModelCosts], plan: EfficiencyPlan, text: bool = False) -> list[Table]:
    """Several narrow tables: one of all columns would be cut in a terminal of 80."""
    scored = {name: costs for name, costs in results.items() if costs.scorer_flops_per_token}
    tables = [_speed_table(results, plan), _latency_table(results, plan)]
    tables += [_scorers_table(scored, plan)] if scored else []
    tables += [_memory_table(results, plan), _held_table(results, plan, text)]
    tables += [_models_table(results), _operations_table(results)]
    return tables + ([_missing_table(results)] if any(costs.missing for costs in results.values()) else [])


def _speed_table(results: Mapping[str, ModelCosts], plan: EfficiencyPlan) -> Table:
    def cells(cost: Cost) -> list[str]:
        return [format_rate(cost.prefill_rate) + "*" * (not cost.prefill.warmed_up), format_rate(cost.decode_rate)]

    return _by_place(SPEED, ("prefill tok/s", "decode tok/s"), cells, results, plan)


def _latency_table(results: Mapping[str, ModelCosts], plan: EfficiencyPlan) -> Table:
    def cells(cost: Cost) -> list[str]:
        latency = cost.decode.summary
        return [format_seconds(value) for value in (latency.median, latency.p90, latency.p99)]

    return _by_place(LATENCY, ("p50", "p90", "p99"), cells, results, plan)


def _scorers_table(results: Mapping[str, ModelCosts], plan: EfficiencyPlan) -> Table:
    def cells(cost: Cost) -> list[str]:
        return ["–", "–"] if cost.scorer is None else [f"{cost.scorer.prefill:.0%}", f"{cost.scorer.decode:.0%}"]

    return _by_place(SCORERS, ("of prefill", "of decode"), cells, results, plan)


def _memory_table(results: Mapping[str, ModelCosts], plan: EfficiencyPlan) -> Table:
    def cells(cost: Cost) -> list[str]:
        return [ABSENT if cost.peak_bytes is None else format_bytes(cost.peak_bytes), format_bytes(cost.cache_bytes)]

    return _by_place(MEMORY, ("peak memory", "cache"), cells, results, plan)


def _held_table(results: Mapping[str, ModelCosts], plan: EfficiencyPlan, text: bool) -> Table:
    def cells(cost: Cost) -> list[str]:
        if cost.held is None:
            return ["–", "–"]
        return [f"{cost.held.mean:,.0f}", "–" if cost.held.stored is None else f"{cost.held.stored:,.0f}"]

    table = _by_place(HELD, ("held per head", "in store"), cells, results, plan)
    if not all(costs.trained for costs in results.values()):
        table.caption, table.caption_justify = UNTRAINED, "left"
    elif not text:
        table.caption, table.caption_justify = RANDOM, "left"
    return table


def _by_place(
    title: str,
    headings: Sequence[str],
    cells: Callable[[Cost], list[str]],
    results: Mapping[str, ModelCosts],
    plan: EfficiencyPlan,
) -> Table:
    """A row for each batch size, context and model."""
    table = Table(title=title, title_justify="left")
    for heading in ("batch", "context"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("model", overflow="fold")  # a long name takes more lines, and no number is cut
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for batch in plan.batch_sizes:
        for context in sorted(set(plan.contexts)):
            table.add_section()
            for name, costs in results.items():
                cost = costs.at(context, batch)
                shown = [ABSENT] if cost is None else cells(cost)
                table.add_row(f"{batch:,}", f"{context:,}", name, *shown)
    return table


def _models_table(results: Mapping[str, ModelCosts]) -> Table:
    """A row for each model."""
    table = Table(title=MODELS, title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("weights", no_wrap=True)
    for heading in ("parameters", "of scorers", "heads", "KV heads"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, costs in results.items():
        scorers = costs.parameters.get("retention scorer")
        heads = [
            " ".join(f"{count:,}" for count in dict.fromkeys(counts))
            for counts in zip(*costs.heads.values(), strict=True)
        ]
        table.add_row(
            name,
            "trained" if costs.trained else "random",
            f"{sum(costs.parameters.values()):,}",
            "–" if scorers is None else f"{scorers:,}",
            *(heads or ("–", "–")),
        )
    return table


def _operations_table(results: Mapping[str, ModelCosts]) -> Table:
    """A column for each model."""
    table = Table(title="operations of one forward token (multiply-adds × 2)", title_justify="left")
    table.add_column("context", justify="right", no_wrap=True)
    for name in results:
        table.add_column(name, justify="right", overflow="fold")
    every = list(results.values())
    for context in every[0].flops_per_token:
        table.add_row(f"{context:,}", *(format_count(costs.flops_per_token[context]) for costs in every))
    shares = [costs.scorer_flops_per_token for costs in every]
    if any(shares):
        table.add_section()
        table.add_row("scorers", *(format_count(count) if count else "–" for count in shares))
    return table


def _missing_table(results: Mapping[str, ModelCosts]) -> Table:
    """A row for each context and batch size that a model was not measured at."""
    table = Table(title=ABSENT, title_justify="left")
    table.add_column("model", overflow="fold")
    for heading in ("context", "batch"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("because")
    for name, costs in results.items():
        for (context, batch), reason in costs.missing.items():
            table.add_row(name, f"{context:,}", f"{batch:,}", reason)
    return table
