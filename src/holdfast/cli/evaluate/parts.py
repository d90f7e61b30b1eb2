"""What `holdfast evaluate all` can evaluate: a part for each evaluation, task or model, in the order of the page."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.table import Table

from holdfast.cli.evaluate.common import reads_text, shown_names, trained_length
from holdfast.cli.evaluate.efficiency import Efficiency
from holdfast.cli.evaluate.needle import Needle, TextOptions
from holdfast.cli.evaluate.perplexity import Perplexity
from holdfast.cli.evaluate.recall import Recall
from holdfast.cli.evaluate.scorers import Scorers
from holdfast.cli.evaluate.turns import Turns, turns_that_fit

if TYPE_CHECKING:
    from holdfast.cli.evaluate.suite import All

LONGEST_BLOCK = 2048
"""Tokens of a block of text at the most, so that those of models with long contexts are read in minutes too."""
TOKENS_AT_ONCE = 4096
"""Of blocks of text read side by side: the logits of all are in memory."""


class Evaluation(Protocol):
    """A command of `holdfast evaluate`."""

    def run(self) -> list[Table]: ...


@dataclass(frozen=True)
class Part:
    """One evaluation of some of the models, or why it cannot be done."""

    title: str
    name: str
    """Of its files."""
    models: tuple[Path, ...]
    make: Callable[[], Evaluation] | str

    @property
    def kind(self) -> str:
        """What `--parts` calls it."""
        return self.name.partition("-")[0]


def plan_parts(chosen: All, directories: Sequence[Path], measured: Container[str]) -> Iterator[Part]:
    """Everything that could be evaluated, in the order of the page.

    Args:
        chosen: the options.
        directories: of the models.
        measured: names of the parts whose files are those of these models by now; looked at when a part is made.
    """
    text = tuple(directory for directory in directories if reads_text(directory))
    tokens = tuple(directory for directory in directories if directory not in text)
    yield from _needles(chosen, text, tokens)
    yield from _conversations(chosen, text, tokens)
    if text:
        yield _perplexity(chosen, text)
        yield _recall(chosen, text)
    labels = shown_names(directories)
    for directory in directories:
        yield _scorers(chosen, directory, labels[directory])
    yield _efficiency(chosen, tuple(directories), measured)


def _needles(chosen: All, text: tuple[Path, ...], tokens: tuple[Path, ...]) -> Iterator[Part]:
    from holdfast.data.ruler import RULER_TASKS

    if tokens:
        yield Part(
            "needle task",
            "needle-task",
            tokens,
            lambda: Needle(_names(tokens), samples=chosen.samples, **_common(chosen), **_files(chosen, "needle-task")),
        )
    if not text:
        return
    length = chosen.length or min(map(trained_length, text))
    for task, asked in RULER_TASKS.items():
        name = f"needle-{task}"

        def make(task: str = task, name: str = name) -> Needle:
            return Needle(
                _names(text),
                length=(length,),
                samples=max(1, chosen.samples // 100),
                text=TextOptions(tasks=(task,), haystack=chosen.haystack),
                **_common(chosen),
                **_files(chosen, name),
            )

        without = asked.haystack == "essays" and not chosen.haystack
        yield Part(f"RULER, {task}", name, text, "no --haystack was given." if without else make)


def _conversations(chosen: All, text: tuple[Path, ...], tokens: tuple[Path, ...]) -> Iterator[Part]:
    for group, name, kind in ((tokens, "turns-task", "needle task"), (text, "turns-text", "text")):
        if group:

            def make(group: tuple[Path, ...] = group, name: str = name) -> Turns:
                from holdfast.data.turns import TurnPlan

                told = min(map(trained_length, group)) - 1
                plan = turns_that_fit(chosen.turns, group, told)
                wanted = (chosen.turns, TurnPlan.facts, TurnPlan.questions)
                return Turns(
                    _names(group),
                    turns=plan.turns,
                    facts=plan.facts,
                    questions=plan.questions,
                    lowered_from=None if wanted == (plan.turns, plan.facts, plan.questions) else wanted,
                    turn_length=told // plan.turns,
                    samples=max(1, chosen.samples // 8),
                    asides=group == tokens,  # these have never read on after an answer
                    haystack=chosen.haystack if group == text else (),
                    **_common(chosen),
                    **_files(chosen, name),
                )

            yield Part(f"several turns, {kind}", name, group, make)


def _perplexity(chosen: All, text: tuple[Path, ...]) -> Part:
    """One call for all: models that read the same blocks are compared block by block."""
    if chosen.data is None:
        return Part("perplexity", "perplexity", text, "no --data was given.")
    data, length = chosen.data, min(map(_block_length, text))
    return Part(
        "perplexity",
        "perplexity",
        text,
        lambda: Perplexity(
            _names(text),
            data=data,
            split=chosen.split,
            length=length,
            batch_size=max(1, TOKENS_AT_ONCE // length),
            samples=max(1, chosen.samples // 8),
            beyond=chosen.beyond,
            dtype=chosen.dtype,
            **_files(chosen, "perplexity"),
        ),
    )


def _recall(chosen: All, text: tuple[Path, ...]) -> Part:
    if chosen.squad is None:
        return Part("recall, SQuAD", "recall", text, "no --squad was given.")

    def make() -> Recall:
        return Recall(
            _names(text),
            tasks=("squad",),
            data=chosen.squad,
            samples=chosen.samples,
            skip_long=not chosen.beyond,
            **_common(chosen),
            json=chosen.output / "recall.json",
        )

    return Part("recall, SQuAD", "recall", text, make)


def _scorers(chosen: All, directory: Path, label: str) -> Part:
    from holdfast.configuration import HybridConfig

    title, name = f"who decides what is kept, {label}", f"scorers-{_file_name(label)}"
    if "learned_eviction" not in (HybridConfig.from_pretrained(directory).mixers or ()):
        return Part(title, name, (directory,), "the model has no layer of learned eviction.")
    if reads_text(directory) and chosen.data is None:
        return Part(title, name, (directory,), "no --data was given.")

    def make() -> Scorers:
        measured: dict[str, Any] = {"samples": max(1, chosen.samples // 2)}
        if reads_text(directory):
            blocks = max(1, chosen.samples // 8)
            length = _block_length(directory)
            measured = {"data": chosen.data, "split": chosen.split, "length": length, "samples": blocks}
        return Scorers((str(directory),), **measured, **_common(chosen), **_files(chosen, name))

    return Part(title, name, (directory,), make)


def _efficiency(chosen: All, directories: tuple[Path, ...], measured: Container[str]) -> Part:
    def make() -> Efficiency:
        accuracy = _accuracy(chosen, shown_names(directories).values(), measured)
        data = chosen.data if all(map(reads_text, directories)) else None  # else what others read differs in kind
        return Efficiency(
            _names(directories),
            data=data,
            split=None if data is None else chosen.split,
            contexts=chosen.contexts,
            batch_sizes=chosen.batch_sizes,
            steps=100,
            repeats=2,
            limit=chosen.limit,
            dtype=chosen.dtype,
            seed=chosen.seed,
            json=chosen.output / "efficiency.json",
            plot=chosen.output / "efficiency.png",
            accuracy=accuracy,
            pareto=None if accuracy is None else chosen.output / "pareto.png",
        )

    return Part("efficiency", "efficiency", directories, make)


def _accuracy(chosen: All, names: Collection[str], measured: Container[str]) -> Path | None:
    """Of the models with these names; a file that an earlier run left in the directory may be about others."""
    from holdfast.bench.accuracy import read_accuracies

    for name in ("needle-task", "needle-niah_single_1"):
        path = chosen.output / f"{name}.json"
        if name in measured and read_accuracies(path).keys() & set(names):
            return path
    return None


def _block_length(directory: Path) -> int:
    return min(trained_length(directory), LONGEST_BLOCK)


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "-", label)


def _names(directories: Sequence[Path]) -> tuple[str, ...]:
    return tuple(str(directory) for directory in directories)


def _files(chosen: All, name: str) -> dict[str, Any]:
    return {"json": chosen.output / f"{name}.json", "plot": chosen.output / f"{name}.png"}


def _common(chosen: All) -> dict[str, Any]:
    return {"beyond": chosen.beyond, "seed": chosen.seed, "dtype": chosen.dtype}
