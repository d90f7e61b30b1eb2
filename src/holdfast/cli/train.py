"""`holdfast train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.cli.common import output_console, read_recipe
from holdfast.cli.errors import UsageError, usage_errors
from holdfast.cli.parsing import parse

if TYPE_CHECKING:
    from holdfast.training.recipe import Recipe

USAGE = """\
usage: holdfast train RECIPE [--resume] [OVERRIDES]
       holdfast train --list

Train a model from scratch by a recipe. The run is written to runs/NAME: the
recipe as used, metrics.jsonl, checkpoints, and at the end the model. RECIPE is
the name of a recipe that comes with holdfast, or the path of a TOML file.

options:
  --list      Show the recipes that come with holdfast.
  --resume    Continue the run from its last checkpoint; from scratch if it has
              none. RECIPE may be the directory of a run then, wherever it lies
              now.
  OVERRIDES   Any setting of the recipe; `holdfast train RECIPE --help` shows
              them with their values.

examples:
  holdfast train needle-lalte
  holdfast train needle-lalte --name trial --training.max-steps 200 --training.seed 3
  holdfast train runs/trial --resume
"""


def run(arguments: Sequence[str]) -> None:
    """Train by the recipe named first, with the overrides after it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
    elif "--list" in arguments:
        _list_recipes()
    else:
        _train(list(arguments))


def _list_recipes() -> None:
    from rich.table import Table

    from holdfast.training.recipe import list_recipes, load_recipe

    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it trains")
    for name in list_recipes():
        table.add_row(name, load_recipe(name).description)
    output_console().print(table)


def chosen_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """The recipe of a name or path with the command line's overrides.

    Raises:
        UsageError: if there is no such recipe, or an override does not fit.
    """
    from holdfast.training.overrides import override

    recipe = read_recipe(name)
    if not overrides:
        return recipe
    description = "Settings of the recipe that can be overridden, and --resume to continue a run."

    def read(kind: Any, args: Sequence[str], default: Any) -> Any:
        return parse(kind, args, prog=f"holdfast train {name}", description=description, default=default)

    try:
        return override(recipe, overrides, read)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def _train(arguments: list[str]) -> None:
    resume = "--resume" in arguments
    arguments = [argument for argument in arguments if argument != "--resume"]
    if not arguments or arguments[0].startswith("-"):
        raise UsageError("Give the recipe first: `holdfast train RECIPE [OVERRIDES]`; `--list` shows the recipes.")
    name, *overrides = arguments
    from holdfast.training.recipe import list_recipes

    if name not in list_recipes():
        if resume:
            name, overrides = _where_it_lies(name, overrides)
        if Path(name).is_dir():
            raise UsageError(_of_directory(Path(name)))
    recipe = chosen_recipe(name, overrides)

    from holdfast.training.run import train
    from holdfast.training.run_directory import DirectoryTakenError
    from holdfast.training.stopping import TrainingStopped

    try:
        with usage_errors():
            directory = train(recipe, resume=resume)
    except DirectoryTakenError as error:
        raise UsageError(str(error)) from error
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(_how_to_continue(recipe)) from stop
    except TrainingStopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"holdfast: {_how_to_continue(recipe)}", file=sys.stderr)
        raise
    if os.environ.get("RANK", "0") == "0":  # once, however many processes have trained it
        output_console().print(f"The model is in {directory}.", soft_wrap=True)


def _of_directory(path: Path) -> str:
    """What to say where a directory is named in place of a recipe."""
    from holdfast.training.run_directory import RECIPE_FILE

    run = next((folder for folder in (path, path.parent) if (folder / RECIPE_FILE).is_file()), None)
    if run is None:
        return f"{path} is a directory without a {RECIPE_FILE}: give a recipe, or the directory of a run to --resume."
    return f"{path} is no recipe: `holdfast train {run} --resume` continues the run from its last checkpoint."


def _where_it_lies(name: str, overrides: list[str]) -> tuple[str, list[str]]:
    """Recipe and overrides for the run to resume; one named by its directory may have been moved since it began."""
    from holdfast.training.run_directory import METRICS_FILE, RECIPE_FILE

    path = Path(name) / RECIPE_FILE if Path(name).is_dir() else Path(name)
    directory = path.resolve().parent
    is_of_run = path.name == RECIPE_FILE and path.is_file()
    is_of_run = is_of_run and (Path(name).is_dir() or (directory / METRICS_FILE).exists())
    chosen = {"--name", "--output.directory"} & {override.partition("=")[0] for override in overrides}
    if is_of_run and not chosen:
        overrides = ["--output.directory", os.path.relpath(directory.parent), "--name", directory.name, *overrides]
    return str(path) if is_of_run else name, overrides


def _how_to_continue(recipe: Recipe) -> str:
    """What to say of a run that was interrupted."""
    from holdfast.training.checkpointing import checkpoints, last_checkpoint, saved_step
    from holdfast.training.run_directory import RECIPE_FILE

    directory = Path(recipe.output.directory) / recipe.name
    checkpoint = last_checkpoint(directory) if checkpoints(directory) else None
    if checkpoint is None:
        return "interrupted before the first checkpoint (training.save_every says when that is written)"
    step = saved_step(checkpoint)
    return f"interrupted; `holdfast train {directory / RECIPE_FILE} --resume` continues after step {step}"
