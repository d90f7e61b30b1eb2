"""What the evaluations share: checking models before anything is measured, logs of answers, files of results."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from holdfast.cli.common import error_console, model_directory, refuse_twice
from holdfast.cli.errors import UsageError, usage_errors
from holdfast.cli.hub import hub_name
from holdfast.files import UnreadableError, read_json, write_json

if TYPE_CHECKING:
    from holdfast.configuration import HybridConfig
    from holdfast.data.ruler import Essays
    from holdfast.evaluation.intervals import Share
    from holdfast.evaluation.ratios import Estimate
    from holdfast.evaluation.sample_log import SampleLog

Models = Annotated[
    tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL [MODEL ...]", help_behavior_hint="")
]
"""The models of an evaluation, as arguments; their help needs no default."""
ModelsIfAny = Annotated[
    tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL ...]", help_behavior_hint="")
]
"""The same where none need be given."""
MODELS_FIRST = "models come before the options, or after --, for options of several values take all that follows"
PICTURES = (".png", ".svg", ".pdf")
NOT_COVERED = "Intervals: other such samples or blocks, these models; they do not cover the seeds of training."
"""What is said below tables with intervals."""
PAGES = (".html", ".htm")
OUTPUTS = ("json", "plot", "pareto")
"""Options of the evaluations that name files to write."""


def model_directories(names: Sequence[str], command: str) -> list[Path]:
    """The directories of saved models.

    Raises:
        UsageError: if there is none, one holds no model, or two names are of the same directory.
    """
    if not names:
        raise UsageError(f"Give at least one model directory: `holdfast evaluate {command} MODEL_DIR`; {MODELS_FIRST}.")
    directories = [model_directory(name) for name in names]
    refuse_twice(names, directories)
    return directories


def shown_names(directories: Sequence[Path]) -> dict[Path, str]:
    """What tables, pictures and files of results call the models: OWNER/NAME on the hub, else the end of the path as it
    was given, links and all; as short as tells each from the others, and from those of `told_apart`.
    """
    names = {directory: _names(directory) for directory in (*directories, *_APART.get())}
    shown = {}
    for directory in directories:
        others = {name for other in names if other != directory for name in names[other]}
        shown[directory] = next((name for name in names[directory] if name not in others), names[directory][-1])
    return shown


@contextmanager
def told_apart(directories: Sequence[Path]) -> Iterator[None]:
    """Meanwhile `shown_names` calls each of these models the same, also where it is asked for some of them only."""
    token = _APART.set(tuple(directories))
    try:
        yield
    finally:
        _APART.reset(token)


_APART: ContextVar[tuple[Path, ...]] = ContextVar("_APART", default=())


def _names(directory: Path) -> list[str]:
    """What a model could be called, the shortest name first."""
    if (name := hub_name(directory)) is not None:
        return [name, f"{name}@{directory.name[:8]}"]
    if directory.name in ("", ".."):  # says nothing of the model
        directory = Path(os.path.abspath(directory))
    parts = directory.parts
    return [str(Path(*parts[-count:])) for count in range(1, len(parts) + 1)]


def read_text_models(directories: Iterable[Path], *, english: bool = True) -> dict[Path, Any]:
    """The tokenizer of each model, with `english` checked that it can write what is asked.

    Raises:
        UsageError: if one has none, or none that fits.
    """
    from holdfast.configuration import HybridConfig
    from holdfast.data.text import load_tokenizer
    from holdfast.evaluation.limits import check_tokenizer

    tokenizers = {}
    for directory in directories:
        if not reads_text(directory):
            raise UsageError(f"{directory} has no tokenizer.json, so it cannot read text.")
        with usage_errors():
            tokenizers[directory] = load_tokenizer(directory)
            if english:
                config = HybridConfig.from_pretrained(directory)
                check_tokenizer(tokenizers[directory], config, name=str(directory))
    return tokenizers


def refuse_unknown_tokens(texts: Iterable[Sequence[int]], tokenizer: Any, directory: Path) -> None:
    """Refuse texts, ids each, with a token that the model in `directory` does not know.

    Raises:
        UsageError: naming the token and the model.
    """
    from holdfast.configuration import HybridConfig
    from holdfast.evaluation.limits import check_texts

    with usage_errors():
        check_texts(texts, tokenizer, HybridConfig.from_pretrained(directory), name=str(directory))


def reads_text(directory: Path) -> bool:
    """Whether the model has a tokenizer; models of the needle task have none."""
    return (directory / "tokenizer.json").is_file()


def trained_length(directory: Path) -> int:
    """Tokens that the model in `directory` was trained on at a time."""
    from holdfast.configuration import HybridConfig

    return HybridConfig.from_pretrained(directory).max_position_embeddings


def refuse_lengths(directories: Iterable[Path], tokens: int, beyond: bool) -> None:
    """Refuse contexts of `tokens` tokens for models that were not told of so many, unless `beyond`.

    Raises:
        UsageError: naming the model.
    """
    from holdfast.configuration import HybridConfig
    from holdfast.evaluation.limits import check_length

    for directory in directories:
        with usage_errors():
            check_length(HybridConfig.from_pretrained(directory), tokens, beyond=beyond, name=str(directory))


def read_haystack(sources: Sequence[str]) -> Essays | None:
    """The texts of files, of all text files in directories, or of data sets on the hub (their split `train`), as
    `load_text` reads them; None without any.
    """
    from holdfast.data.ruler import Essays
    from holdfast.data.text import load_text

    if not sources:
        return None
    with usage_errors("--haystack"):
        found = [load_text(source, split=None if Path(source).expanduser().exists() else "train") for source in sources]
        return Essays([text for texts in found for text in texts if isinstance(text, str)])


def check_picture(path: Path | None, option: str = "--plot") -> None:
    """Refuse before anything is measured a picture that could not be drawn afterwards."""
    if path is not None and path.suffix.lower() not in PICTURES:
        raise UsageError(f"{option} is {path}; give a file that ends in {', '.join(PICTURES)}.")


def check_command(command: Any, evaluation: str) -> None:
    """Refuse before anything is measured what would fail after hours, or destroy what is no result of this evaluation:
    files that cannot be written, or hold something else, and a seed below 0.

    Raises:
        UsageError: naming the option.
    """
    for name in OUTPUTS:
        if (path := getattr(command, name, None)) is not None:
            check_file(path, f"--{name}")
    if (path := getattr(command, "json", None)) is not None:
        _results_in(path, evaluation)
    seed = getattr(command, "seed", None)
    if seed is not None and seed < 0:
        raise UsageError(f"--seed is {seed}; give 0 or more.")


def check_file(path: Path, option: str) -> None:
    """Refuse a path at which no file can be written; nothing is made.

    Raises:
        UsageError: naming the option.
    """
    if path.is_dir():
        raise UsageError(f"{option} is {path}, which is a directory; give a file.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UsageError(f"{option} is {path}, but {folder} is a file and no directory.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{option} is {path}, but nothing can be written in {folder}.")


def check_page(path: Path) -> None:
    """Refuse an --output at which no page can be written, or whose name is that of no page.

    Raises:
        UsageError: saying what to give.
    """
    check_file(path, "--output")
    if path.suffix.lower() not in PAGES:
        raise UsageError(f"--output is {path}, and a page is written; give a file that ends in {', '.join(PAGES)}.")


def check_folder(folder: Path, option: str) -> None:
    """Make a directory that results go to.

    Raises:
        UsageError: naming the option, if that cannot be, or no file can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{option} is {folder}, where nothing can be written ({error.strerror}).") from error


def require_positive(settings: Any, *names: str) -> None:
    """Refuse numbers below 1 among the options `names`; one that is None, or a tuple, is checked for what it holds.

    Raises:
        UsageError: naming the option.
    """
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {number}; give at least 1.")


def open_log(
    json: Path | None,
    evaluation: str,
    model: Path | HybridConfig,
    settings: Mapping[str, Any],
    what: str = "answers",
) -> SampleLog:
    """The log of answers, or of what else is kept, of a model, beside the file of results; without that file nothing is
    kept. A configuration stands for an untrained model.

    Answers of other versions, another commit or another device are not gone on from: results name one of each.
    """
    from holdfast.evaluation.sample_log import SampleLog, model_fingerprint
    from holdfast.machine import describe_machine

    path = None if json is None else log_beside(json)
    fingerprint = model_fingerprint(model) if isinstance(model, Path) else model.to_dict()
    machine = describe_machine()
    by = {name: machine[name] for name in ("commit", "packages", "accelerator")}
    log = SampleLog(path, {"evaluation": evaluation, "model": fingerprint, "by": by, **settings})
    if log.records:
        name = model if isinstance(model, Path) else "an untrained model"
        error_console().print(f"{name}: going on after {len(log.records):,} {what} in {path}.", soft_wrap=True)
    return log


def _results_in(path: Path, evaluation: str) -> dict[str, Any]:
    """The results that an earlier call has left in a file; empty where there is none.

    Raises:
        UsageError: if the file is not called .json, or holds something else than results of this evaluation.
    """
    if path.suffix.lower() != ".json":
        raise UsageError(f"--json is {path}; give a file that ends in .json.")
    if not path.exists() or not path.stat().st_size:
        return {}
    try:
        found = read_json(path)
    except UnreadableError:
        found = None
    before = found.get("evaluation") if isinstance(found, dict) else None
    if before == evaluation:
        return found
    what = f"results of `evaluate {before}`" if isinstance(before, str) else "something that no evaluation has written"
    raise UsageError(f"--json is {path}, which holds {what}; give another file, or remove that one.")


def log_beside(path: Path) -> Path:
    """The file of answers, or of what else is kept, beside a file of results."""
    return path.with_suffix(".samples.jsonl")


def write_results(path: Path, evaluation: str, settings: Mapping[str, Any], models: Mapping[str, Any]) -> None:
    """Write the results of each model, with the settings (the seed among them), machine, versions and commit; say so
    where other results are lost by it: of another model, of one of the same name, or with other settings.

    Raises:
        UsageError: if something else lies there by now.
    """
    from holdfast.machine import describe_machine

    record = {"settings": dict(settings), "machine": describe_machine(), "models": dict(models)}
    old, new = _results_in(path, evaluation), json.loads(json.dumps({"evaluation": evaluation, **record}))
    others = old.get("settings") != new["settings"]
    kept = {name: _answers(found) for name, found in new["models"].items()}
    lost = [name for name, found in old.get("models", {}).items() if others or kept.get(name) != _answers(found)]
    write_json(path, new)
    if lost:
        why = ", which were measured with other settings," if others else ""
        error_console().print(
            f"{path}: the results of {', '.join(lost)}{why} are replaced. What they follow from stays in "
            f"{log_beside(path)}, where a call like theirs with --json finds it.",
            soft_wrap=True,
        )


def _answers(results: Any) -> Any:
    """Results without how many of the answers came from a log, which is not the same in the call that goes on."""
    if isinstance(results, dict):
        return {name: _answers(value) for name, value in results.items() if name != "resumed"}
    return [_answers(value) for value in results] if isinstance(results, list) else results


def show_share(share: Share | None) -> str:
    """A share of right answers with its 95 % interval, as tables show it."""
    if share is None or share.interval is None:
        return "–"
    low, high = share.interval
    return f"{share.accuracy:.1%} ({low:.1%} to {high:.1%})"


def show_number(value: float | None, interval: tuple[float, float] | None, *, digits: int = 3) -> str:
    """A number with its 95 % interval, as tables show it; without where there is none."""
    if value is None:
        return "–"
    if interval is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"


def show_ratio(difference: Estimate | None) -> str:
    """By how many percent a perplexity is greater than another, with the 95 % interval, from the difference of losses;
    None: the two are not of the same tokens."""
    if difference is None:
        return "other tokens"
    value, *ends = (f"{100 * math.expm1(each):+.2f}%" for each in (difference.value, *(difference.interval or ())))
    return f"{value} ({' to '.join(ends)})" if ends else value


def show_points(difference: Estimate) -> str:
    """A difference of shares in percentage points, with its 95 % interval."""
    value, *ends = (f"{100 * each:+.1f}" for each in (difference.value, *(difference.interval or ())))
    return f"{value} ({' to '.join(ends)})" if ends else value
