"""`holdfast evaluate turns`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.table import Table

from holdfast.cli.common import error_console, output_console, read_model, read_task
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
from holdfast.units import format_bytes

if TYPE_CHECKING:
    from holdfast.data.turns import TurnPlan, TurnScript
    from holdfast.evaluation.turns import TurnsResult

TURNS = 8
"""Of a conversation, unless fewer fit or others are asked for."""


@dataclasses.dataclass(frozen=True)
class Turns:
    """What is still known several turns later: each turn tells facts and asks for some of this or of earlier turns. The
    cache carries the conversation, and no token is read twice. Models that read text (with a tokenizer.json) converse
    in text, models of the needle task in its tokens."""

    models: Models
    """Directories of trained models, or models on the hub (OWNER/NAME[@REVISION])."""
    turns: int | None = None
    """Turns of a conversation. Default: 8; with --facts and --questions left out too, fewer, with fewer facts if need
    be, where models were trained on short texts."""
    facts: int | None = None
    """Facts that each turn tells; default: 4 (see --turns)."""
    questions: int | None = None
    """Questions at the end of each turn; no fact is asked for twice. Default: 2 (see --turns)."""
    turn_length: int | None = None
    """Tokens per turn at the most; questions, answers and, for text, what introduces the first are among them. Default:
    the length that every model was trained on, divided by the turns."""
    haystack: tuple[str, ...] = ()
    """Texts between the facts: files, directories (all their text files), or data sets on the hub (split train);
    default: RULER's noise."""
    asides: bool = False
    """Ask every question aside: the cache then returns to what it was before, without reading again. So models of the
    needle task need not read facts after a question, which they never did in training."""
    samples: int = 64
    """Conversations to hold with each model."""
    batch_size: int = 16
    """Conversations held side by side."""
    beyond: bool = False
    """Allow conversations beyond the length that a model was trained on."""
    seed: int = 0
    """Of what is told and asked."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights, and of what is computed with them."""
    lowered_from: tyro.conf.Suppress[tuple[int, int, int] | None] = None
    """Turns, facts and questions that did not fit, where the caller has lowered them already."""
    json: Path | None = None
    """Write all numbers to this file (NAME.json), and every answer beside it to NAME.samples.jsonl, where a run that
    was interrupted goes on."""
    plot: Path | None = None
    """Draw accuracy by turns back into this file (png, svg or pdf)."""

    def __post_init__(self) -> None:
        require_positive(self, "turns", "facts", "questions", "turn_length", "samples", "batch_size")
        check_picture(self.plot)

    def run(self) -> list[Table]:
        """Evaluate, and show a table; returns it."""
        from holdfast.evaluation.turns import evaluate_turns, plot_turns, told_texts

        directories = model_directories(self.models, "turns")
        told = min(map(trained_length, directories)) - 1
        plan, lowered_from = self._plan(directories, told)
        turn_length = self.turn_length or told // plan.turns
        try:
            scripts = self._scripts(directories, plan, turn_length)
            for directory, script in scripts.items():
                refuse_lengths([directory], script.length, self.beyond)
        except UsageError as error:
            raise UsageError(f"{error}{self._what_fits(plan, directories, told)}") from error
        if lowered_from is not None:
            told_of = f"these models, trained on {told + 1:,} tokens"
            remark = f"{_spelt(lowered_from)} do not fit {told_of}: {_spelt(plan)} instead."
            error_console().print(remark, soft_wrap=True)
        for directory, script in scripts.items():
            if script.tokenizer is not None:
                refuse_unknown_tokens(told_texts(script, self.seed, range(self.samples)), script.tokenizer, directory)
        names = shown_names(directories)
        settings = {"seed": self.seed, "dtype": self.dtype}
        results = {}
        for directory, script in scripts.items():
            model = read_model(directory, self.dtype)
            log = open_log(self.json, "turns", directory, {**script.to_dict(), **settings})
            results[names[directory]] = evaluate_turns(
                model,
                script,
                conversations=self.samples,
                seed=self.seed,
                log=log,
                batch_size=self.batch_size,
                beyond=self.beyond,
            )
        table = _show(results)
        if self.json is not None:
            models = {
                names[directory]: {"script": script.to_dict(), **results[names[directory]].to_dict()}
                for directory, script in scripts.items()
            }
            lowered = None if lowered_from is None else dataclasses.asdict(lowered_from)
            write_results(self.json, "turns", {**settings, "lowered_from": lowered}, models)
        if self.plot is not None:
            plot_turns(results, self.plot)
        return [table]

    def _plan(self, directories: list[Path], told: int) -> tuple[TurnPlan, TurnPlan | None]:
        """What was asked for; where that was nothing, as much as fits. And what it was lowered from, if it was."""
        from holdfast.data.turns import TurnPlan

        with usage_errors():
            wanted = TurnPlan(turns=self.turns or TURNS, facts=self.facts or 4, questions=self.questions or 2)
        if self.turns is self.facts is self.questions is None:
            plan = turns_that_fit(TURNS, directories, told, self.turn_length, beyond=self.beyond)
            return plan, None if plan == wanted else wanted
        if self.lowered_from is None:
            return wanted, None
        turns, facts, questions = self.lowered_from
        return wanted, TurnPlan(turns=turns, facts=facts, questions=questions)

    def _what_fits(self, plan: TurnPlan, directories: list[Path], told: int) -> str:
        """What to lower, where a plan does not fit the models."""
        fits = fitting(directories, told, self.turn_length, beyond=self.beyond)
        if fits(plan):
            return ""
        fewer = (dataclasses.replace(plan, turns=turns) for turns in range(plan.turns - 1, 0, -1))
        if (found := next(filter(fits, fewer), None)) is not None:
            each = f"{plan.facts} facts and {plan.questions} questions"
            return f" With {each} in a turn at most --turns {found.turns} fit."
        return " Lower --facts or --questions, or leave --turns, --facts and --questions out to have what fits."

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


def _spelt(plan: TurnPlan) -> str:
    return f"{plan.turns} turns of {plan.facts} facts and {plan.questions} questions"


def turns_that_fit(
    most: int, directories: Sequence[Path], tokens: int, turn_length: int | None = None, *, beyond: bool = False
) -> TurnPlan:
    """As many turns as every model can read, `most` at the most.

    Args:
        most: turns.
        directories: of the models.
        tokens: that a conversation may have.
        turn_length: tokens of a turn; None: `tokens` divided by the turns.
        beyond: with `turn_length`, allow more than `tokens`.

    Raises:
        UsageError: if not even two turns of one fact fit, or a model cannot read its tokens.
    """
    from holdfast.data.turns import fitting_plan

    plan = fitting_plan(fitting(directories, tokens, turn_length, beyond=beyond), most)
    if plan is None:
        where = "" if turn_length is None else f" in turns of {turn_length:,}"
        raise UsageError(
            f"not even two turns with a fact each fit into the {tokens + 1:,} tokens of these models{where}."
        )
    return plan


def fitting(
    directories: Sequence[Path], tokens: int, turn_length: int | None, *, beyond: bool
) -> Callable[[TurnPlan], bool]:
    """Whether every model can read a plan; the arguments are those of `turns_that_fit`."""
    from holdfast.data.turns import NeedleTurns, TextTurns

    tokenizers = read_text_models(directory for directory in directories if reads_text(directory)).values()
    keys = [read_task(directory).num_keys for directory in directories if not reads_text(directory)]

    def fits(plan: TurnPlan) -> bool:
        shortest = [TextTurns.shortest_turn(plan, tokenizer) for tokenizer in tokenizers]
        shortest += [NeedleTurns.shortest_turn(plan)] * bool(keys)
        if any(plan.turns * plan.facts > number for number in keys):
            return False
        if turn_length is None:
            return plan.turns * max(shortest) <= tokens
        return max(shortest) <= turn_length and (beyond or plan.turns * turn_length <= tokens)

    return fits


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
