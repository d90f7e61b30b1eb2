"""`holdfast evaluate all`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from holdfast.cli.common import error_console, output_console
from holdfast.cli.errors import UsageError, one_line, usage_errors
from holdfast.cli.evaluate.common import (
    Models,
    check_folder,
    model_directories,
    reads_text,
    refuse_lengths,
    require_positive,
    shown_names,
    told_apart,
)
from holdfast.cli.evaluate.needle import OwnTaskOptions, TextOptions
from holdfast.cli.evaluate.overview import overview_tables
from holdfast.cli.evaluate.parts import Evaluation, Part, plan_parts

if TYPE_CHECKING:
    from holdfast.evaluation.summary import PartResult, ShownTable

PartName = Literal["needle", "turns", "perplexity", "recall", "scorers", "efficiency"]
PARTS: tuple[PartName, ...] = ("needle", "turns", "perplexity", "recall", "scorers", "efficiency")
UNSHOWN = ("models", "json", "plot", "pareto", "accuracy", "progress", "size")
"""Options of the evaluations that no number follows from, but for the models, which have fingerprints."""
TEXTS = ("data", "haystack")
"""Options that name texts, whose contents count and not where they lie."""


@dataclass(frozen=True)
class All:
    """Every evaluation that fits the models (lm-eval has a command of its own), and one page: an overview with one
    number of each evaluation for each model, then every table and picture, machine, versions, seeds and commit. What
    does not fit is left out, and the page says why.

    Each evaluation leaves its numbers in the output directory. A run that was interrupted goes on there, and what was
    measured of the same models and texts with the same settings is not measured again. An evaluation that fails is
    left out too, and the others go on; once the page is written the exit status is then 1, and so it is where nothing
    was measured, or nothing of a part that --parts names."""

    models: Models
    """Directories of trained models, or models on the hub (OWNER/NAME[@REVISION])."""
    output: Path = Path("evaluation")
    """Directory of the page (index.html), of all numbers and of all pictures."""
    parts: tuple[PartName, ...] | None = None
    """What to evaluate; left out: all that fits the models."""
    data: str | None = None
    """Text for perplexity, for the scorers of models that read text, and where all do for efficiency: a file, a
    directory, or a hub data set. Blocks of the first two have the length that the models were trained on, for
    perplexity the shortest of them, at most 2,048 tokens."""
    split: str = "validation"
    """Split of the text; a single file is read whole."""
    squad: str | None = None
    """SQuAD's published JSON, or samples in parquet or jsonl, for recall."""
    haystack: tuple[str, ...] = ()
    """Texts for RULER's tasks with essays, and between the facts of several turns: files, directories (all their text
    files) or hub data sets."""
    length: int | None = None
    """Tokens of RULER's samples; left out: what the models that read text were trained on."""
    samples: int = 256
    """Of the needle task and of recall; a hundredth of them for each depth of RULER's needles, an eighth of them
    conversations and blocks of text."""
    turns: int = 8
    """Of a conversation at the most; fewer, with fewer facts if need be, where models were trained on short texts."""
    contexts: tuple[int, ...] = (1024, 4096)
    """Tokens read before speed and memory are measured."""
    batch_sizes: tuple[int, ...] = (1,)
    """Rows of which speed and memory are measured."""
    limit: float = 20.0
    """Seconds after which a measurement of speed is cut short."""
    beyond: bool = False
    """Allow lengths beyond the one that a model was trained on."""
    seed: int = 0
    """Of all samples and conversations, of the random scorer, and of the tokens that speed is measured with."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights, and of what is computed with them."""

    def __post_init__(self) -> None:
        require_positive(self, "length", "samples", "turns", "contexts", "batch_sizes")
        if not self.limit > 0:
            raise UsageError(f"--limit is {self.limit:g}; give more than 0 seconds.")

    def run(self) -> list[Table]:
        """Evaluate, and write the page; returns the tables of what was done and of one number each."""
        from holdfast.data.sources import is_missing
        from holdfast.data.text import is_prepared, load_text

        for option, source in (("data", self.data), ("squad", self.squad), *(("haystack", h) for h in self.haystack)):
            if source is not None and is_missing(source):
                raise UsageError(f"--{option} is {source}, which does not exist.")
        if self.data is not None and Path(self.data).exists() and not is_prepared(self.data):
            with usage_errors("--data"):
                load_text(self.data, split=self.split)  # before hours of other parts
        directories = model_directories(self.models, "all")
        self._refuse_length(directories)
        check_folder(self.output, "--output")
        with told_apart(directories):
            return self._measure(directories)

    def _measure(self, directories: Sequence[Path]) -> list[Table]:
        from holdfast.evaluation.summary import write_summary

        measuring = _Measuring(self.output)
        planned = plan_parts(self, directories, measuring.measured)
        chosen = [part for part in planned if part.kind in (self.parts or PARTS)]
        if not chosen:
            raise UsageError(f"None of --parts fits these models; there are {', '.join(PARTS)}.")
        results = []
        for number, part in enumerate(chosen, start=1):
            error_console().rule(f"{part.title} ({number} of {len(chosen)})", align="left")
            results.append(measuring.result(part))
        names = list(shown_names(directories).values())
        overview = overview_tables(results, self.output, names)
        title = f"Evaluation of {', '.join(names)}"
        page = write_summary(
            results, self.output / "index.html", title=title, machine=measuring.machine, overview=overview
        )
        table = Table(title="evaluations", title_justify="left")
        for column in ("evaluation", "measured in"):
            table.add_column(column)
        for result in results:
            seconds = f"{result.seconds:,.1f} s"
            table.add_row(result.title, seconds if result.skipped is None else f"not measured: {result.skipped}")
        tables = [table, *map(_as_shown, overview)]
        output_console().print(*tables)
        output_console().print(f"Open {page} in a browser.", soft_wrap=True)
        self._complain(chosen, results, measuring.failed)
        return tables

    def _refuse_length(self, directories: Sequence[Path]) -> None:
        """Refuse at once a length that no sample of RULER could have.

        Raises:
            UsageError: if no model reads text, or one was not told of so many tokens.
        """
        if self.length is None or "needle" not in (self.parts or PARTS):
            return
        text = [directory for directory in directories if reads_text(directory)]
        if not text:
            raise UsageError("--length is that of RULER's samples, and none of the models reads text; leave it out.")
        refuse_lengths(text, self.length, self.beyond)

    def _complain(self, chosen: Sequence[Part], results: Sequence[PartResult], failed: Sequence[str]) -> None:
        """Raise RuntimeError, for the exit status, where something was not measured that was asked for."""
        measured = {part.kind for part, result in zip(chosen, results, strict=True) if result.skipped is None}
        named = set(self.parts or ()) | ({"needle"} if self.length is not None else set())
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(chosen)} evaluations failed: {'; '.join(failed)}.")
        if missing := [name for name in PARTS if name in named & set(self.parts or PARTS) and name not in measured]:
            raise RuntimeError(f"nothing was measured of {', '.join(missing)}; the page says why.")
        if not measured:
            raise RuntimeError("nothing was measured; the page says why.")


class _Measuring:
    """Measures parts, or finds what was measured of them before.

    Attributes:
        measured: names of the parts whose files in the directory are what they found, now or before.
        failed: titles of the parts that began, or should have, and broke off.
    """

    def __init__(self, output: Path) -> None:
        from holdfast.machine import describe_machine

        self.output = output
        self.machine = describe_machine()
        self.measured: set[str] = set()
        self.failed: list[str] = []
        self._fingerprints: dict[Path | str, str] = {}

    def result(self, part: Part) -> PartResult:
        """Of an earlier run with the same models, texts and settings, or measured now; why not, if that fails."""
        if isinstance(part.make, str):
            return _skipped(part, part.make)
        try:
            result = self._kept_or_measured(part, part.make())
        except UsageError as error:  # does not fit these models
            return _skipped(part, one_line(error))
        except Exception as error:  # of whatever kind: hours of the other parts must not be lost by it
            self.failed.append(part.title)
            return _skipped(part, one_line(error))
        self.measured.add(part.name)
        return result

    def _kept_or_measured(self, part: Part, command: Evaluation) -> PartResult:
        from holdfast.evaluation.sample_log import SampleLog, file_hash
        from holdfast.evaluation.summary import PartResult, ShownTable

        settings = _settings(command)
        log = SampleLog(self.output / "parts.jsonl", self._determining(part, command, settings))
        kept = log.records.get(part.name, {})
        files_then = kept.get("files")  # none where an earlier version wrote the record
        if files_then and all(file_hash(self.output / name) == found for name, found in files_then.items()):
            error_console().print("Measured before; kept.")
            return PartResult.from_dict(kept)
        pictures, files = _pictures(command), _files(command)
        for path in files:  # of other models or settings
            path.unlink(missing_ok=True)
        started = time.perf_counter()
        tables = tuple(ShownTable.of(table) for table in command.run())
        result = PartResult(
            part.title,
            tables,
            pictures=tuple(path.name for path in pictures if path.is_file()),
            settings={name: _without_folders(value) for name, value in settings.items()},
            machine=self.machine,
            seconds=time.perf_counter() - started,
            files={path.name: found for path in files if (found := file_hash(path))},
        )
        log.append({part.name: result.to_dict()})
        return result

    def _determining(self, part: Part, command: Evaluation, settings: dict[str, Any]) -> dict[str, Any]:
        """What the numbers of a part follow from."""
        contents = {name: self._contents(value) for name, value in settings.items() if name in TEXTS}
        accuracy: Path | None = getattr(command, "accuracy", None)
        return {
            "settings": settings | contents,
            "drawn": [path.name for path in _pictures(command)],
            "accuracy": None if accuracy is None else accuracy.read_text(encoding="utf-8"),
            # Their names stand in tables and pictures.
            "models": [[name, self._fingerprint(each)] for each, name in shown_names(part.models).items()],
            "machine": [self.machine[name] for name in ("processor", "accelerator", "threads")],
        }

    def _contents(self, texts: str | tuple[str, ...]) -> list[str]:
        return [self._fingerprint(text) for text in ((texts,) if isinstance(texts, str) else texts)]

    def _fingerprint(self, source: Path | str) -> str:
        """Of a model or a text, which is read once for all parts."""
        from holdfast.evaluation.sample_log import model_fingerprint, text_fingerprint

        if source not in self._fingerprints:
            found = model_fingerprint(source) if isinstance(source, Path) else text_fingerprint(source)
            self._fingerprints[source] = found
        return self._fingerprints[source]


def _as_shown(shown: ShownTable) -> Table:
    """A table of the page for the terminal."""
    table = Table(title=shown.title, title_justify="left")
    for column, name in enumerate(shown.headings):
        table.add_column(name, justify="right" if column else "left", overflow="fold")
    for row in shown.rows:
        table.add_row(*map(str, row))
    table.caption, table.caption_justify = shown.note, "left"
    return table


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


def _pictures(command: Any) -> list[Path]:
    return [path for name in ("plot", "pareto") if (path := getattr(command, name, None)) is not None]


def _files(command: Any) -> list[Path]:
    """All that it writes, but for the logs of answers."""
    return [*_pictures(command), command.json]
