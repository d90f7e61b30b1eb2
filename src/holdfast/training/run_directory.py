"""The directory of a run: whose it is, what lies in it, and what a resumed run may change."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from holdfast.configuration import AUTO_FILE
from holdfast.files import write_json, write_text
from holdfast.settings import to_toml
from holdfast.training.checkpointing import checkpoints
from holdfast.training.recipe import Recipe, load_recipe

RECIPE_FILE, METRICS_FILE, SUMMARY_FILE = "recipe.toml", "metrics.jsonl", "summary.json"
DATA_FILE = "data.json"
# Found alone, these say that a run was prepared and never trained a step.
_PREPARED = {RECIPE_FILE, DATA_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
_MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", AUTO_FILE}
_OWN_FILES = {*_PREPARED, *_MODEL_FILES, METRICS_FILE, SUMMARY_FILE}
# What a resumed run may do differently: how long it goes on, and what the weights do not depend on.
_FREE = (
    *("max_steps", "log_every", "save_every", "eval_every", "keep_checkpoints"),
    *("workers", "parallel", "compile", "report_to", "peak_flops"),
)
_MAY_CHANGE = ("output.", "description", "training.gradient_checkpointing", *(f"training.{name}" for name in _FREE))


class RunDirectoryError(RuntimeError):
    """The run directory holds something that this run must not touch; the message says what to do."""


def claim(directory: Path, recipe: Recipe, resume: bool) -> bool:
    """Make the directory this run's: write its recipe.toml, and clear away a run that is to be overwritten.

    Returns:
        Whether there was nothing in the directory before.

    Raises:
        RunDirectoryError: if the directory holds another run, a finished one, or one that was not asked to resume.
    """
    recipe_file = directory / RECIPE_FILE
    found = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    alternatives = "give the run another name (--name), or start over (--output.overwrite)"
    only_prepared = found <= _PREPARED and not recipe.output.overwrite
    if recipe_file.exists() and (resume or only_prepared):
        _check_same(recipe_file, recipe)
    if found and RECIPE_FILE not in found and not recipe.output.overwrite:
        raise RunDirectoryError(f"{directory} is not empty and holds no run: {alternatives}.")
    if found - _PREPARED:
        if SUMMARY_FILE in found and resume:
            _reopen(directory, recipe, alternatives)
        elif SUMMARY_FILE in found and not recipe.output.overwrite:
            raise RunDirectoryError(f"{directory} holds a finished run: {alternatives}.")
        if not (resume or recipe.output.overwrite):
            raise RunDirectoryError(f"{directory} holds an unfinished run: resume it (--resume), {alternatives}.")
        if not resume and RECIPE_FILE in found:
            _clear(directory)
    try:
        write_text(recipe_file, to_toml(recipe))
    except OSError as error:
        raise RunDirectoryError(f"Cannot write into {directory}: {error.strerror or error}.") from error
    return not found


def keep_to_data(directory: Path, identity: dict[str, int], begins: bool) -> None:
    """Note what data the run was started with, or see to it that a resumed run has the same.

    Args:
        directory: of the run.
        identity: of the data, as `identify` says.
        begins: whether the run is at its first step, and may have any.

    Raises:
        RunDirectoryError: if it has other data: it would go on at a place in them that means nothing.
    """
    noted = directory / DATA_FILE
    if begins or not noted.exists():
        write_json(noted, identity)
        return
    before = json.loads(noted.read_text(encoding="utf-8"))
    if before != identity:
        raise RunDirectoryError(
            f"{directory} was started with other data ({before['blocks']:,} blocks, now {identity['blocks']:,}; their "
            "checksums differ): resume it with that, or give the run another name (--name)."
        )


def is_finished(directory: Path, recipe: Recipe) -> bool:
    """Whether a run by this recipe has been finished here.

    Raises:
        RunDirectoryError: if the directory holds a run by another recipe, or a finished one of another length.
    """
    if not (directory / RECIPE_FILE).exists():
        return False
    _check_same(directory / RECIPE_FILE, recipe)
    if not (directory / SUMMARY_FILE).exists():
        return False
    if (steps := _steps_taken(directory)) != recipe.training.max_steps:
        raise RunDirectoryError(f"{directory} holds a finished run of {steps} steps, not {recipe.training.max_steps}.")
    return True


def release(directory: Path) -> None:
    """Leave a directory that was claimed in vain, unless something has been written there since."""
    if {entry.name for entry in directory.iterdir()} <= _PREPARED:
        shutil.rmtree(directory)


def _reopen(directory: Path, recipe: Recipe, alternatives: str) -> None:
    """Let a finished run go on, if it is to take more steps than it took."""
    steps = _steps_taken(directory)
    if recipe.training.max_steps <= steps:
        raise RunDirectoryError(
            f"{directory} holds a finished run: raise training.max_steps above {steps} to go on, {alternatives}."
        )
    (directory / SUMMARY_FILE).unlink()


def _steps_taken(directory: Path) -> int:
    steps: int = json.loads((directory / SUMMARY_FILE).read_text(encoding="utf-8"))["steps"]
    return steps


def _check_same(recipe_file: Path, recipe: Recipe) -> None:
    before, now = (_everything(one) for one in (load_recipe(recipe_file), recipe))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(_MAY_CHANGE):
            raise RunDirectoryError(
                f"{recipe_file.parent} was started with {key} = {before.get(key)!r}, not {now.get(key)!r}: resume it "
                "with its own recipe, or give the run another name."
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


def _clear(directory: Path) -> None:
    """Take out what an earlier run wrote; anything else stays."""
    for checkpoint in checkpoints(directory):
        shutil.rmtree(checkpoint)
    for name in _OWN_FILES:
        (directory / name).unlink(missing_ok=True)
