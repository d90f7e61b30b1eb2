"""How often a model finds RULER's needles, by task, length of the haystack and depth of the needle."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.data.progress import track
from holdfast.data.ruler import RULER_TASKS, Essays, RulerSample, RulerSampler
from holdfast.evaluation.arguments import check_kind, check_log, check_model, check_tokenizer_kind
from holdfast.evaluation.conversation import Conversation
from holdfast.evaluation.inference import evaluating
from holdfast.evaluation.intervals import Share
from holdfast.evaluation.limits import check_length, check_texts, check_tokenizer
from holdfast.evaluation.sample_log import SampleLog
from holdfast.pictures import picture
from holdfast.settings import suggest

__all__ = ["RulerCell", "RulerResult", "RulerSettings", "evaluate_ruler", "found_answers", "plot_ruler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulerSettings:
    """What is asked.

    Attributes:
        tasks: names in `RULER_TASKS`.
        lengths: tokens of a sample, the answer included.
        depths: where the needle lies, in percent of the haystack; of several answers the first.
        samples: for each task, length and depth.
        new_tokens: tokens of an answer at the most.
        seed: of the samples.
        essays: haystack of the tasks that have essays.

    Raises:
        ValueError: a task is unknown, a number is out of range, something is given twice, or essays are missing.
    """

    tasks: tuple[str, ...] = ("niah_single_1",)
    lengths: tuple[int, ...] = (4096,)
    depths: tuple[float, ...] = tuple(range(0, 101, 10))
    samples: int = 10
    new_tokens: int = 128
    seed: int = 0
    essays: Essays | None = None

    def __post_init__(self) -> None:
        if unknown := [task for task in self.tasks if task not in RULER_TASKS]:
            raise ValueError(f"there is no task {unknown[0]!r}{suggest(unknown[0], RULER_TASKS)}.")
        if not (self.tasks and self.lengths and self.depths):
            raise ValueError("give at least one task, one length and one depth.")
        for name in ("tasks", "lengths", "depths"):
            values = getattr(self, name)
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"{name} have {twice[0]} twice, and its samples would count twice; give it once.")
        if min(self.samples, self.new_tokens, *self.lengths) < 1:
            raise ValueError("samples, new_tokens and lengths must be at least 1.")
        if not all(0 <= depth <= 100 for depth in self.depths):
            raise ValueError(f"depths are {self.depths}; give 0 to 100 percent.")
        if (needs := [task for task in self.tasks if RULER_TASKS[task].haystack == "essays"]) and self.essays is None:
            raise ValueError(f"{needs[0]} hides needles in essays; give text files as the haystack (--haystack PATH).")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; a hash and a length stand for the essays."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        essays = None if self.essays is None else {"words": self.essays.words, "sha256": self.essays.sha256}
        return {**plain, "essays": essays}


@dataclasses.dataclass(frozen=True)
class RulerCell:
    """Samples of one task at one length.

    Attributes:
        match_all: mean share of the values asked for that the answer holds: RULER's `string_match_all`, its score
            for these tasks.
        match_part: samples whose answer holds at least one of them: RULER's `string_match_part`.
        by_depth: needles found, by the depth of the settings at which they were placed: of several answers of a sample
            the first only, since the others lie at random depths. So every depth has as many needles as samples.
        tokens: mean length of the prompts.
    """

    task: str
    length: int
    match_all: Share
    match_part: Share
    by_depth: Mapping[float, Share]
    tokens: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "task": self.task,
            "length": self.length,
            "prompt_tokens": self.tokens,
            "match_all": self.match_all.to_dict(),
            "match_part": self.match_part.to_dict(),
            "by_depth": [{"depth": depth, **share.to_dict()} for depth, share in self.by_depth.items()],
        }


@dataclasses.dataclass(frozen=True)
class RulerResult:
    """Result of `evaluate_ruler`: a cell for each task and length, in the order of the settings.

    Attributes:
        resumed: answers that came from the log.
    """

    cells: tuple[RulerCell, ...]
    resumed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"cells": [cell.to_dict() for cell in self.cells], "resumed": self.resumed}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Which sample."""

    task: str
    length: int
    depth: float
    index: int

    def __str__(self) -> str:
        return f"{self.task}/{self.length}/{self.depth:g}/{self.index}"


def evaluate_ruler(
    model: Any,
    tokenizer: Any,
    settings: RulerSettings,
    *,
    log: SampleLog | None = None,
    batch_size: int = 4,
    beyond: bool = False,
    progress: bool = True,
) -> RulerResult:
    """Ask a model for needles, greedily and in batches with left padding.

    Samples depend on the settings and the tokenizer, not on `batch_size` nor on what is asked beside them. The model is
    read in eval mode without gradients, and put back in the mode that it came in.

    Args:
        model: a `HybridForCausalLM`.
        tokenizer: its tokenizer.
        settings: what to ask.
        log: where answers are kept and, after an interruption, found again; None keeps none.
        batch_size: prompts read side by side; of one task and length, so that few pads are needed.
        beyond: allow lengths beyond the model's `max_position_embeddings`.
        progress: show a progress bar when standard error is a terminal.

    Raises:
        TypeError: an argument is no model, no tokenizer, no settings or no log.
        ValueError: if the tokenizer or a length does not fit the model, or needles and question do not fit in a length.
    """
    check_model(model, hybrid=True)
    check_tokenizer_kind(tokenizer)
    check_kind("settings", settings, RulerSettings, "RulerSettings(…)")
    check_log(log)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1.")
    check_tokenizer(tokenizer, model.config)
    check_length(model.config, max(settings.lengths), beyond=beyond)
    log = SampleLog(None, {}) if log is None else log
    combinations = itertools.product(settings.tasks, settings.lengths, settings.depths, range(settings.samples))
    places = [_Place(*combination) for combination in combinations]
    batches = list(_batches([place for place in places if str(place) not in log.records], batch_size))
    asked = dict.fromkeys((place.task, place.length) for batch in batches for place in batch)
    samplers = _samplers(settings, tokenizer, asked)
    waiting = (samplers[at.task, at.length].sample(at.depth, at.index).ids for batch in batches for at in batch)
    check_texts(waiting, tokenizer, model.config)
    with evaluating(model):
        for batch in track(batches, "needle", progress=progress):
            task, length = batch[0].task, batch[0].length
            samples = [samplers[task, length].sample(place.depth, place.index) for place in batch]
            log.append(_answered(model, tokenizer, batch, samples, settings.new_tokens))
    cells = [
        _cell(task, length, [(at.depth, log.records[str(at)]) for at in places if _is(at, task, length)])
        for task, length in itertools.product(settings.tasks, settings.lengths)
    ]
    return RulerResult(tuple(cells), len(places) - sum(map(len, batches)))


def prompts(settings: RulerSettings, tokenizer: Any) -> Iterator[tuple[int, ...]]:
    """Token ids of all that `evaluate_ruler` asks, one by one.

    Raises:
        ValueError: at once, if needles and question do not fit in a length.
    """
    samplers = _samplers(settings, tokenizer, itertools.product(settings.tasks, settings.lengths))
    places = itertools.product(samplers.values(), settings.depths, range(settings.samples))
    return (sampler.sample(depth, index).ids for sampler, depth, index in places)


def found_answers(given: str, answers: Sequence[str]) -> list[bool]:
    """Which answers stand in what the model gave, letter case aside, after RULER's clean-up of control characters."""
    cleaned = re.sub(r"[\x00-\x1f]", "\n", given.strip()).strip().lower()
    return [answer.lower() in cleaned for answer in answers]


def plot_ruler(results: Mapping[str, RulerResult], path: str | Path) -> Path:
    """Draw a heat map of accuracy by depth and length for each model (a row) and task (a column).

    Args:
        results: results by the name of the model.
        path: file to write; its ending gives the format (png, svg, pdf). Replaced only when the picture is complete.

    Raises:
        ValueError: `results` is empty.
    """
    if not results:
        raise ValueError("results is empty; give at least one result to plot.")
    tasks = list(dict.fromkeys(cell.task for result in results.values() for cell in result.cells))
    widest = max(len(result.cells) // len(tasks) for result in results.values())
    deepest = max(len(cell.by_depth) for result in results.values() for cell in result.cells)
    width, height = max(2.2, 0.6 * widest + 0.8), max(2.8, 0.17 * deepest + 0.8)  # of a map whose labels have room
    with picture(path, (1.5 + len(tasks) * width, 0.6 + len(results) * height)) as figure:
        grid = figure.subplots(len(results), len(tasks), squeeze=False)
        for row, (name, result) in zip(grid, results.items(), strict=True):
            for axes, task in zip(row, tasks, strict=True):
                image = _heat_map(axes, [cell for cell in result.cells if cell.task == task])
                axes.set_title(task, fontsize="medium")
            row[0].set_ylabel(f"{name}\ndepth (%)")
        figure.colorbar(image, ax=grid, label="share of needles found", shrink=0.8)
    return Path(path)


def _samplers(
    settings: RulerSettings, tokenizer: Any, asked: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], RulerSampler]:
    """A sampler for each task and length: made before anything is asked, to refuse then what does not fit."""
    return {
        (task, length): RulerSampler(
            RULER_TASKS[task],
            tokenizer,
            length,
            essays=settings.essays,
            new_tokens=settings.new_tokens,
            seed=settings.seed,
        )
        for task, length in asked
    }


def _is(place: _Place, task: str, length: int) -> bool:
    return (place.task, place.length) == (task, length)


def _batches(places: Iterable[_Place], size: int) -> Iterator[list[_Place]]:
    for _, group in itertools.groupby(places, key=lambda place: (place.task, place.length)):
        while batch := list(itertools.islice(group, size)):
            yield batch


def _answered(
    model: Any, tokenizer: Any, places: Sequence[_Place], samples: Sequence[RulerSample], new_tokens: int
) -> dict[str, dict[str, Any]]:
    """Records of a batch, by sample."""
    conversation = Conversation(model)
    conversation.read([sample.ids for sample in samples])
    stop = {tokenizer.eos_token_id} - {None}
    given = [tokenizer.decode(ids, skip_special_tokens=True) for ids in conversation.answer(new_tokens, stop)]
    return {
        str(place): {
            "tokens": len(sample.ids),
            "answers": list(sample.answers),
            "depths": list(sample.depths),
            "given": text,
            "found": found_answers(text, sample.answers),
        }
        for place, sample, text in zip(places, samples, given, strict=True)
    }


def _cell(task: str, length: int, answered: Sequence[tuple[float, Mapping[str, Any]]]) -> RulerCell:
    """What was found, from the depth asked for and the record of every sample."""
    records = [record for _, record in answered]
    found = [float(np.mean(record["found"])) for record in records]
    by_depth: dict[float, list[bool]] = {depth: [] for depth in sorted({depth for depth, _ in answered})}
    for depth, record in answered:
        by_depth[depth].append(record["found"][0])
    return RulerCell(
        task,
        length,
        match_all=Share(len(records), sum(found)),
        match_part=Share(len(records), sum(share > 0 for share in found)),
        by_depth={depth: Share(len(hits), sum(hits)) for depth, hits in by_depth.items()},
        tokens=float(np.mean([record["tokens"] for record in records])),
    )


def _heat_map(axes: Any, cells: Sequence[RulerCell]) -> Any:
    """Depths downwards, lengths to the right; a cell without samples stays grey. Returns the image."""
    depths = list(cells[0].by_depth)
    shares = np.array([[cell.by_depth[depth].accuracy for cell in cells] for depth in depths], dtype=float)
    axes.set_facecolor("0.8")
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            colour = "white" if share < 0.6 else "black"
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize="x-small", color=colour)
    axes.set_xticks(range(len(cells)), [f"{cell.length:,}" for cell in cells], fontsize="small")
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize="small")
    axes.set_xlabel("tokens")
    return image
