"""The directory of a run: whose it is, what lies in it, and what a resumed run may change."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import Timeout

from holdfast.configuration import AUTO_FILE
from holdfast.files import locked, write_json, write_text
from holdfast.settings import to_toml
from holdfast.training.checkpointing import checkpoints, step_of
from holdfast.training.recipe import Recipe, load_recipe
from holdfast.training.replaced import ASIDE, discard, give_back, set_aside

RECIPE_FILE, METRICS_FILE, SUMMARY_FILE = "recipe.toml", "metrics.jsonl", "summary.json"
DATA_FILE = "data.json"
_LOCK = ".lock"
# Checkpoints, and the files of a model too large for one.
_NUMBERED = re.compile(r"checkpoint-\d+|model-\d{5}-of-\d{5}\.safetensors")
# The lock, what lies aside, and what those leave who are killed while they write.
_PASSING = re.compile(r"\.lock$|\.replaced$|\.(recipe|data|summary|metrics|incomplete)-")
# Found alone, these say that a run was prepared and never trained a step.
_PREPARED = {RECIPE_FILE, DATA_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
_MODEL_FILES = {"config.json", "generation_config.json", "chat_template.jinja", AUTO_FILE}
_MODEL_FILES |= {"model.safetensors", "model.safetensors.index.json"}
_OWN_FILES = {*_PREPARED, *_MODEL_FILES, METRICS_FILE, SUMMARY_FILE}
# What a resumed run may do differently: how long it goes on, and what the weights do not depend on.
_FREE = (
    *("max_steps", "log_every", "save_every", "eval_every", "keep_checkpoints"),
    *("workers", "parallel", "compile", "report_to", "peak_flops", "gradient_checkpointing"),
)
_MAY_CHANGE = ("name", "description", "output.", *(f"training.{name}" for name in _FREE))


class RunDirectoryError(RuntimeError):
    """The run directory holds something that this run must not touch; the message says what to do."""


class DirectoryTakenError(RunDirectoryError):
    """It belongs to another run, or to one that was not asked to resume; another name or option is needed."""


def check(directory: Path, recipe: Recipe, resume: bool) -> None:
    """See to it that this run may have the directory; nothing is written.

    Raises:
        DirectoryTakenError: if it holds another run, a finished one, or one that was not asked to resume.
        RunDirectoryError: if nothing can be written there.
    """
    found = _entries(directory)
    is_run = RECIPE_FILE in found
    alternatives = "give the run another name (--name), or start over (--output.overwrite)"
    if found and not is_run and not recipe.output.overwrite:
        raise DirectoryTakenError(f"{directory} is not empty and holds no run: {alternatives}.")
    if is_run and (resume or not recipe.output.overwrite):
        if resume or found <= _PREPARED:
            _check_same(directory / RECIPE_FILE, recipe)
        if SUMMARY_FILE in found and not resume:
            raise DirectoryTakenError(f"{directory} holds a finished run: {alternatives}.")
        if SUMMARY_FILE in found and recipe.training.max_steps < (steps := steps_taken(directory)):
            raise DirectoryTakenError(
                f"{directory} holds a finished run: raise training.max_steps above {steps} to go on, {alternatives}."
            )
        if found - _PREPARED and not resume:
            raise DirectoryTakenError(f"{directory} holds an unfinished run: resume it (--resume), {alternatives}.")
    standing = next(path for path in [directory, *directory.absolute().parents] if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        reason = "is not a directory" if not standing.is_dir() else "may not be written"
        raise RunDirectoryError(f"Cannot write into {directory}: {standing} {reason}.")


def recover(directory: Path) -> None:
    """Give back what a process had set aside that was killed before its first step, unless one trains here now."""
    if (directory / ASIDE).exists():
        with contextlib.suppress(Timeout), locked(directory / _LOCK):
            give_back(directory, _is_own)


@contextlib.contextmanager
def claim(directory: Path, recipe: Recipe, resume: bool, step: int | None = None) -> Iterator[Callable[[], None]]:
    """Have the directory for this run while the block lasts: write its recipe.toml, set aside what is replaced by it.

    Args:
        directory: of the run.
        recipe: of the run.
        resume: whether it goes on.
        step: where from; later checkpoints are replaced by those that are to come.

    Yields:
        What to call when the run has begun, after its first step: what was replaced is removed then. Where the block
        ends with an exception before, all is as it was; where it ends well, what was replaced is gone.

    Raises:
        RunDirectoryError: as `check`, and if another process trains here.
    """
    with contextlib.ExitStack() as held:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(directory / _LOCK))
            give_back(directory, _is_own)
            check(directory, recipe, resume)  # with nobody else at work here: it may have become another's
            _replace(directory, recipe, everything=recipe.output.overwrite and not resume, step=step)
        except Timeout as error:
            raise RunDirectoryError(f"{directory} is being trained in by another process: wait, or stop it.") from error
        except OSError as error:
            raise RunDirectoryError(f"Cannot write into {directory}: {error.strerror or error}.") from error
        try:
            yield lambda: discard(directory)
        except BaseException:
            give_back(directory, _is_own)
            raise
        discard(directory)


def check_data(directory: Path, identities: Mapping[str, dict[str, int]]) -> None:
    """See to it that a run which goes on has the data that it was started with (`note_data`).

    Raises:
        RunDirectoryError: if it has others: it would go on at a place in them that means nothing, or its evaluations
            could not be compared with those before.
    """
    known = _known_data(directory)
    for name, identity in identities.items():
        before = known.get(name, identity)
        if before != identity:
            raise RunDirectoryError(
                f"{directory} was started with other {name} data ({before['blocks']:,} blocks, now "
                f"{identity['blocks']:,}; their checksums differ): resume it with that, or give the run another name "
                "(--name)."
            )


def check_origin(origin: Path, recipe: Recipe) -> None:
    """See to it that a run which goes on from a checkpoint of the run in `origin` has its settings.

    Raises:
        RunDirectoryError: if a setting differs that may not.
    """
    if (origin / RECIPE_FILE).exists():
        _check_same(origin / RECIPE_FILE, recipe)


def note_data(directory: Path, identities: Mapping[str, dict[str, int]], add: bool) -> None:
    """Note what data the run has, by "training" and "validation", as `holdfast.training.text_blocks.identify` says.

    `add` leaves what was noted before: a run may go on without evaluations, and later with them.
    """
    noted = {**(_known_data(directory) if add else {}), **identities}
    if noted or (directory / DATA_FILE).exists():
        write_json(directory / DATA_FILE, noted)


def _known_data(directory: Path) -> dict[str, dict[str, int]]:
    """What `note_data` has noted."""
    noted = directory / DATA_FILE
    known: dict[str, Any] = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    return {"training": known} if "blocks" in known else known  # as it was before evaluations were noted


def is_finished(directory: Path, max_steps: int) -> bool:
    """Whether the run in this directory has been finished, with so many steps."""
    return (directory / SUMMARY_FILE).exists() and steps_taken(directory) == max_steps


def holds(directory: Path, recipe: Recipe) -> bool:
    """Whether a finished run by this recipe lies here.

    Raises:
        RunDirectoryError: if the directory holds a run by another recipe, or a finished one of another length.
    """
    if not (directory / RECIPE_FILE).exists():
        return False
    _check_same(directory / RECIPE_FILE, recipe)
    wanted = recipe.training.max_steps
    if (directory / SUMMARY_FILE).exists() and not is_finished(directory, wanted):
        raise RunDirectoryError(f"{directory} holds a finished run of {steps_taken(directory)} steps, not {wanted}.")
    return is_finished(directory, wanted)


def steps_taken(directory: Path) -> int:
    """Steps of the finished run in this directory."""
    steps: int = json.loads((directory / SUMMARY_FILE).read_text(encoding="utf-8"))["steps"]
    return steps


def _check_same(recipe_file: Path, recipe: Recipe) -> None:
    before, now = (_everything(one) for one in (load_recipe(recipe_file), recipe))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(_MAY_CHANGE):
            raise RunDirectoryError(
                f"{recipe_file.parent} was started with {key} = {before.get(key)!r}, not {now.get(key)!r}: resume it "
                "with its own recipe, give the run another name (--name), or start over (--output.overwrite)."
            )


def _everything(recipe: Recipe) -> dict[str, Any]:
    """All settings by dotted name; those of the model with the defaults that the recipe leaves out."""
    sections = dataclasses.asdict(recipe) | {"model": recipe.build_config().to_dict()}
    return _flat(json.loads(json.dumps(sections)))


def _flat(table: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        is_table = isinstance(value, dict)
        flat |= _flat(value, f"{path}{key}.") if is_table else {f"{path}{key}": value}
    return flat


def _replace(directory: Path, recipe: Recipe, everything: bool, step: int | None) -> None:
    """Set aside what an earlier run wrote, `everything` or what a run that goes on changes; write the recipe."""
    there = [path for path in directory.iterdir() if _is_own(path.name)]
    everything = everything and (directory / RECIPE_FILE).exists()
    if everything:
        events = (directory / "runs").rglob("events.out.tfevents.*")  # where transformers lets TensorBoard write
        set_aside(directory, moved=there, copied=(), doomed=events)
    else:
        changed = [path for path in there if path.name in (RECIPE_FILE, DATA_FILE)]
        later = [path for path in checkpoints(directory) if step is not None and step_of(path) > step]
        finished = [path for path in there if path.name == SUMMARY_FILE]
        set_aside(directory, moved=[*finished, *later], copied=changed, doomed=())
    # It was asked for once, and not by those who will train by the recipe of this run.
    output = dataclasses.replace(recipe.output, overwrite=False)
    write_text(directory / RECIPE_FILE, to_toml(dataclasses.replace(recipe, output=output)))


def _is_own(name: str) -> bool:
    """Whether a run writes files or directories of this name."""
    return name in _OWN_FILES or _NUMBERED.fullmatch(name) is not None


def _entries(directory: Path) -> set[str]:
    """What lies in a run directory; a file of metrics in which nothing stands yet is none."""
    if not directory.is_dir():
        return set()
    return {
        entry.name
        for entry in directory.iterdir()
        if not _PASSING.match(entry.name) and not (entry.name == METRICS_FILE and entry.stat().st_size == 0)
    }
