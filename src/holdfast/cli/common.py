"""What the commands share: consoles, and reading models, recipes and tasks."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console

from holdfast.cli.errors import UsageError, usage_errors
from holdfast.cli.hub import fetch_model, is_hub_name

if TYPE_CHECKING:
    from holdfast.data.needle import NeedleTask
    from holdfast.data.text import TextSource
    from holdfast.training.recipe import Recipe

PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
"""Of consoles: names and messages come from users and files, where [b16] and :x: are no markup."""


@dataclass(frozen=True)
class TextOptions:
    """Which text a command reads."""

    source: tyro.conf.Positional[str]
    """A file (parquet, jsonl, json, txt), a directory of them, or the name of a data set on the hub."""
    _: dataclasses.KW_ONLY
    column: str = "text"
    """That holds the text."""
    config: str | None = None
    """Configuration of a data set on the hub."""

    def open(self, split: str) -> TextSource:
        """The text of a split.

        Raises:
            UsageError: if there is no such text.
        UnreadableError: if it is damaged.
        """
        from holdfast.data.text import load_text

        with usage_errors():
            return load_text(self.source, split=split, text_column=self.column, config=self.config)


def output_console() -> Console:
    """Standard output; into a file or a pipe wide enough for every table. Texts and cells are shown as they are."""
    return Console(width=None if sys.stdout.isatty() else 140, **PLAIN)


def error_console() -> Console:
    """Standard error, for remarks that are not the result."""
    return Console(stderr=True, **PLAIN)


def read_recipe(name: str) -> Recipe:
    """The recipe of this name or path.

    Raises:
        UsageError: if there is none, or it is wrong.
    """
    from holdfast.settings import SettingsError
    from holdfast.training.recipe import load_recipe

    try:
        return load_recipe(name)
    except (FileNotFoundError, IsADirectoryError, SettingsError) as error:
        raise UsageError(str(error)) from error


def model_directory(name: str, *, weights: bool = True) -> Path:
    """The directory with the saved model `name`: a path, or a model on the hub, OWNER/NAME[@REVISION].

    Args:
        name: of the model.
        weights: whether they are read; of a model on the hub they are else not downloaded.

    Raises:
        UsageError: if there is no model.
        ValueError: if its configuration is of no model that this library can read, or does not fit together.
        OSError: if it is no JSON.
    """
    from holdfast.configuration import HybridConfig

    directory = Path(name)
    if not directory.is_dir():
        if not is_hub_name(name):
            raise UsageError(f"There is no model directory {name}; give one that `holdfast train` or `convert` wrote.")
        directory = fetch_model(name, weights=weights)
    if not (directory / "config.json").is_file():
        raise UsageError(f"{name} holds no saved model (no config.json); has its training finished?")
    HybridConfig.from_pretrained(directory)  # here: a tokenizer that is read first fails of it, and is blamed
    return directory


def refuse_twice(names: Sequence[str | Path], places: Sequence[str | Path]) -> None:
    """Refuse to show one thing side by side with itself.

    Args:
        names: as they were given.
        places: where each lies, or what else tells it from others; a link is not followed, for it is another name.

    Raises:
        UsageError: naming the two names of one place.
    """
    first: dict[str, str | Path] = {}
    for name, place in zip(names, places, strict=True):
        key = os.path.abspath(place) if isinstance(place, Path) else place
        if key in first:
            again = "" if str(first[key]) == str(name) else f", as {name} too"
            raise UsageError(f"{first[key]} is given twice{again}; give it once.")
        first[key] = name


def read_model(directory: Path, dtype: str = "float32") -> Any:
    """The `HybridForCausalLM` saved in `directory`, in evaluation mode, on the accelerator where there is one."""
    import torch

    from holdfast.modeling import HybridForCausalLM

    quieten_transformers()
    model = HybridForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(accelerator or "cpu")


def quieten_transformers() -> None:
    """Show neither a bar for every file of weights nor advice that does not apply to these models."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def read_task(directory: Path, **changes: Any) -> NeedleTask:
    """The needle task that the model in `directory` was trained on, as its recipe.toml says.

    Args:
        directory: of the run.
        changes: settings that replace the recipe's; None leaves one as it is.

    Raises:
        UsageError: if there is no recipe, or it is one for text, or the settings do not fit together, or the task has
            token ids that the model has no embedding for.
    """
    from holdfast.configuration import HybridConfig
    from holdfast.training.recipe import NeedleData

    recipe = directory / "recipe.toml"
    if not recipe.is_file():
        raise UsageError(
            f"{directory} has no recipe.toml, which says what needle task the model was trained on: copy it there from "
            "the directory of its run."
        )
    data = read_recipe(str(recipe)).data
    if not isinstance(data, NeedleData):
        raise UsageError(f"{directory} was trained on text, as its recipe.toml says, so it knows no needle task.")
    try:
        task = dataclasses.replace(data.task, **{name: value for name, value in changes.items() if value is not None})
    except ValueError as error:
        raise UsageError(str(error)) from error
    known = HybridConfig.from_pretrained(directory).vocab_size
    if task.vocab_size > known:
        raise UsageError(
            f"The task in {recipe} has {task.vocab_size} token ids, and the model knows {known}; copy the recipe of "
            "the model's own run there."
        )
    return task
