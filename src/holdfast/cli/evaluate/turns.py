"""`holdfast evaluate turns`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.table import Table

from holdfast.cli.common import format_bytes, output_console, read_model, read_task
from holdfast.cli.errors import UsageError
from holdfast.cli.evaluate.common import (
    check_picture,
    model_directories,
    open_log,
    read_haystack,
    read_text_models,
    reads_text,
    refuse_lengths,
    require_positive,
    show_share,
    shown_names,
    usage_errors,
    write_results,
)

if TYPE_CHECKING:
    from holdfast.data.turns import TurnPlan, TurnScript
    from holdfast.evaluation.turns import TurnsResult


@dataclasses.dataclass(frozen=True)
class Turns:
    """What is still known several turns later: each turn tells facts and asks for some of this or of earlier turns. The
    cache carries the conversation, and no token is read twice. Models that read text (with a tokenizer.json) converse
    in text, models of the needle task in its tokens."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Directories of trained models."""
    turns: int = 8
    facts: int = 4
    """Facts that each turn tells."""
    questions: int = 2
    """Questions at the end of each turn; no fact is asked for twice."""
    turn_length: int | None = None
    """Tokens per turn at the most; questions, answers and, for text, what introduces the first are among them. Default:
    the length that the first model was trained on, divided by the turns."""
    haystack: tuple[str, ...] = ()
    """Texts between the facts: files, directories (all their text files), or data sets on the hub (split train);
    default: RULER's noise."""
    asides: bool = False
    """Ask every question aside: the cache then returns to what it was before, without reading again. So models of the
    needle task need not read facts after a question, which they never did in training."""
    conversations: int = 64
    batch_size: int = 16
    beyond: bool = False
    """Allow conversations beyond the length that a model was trained on."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    json: Path | None = None
    """Write all numbers to this file, and every answer to FILE.samples.jsonl, where a run that was interrupted goes
    on."""
    plot: Path | None = None
    """Draw accuracy by turns back into this file (png, svg or pdf)."""

    def __post_init__(self) -> None:
        require_positive(self, "turns", "facts", "questions", "turn_length", "conversations", "batch_size")
        check_picture(self.plot)

    def run(self) -> list[Table]:
        """Evaluate, and show a table; returns it."""
        from holdfast.data.turns import TurnPlan
        from holdfast.evaluation.turns import evaluate_turns, plot_turns

        directories = model_directories(self.models, "turns")
        with usage_errors():
            plan = TurnPlan(turns=self.turns, facts=self.facts, questions=self.questions)
        turn_length = self.turn_length or self._default_length(directories[0])
        scripts = self._scripts(directories, plan, turn_length)
        for directory, script in scripts.items():
            refuse_lengths([directory], script.length, self.beyond)
        names = shown_names(directories)
        settings = {"seed": self.seed, "dtype": self.dtype}
        results = {
            names[directory]: evaluate_turns(
                read_model(directory, self.dtype),
                script,
                conversations=self.conversations,
                seed=self.seed,
                log=open_log(self.json, "turns", directory, {**script.to_dict(), **settings}),
                batch_size=self.batch_size,
                beyond=self.beyond,
            )
            for directory, script in scripts.items()
        }
        table = _show(results)
        if self.json is not None:
            models = {
                names[directory]: {"script": script.to_dict(), **results[names[directory]].to_dict()}
                for directory, script in scripts.items()
            }
            write_results(self.json, "turns", settings, models)
        if self.plot is not None:
            plot_turns(results, self.plot)
        return [table]

    def _scripts(self, directories: list[Path], plan: TurnPlan, turn_length: int) -> dict[Path, TurnScript]:
        from holdfast.data.turns import NeedleTurns, TextTurns

        in_text = [directory for directory in directories if reads_text(directory)]
        if self.haystack and len(in_text) < len(directories):
            raise UsageError("--haystack is text, which some of the models cannot read; leave it out.")
        tokenizers = read_text_models(in_text)
        essays = read_haystack(self.haystack)
        scripts: dict[Path, TurnScript] = {}
        for directory in directories:
            with usage_errors():
                scripts[directory] = (
                    TextTurns(plan, tokenizers[directory], turn_length, essays=essays, asides=self.asides)
                    if directory in tokenizers
                    else NeedleTurns(plan, read_task(directory), turn_length, asides=self.asides)
                )
        return scripts

    def _default_length(self, directory: Path) -> int:
        from holdfast.configuration import HybridConfig

        return (HybridConfig.from_pretrained(directory).max_position_embeddings - 1) // self.turns


def _show(results: Mapping[str, TurnsResult]) -> Table:
    """One row per number of turns back, one column per model."""
    table = Table(title="accuracy by turns between fact and question (95 % interval)")
    table.add_column("turns back", justify="right")
    for name in results:
        table.add_column(name, justify="right")
    for back in sorted({back for result in results.values() for back in result.by_back}):
        table.add_row(str(back), *(show_share(result.by_back.get(back)) for result in results.values()))
    table.add_section()
    table.add_row("all", *(show_share(result.total) for result in results.values()))
    table.add_row("tokens", *(f"{result.tokens_said:,.0f}" for result in results.values()))
    table.add_row("cache", *(format_bytes(round(result.cache_bytes)) for result in results.values()))
    output_console().print(table)
    return table
