"""`holdfast evaluate all`."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import tyro
from rich.table import Table

from holdfast.cli.common import error_console, output_console
from holdfast.cli.errors import UsageError
from holdfast.cli.evaluate.common import model_directories, reads_text, require_positive, shown_names
from holdfast.cli.evaluate.efficiency import Efficiency
from holdfast.cli.evaluate.needle import Needle, OwnTaskOptions, TextOptions
from holdfast.cli.evaluate.perplexity import Perplexity
from holdfast.cli.evaluate.recall import Recall
from holdfast.cli.evaluate.scorers import Scorers
from holdfast.cli.evaluate.turns import Turns

if TYPE_CHECKING:
    from holdfast.evaluation.summary import PartResult

PartName = Literal["needle", "turns", "perplexity", "recall", "scorers", "efficiency"]
PARTS: tuple[PartName, ...] = ("needle", "turns", "perplexity", "recall", "scorers", "efficiency")
UNSHOWN = ("models", "model", "json", "plot", "pareto", "accuracy", "progress", "size")
"""Options of the evaluations that no number follows from, but for the models, which have fingerprints."""


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


@dataclass(frozen=True)
class All:
    """Every evaluation that fits the models, and one page with every table and picture, machine, versions, seeds and
    commit. What does not fit is left out, and the page says why.

    Each evaluation leaves its numbers in the output directory. A run that was interrupted goes on there, and what was
    measured of the same models with the same settings is not measured again."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Directories of trained models."""
    output: Path = Path("evaluation")
    """Directory of the page (index.html), of all numbers and of all pictures."""
    parts: tuple[PartName, ...] = PARTS
    """What to evaluate."""
    data: str | None = None
    """Text for perplexity, and for the scorers of models that read text: a file, a directory, or a hub data set."""
    split: str = "validation"
    """Split of the text; a single file is read whole."""
    squad: str | None = None
    """SQuAD's published JSON, or samples in parquet or jsonl, for recall."""
    haystack: tuple[str, ...] = ()
    """Texts for RULER's tasks with essays: files, directories or hub data sets."""
    length: int | None = None
    """Tokens of RULER's samples; left out: what the models that read text were trained on."""
    samples: int = 256
    """Of the needle task and of recall; a hundredth of them for each depth of RULER's needles, an eighth of them
    conversations and blocks of text."""
    contexts: tuple[int, ...] = (1024, 4096)
    """Tokens read before speed and memory are measured."""
    batch_sizes: tuple[int, ...] = (1,)
    """Rows of which speed and memory are measured."""
    limit: float = 20.0
    """Seconds after which a measurement of speed is cut short."""
    beyond: bool = False
    """Allow lengths beyond the one that a model was trained on."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        require_positive(self, "length", "samples", "contexts", "batch_sizes")
        if not self.limit > 0:
            raise UsageError(f"--limit is {self.limit:g}; give more than 0 seconds.")

    def run(self) -> list[Table]:
        """Evaluate, and write the page; returns the table of what was done."""
        from holdfast.data.sources import is_missing
        from holdfast.evaluation.summary import write_summary
        from holdfast.machine import describe_machine

        for option, source in (("data", self.data), ("squad", self.squad), *(("haystack", h) for h in self.haystack)):
            if source is not None and is_missing(source):
                raise UsageError(f"--{option} is {source}, which does not exist.")
        directories = model_directories(self.models, "all")
        planned = [part for part in _plan(self, directories) if part.name.partition("-")[0] in self.parts]
        if not planned:
            raise UsageError(f"None of --parts fits these models; there are {', '.join(PARTS)}.")
        results = []
        for number, part in enumerate(planned, start=1):
            error_console().rule(f"{part.title} ({number} of {len(planned)})", align="left")
            results.append(self._result(part))
        title = "Evaluation of " + ", ".join(shown_names(directories).values())
        page = write_summary(results, self.output / "index.html", title=title, machine=describe_machine())
        table = Table(title="evaluations", title_justify="left")
        for column in ("evaluation", "measured in"):
            table.add_column(column)
        for result in results:
            seconds = f"{result.seconds:,.1f} s"
            table.add_row(result.title, seconds if result.skipped is None else f"not measured: {result.skipped}")
        output_console().print(table)
        output_console().print(f"Open {page} in a browser.", soft_wrap=True)
        return [table]

    def _result(self, part: Part) -> PartResult:
        """Of an earlier run with the same models and settings, or measured now."""
        from holdfast.evaluation.sample_log import SampleLog, model_fingerprint
        from holdfast.evaluation.summary import PartResult, ShownTable
        from holdfast.machine import describe_machine

        if isinstance(part.make, str):
            return _skipped(part, part.make)
        machine = describe_machine()
        try:
            command = part.make()
            settings = _settings(command)
            determining = {
                "settings": settings,
                "drawn": [path.name for path in _pictures(command)],
                "accuracy": _content(getattr(command, "accuracy", None)),
                "models": [model_fingerprint(directory) for directory in part.models],
                "machine": [machine[name] for name in ("processor", "accelerator", "threads")],
            }
            log = SampleLog(self.output / "parts.jsonl", determining)
            kept = log.records.get(part.name)
            if kept and all((self.output / picture).is_file() for picture in kept["pictures"]):
                error_console().print("Measured before; kept.")
                return PartResult.from_dict(kept)
            started = time.perf_counter()
            tables = tuple(ShownTable.of(table) for table in command.run())
        except (ValueError, FileNotFoundError) as error:  # what does not fit or is missing says so in a sentence
            return _skipped(part, str(error))
        drawn = tuple(path.name for path in _pictures(command) if path.is_file())
        seconds = time.perf_counter() - started
        shown = {name: _without_folders(value) for name, value in settings.items()}
        result = PartResult(part.title, tables, drawn, shown, machine, seconds)
        log.append({part.name: result.to_dict()})
        return result


def _skipped(part: Part, reason: str) -> PartResult:
    from holdfast.evaluation.summary import PartResult

    error_console().print(f"Not measured: {reason}", soft_wrap=True)
    return PartResult(part.title, skipped=reason)


def _settings(command: Any) -> dict[str, Any]:
    """What the numbers follow from beside the models, plain; files that are written do not belong to it."""
    values: dict[str, Any] = {}
    for option in dataclasses.fields(command):
        value = getattr(command, option.name)
        if isinstance(value, TextOptions | OwnTaskOptions):
            chosen = value != type(value)()  # those for models of the other kind are as they were
            values |= dataclasses.asdict(value) if chosen else {}
        else:
            values[option.name] = value
    return {name: value for name, value in values.items() if name not in UNSHOWN and value not in (None, ())}


def _without_folders(value: Any) -> Any:
    """Names of files in place of paths, which say nothing elsewhere."""
    if isinstance(value, tuple):
        return [_without_folders(entry) for entry in value]
    return Path(value).name if isinstance(value, str) else value


def _content(file: Path | None) -> str | None:
    return None if file is None else file.read_text(encoding="utf-8")


def _pictures(command: Any) -> list[Path]:
    return [path for name in ("plot", "pareto") if (path := getattr(command, name, None)) is not None]


def _plan(chosen: All, directories: Sequence[Path]) -> Iterator[Part]:
    """Everything that could be evaluated, in the order of the page."""
    text = tuple(directory for directory in directories if reads_text(directory))
    tokens = tuple(directory for directory in directories if directory not in text)
    yield from _needles(chosen, text, tokens)
    yield from _conversations(chosen, text, tokens)
    labels = shown_names(directories)
    for directory in text:
        yield _perplexity(chosen, directory, labels[directory])
    if text:
        yield _recall(chosen, text)
    for directory in directories:
        yield _scorers(chosen, directory, labels[directory])
    yield _efficiency(chosen, tuple(directories), tokens)


def _needles(chosen: All, text: tuple[Path, ...], tokens: tuple[Path, ...]) -> Iterator[Part]:
    from holdfast.configuration import HybridConfig
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
    length = chosen.length or min(HybridConfig.from_pretrained(each).max_position_embeddings for each in text)
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
                many = max(1, chosen.samples // 8)
                haystack = chosen.haystack if group == text else ()
                return Turns(
                    _names(group), conversations=many, haystack=haystack, **_common(chosen), **_files(chosen, name)
                )

            yield Part(f"several turns, {kind}", name, group, make)


def _perplexity(chosen: All, directory: Path, label: str) -> Part:
    title, name = f"perplexity, {label}", f"perplexity-{_file_name(label)}"
    if chosen.data is None:
        return Part(title, name, (directory,), "no --data was given.")
    data = chosen.data
    return Part(
        title,
        name,
        (directory,),
        lambda: Perplexity(
            str(directory),
            data=data,
            split=chosen.split,
            max_blocks=max(1, chosen.samples // 8),
            dtype=chosen.dtype,
            json=chosen.output / f"{name}.json",
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
            limit=chosen.samples,
            beyond=chosen.beyond,
            dtype=chosen.dtype,
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
    return Part(
        title,
        name,
        (directory,),
        lambda: Scorers(
            (str(directory),),
            samples=max(1, chosen.samples // 2),
            data=chosen.data if reads_text(directory) else None,
            split=chosen.split,
            max_blocks=max(1, chosen.samples // 8),
            seed=chosen.seed,
            **_files(chosen, name),
        ),
    )


def _efficiency(chosen: All, directories: tuple[Path, ...], tokens: tuple[Path, ...]) -> Part:
    from holdfast.bench.accuracy import read_accuracies

    def make() -> Efficiency:
        needles = chosen.output / ("needle-task.json" if tokens else "needle-niah_single_1.json")
        found = needles.is_file() and read_accuracies(needles)
        return Efficiency(
            _names(directories),
            contexts=chosen.contexts,
            batch_sizes=chosen.batch_sizes,
            steps=100,
            repeats=2,
            limit=chosen.limit,
            dtype=chosen.dtype,
            seed=chosen.seed,
            json=chosen.output / "efficiency.json",
            plot=chosen.output / "efficiency.png",
            accuracy=needles if found else None,
            pareto=chosen.output / "pareto.png" if found else None,
        )

    return Part("efficiency", "efficiency", directories, make)


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "-", label)


def _names(directories: Sequence[Path]) -> tuple[str, ...]:
    return tuple(str(directory) for directory in directories)


def _files(chosen: All, name: str) -> dict[str, Any]:
    return {"json": chosen.output / f"{name}.json", "plot": chosen.output / f"{name}.png"}


def _common(chosen: All) -> dict[str, Any]:
    return {"beyond": chosen.beyond, "seed": chosen.seed, "dtype": chosen.dtype}
