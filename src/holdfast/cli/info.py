"""`holdfast info`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.table import Table

from holdfast.cli.common import model_directory, output_console, read_recipe, refuse_twice
from holdfast.cli.errors import UsageError
from holdfast.cli.hub import is_hub_name
from holdfast.cli.parsing import parse
from holdfast.files import write_json
from holdfast.units import format_bytes, format_count

if TYPE_CHECKING:
    from holdfast.configuration import HybridConfig
    from holdfast.info import ModelCost
    from holdfast.training.cost import TrainingCost

DESCRIPTION = """\
Show what models cost: parameters by part, operations per token, bytes of cache by context length, and for recipes what
training takes. Nothing is allocated, and of a model on the hub, OWNER/NAME[@REVISION], no weights are downloaded.

examples:
  holdfast info gdn-lte-1.4b
  holdfast info gdn-lte-1.4b gdn-swa-1.4b gdn-attn-1.4b
  holdfast info runs/needle-lalte --dtype float32 --json cost.json
  holdfast info Idiap/gated-deltanet-lte-0.4B-10B gdn-attn-1.4b
"""


@dataclass(frozen=True)
class Info:
    """Show what models cost."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Names or paths of recipes, or model directories or models on the hub (OWNER/NAME[@REVISION]), side by side."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """That the model computes in; the cache's keys and values have it."""
    batch_size: int = 1
    """Rows generated at once."""
    json: Path | None = None
    """Write all numbers to this file."""


def run(arguments: Sequence[str]) -> None:
    """Parse, compute, show."""
    settings = parse(Info, arguments or ["--help"], prog="holdfast info", description=DESCRIPTION)
    if settings.batch_size < 1:
        raise UsageError(f"--batch-size is {settings.batch_size}; give at least 1.")

    import torch

    from holdfast.info import describe_cost
    from holdfast.training.cost import describe_training

    dtype = getattr(torch, settings.dtype)
    directories = {name: _directory(name) for name in settings.models}
    refuse_twice(settings.models, [directories[name] or name for name in settings.models])
    costs = {
        name: describe_cost(_read_config(name, directory), dtype=dtype, batch_size=settings.batch_size)
        for name, directory in directories.items()
    }
    recipes = {name: read_recipe(name) for name, directory in directories.items() if directory is None}
    training = {name: describe_training(recipe) for name, recipe in recipes.items()}
    _show(costs)
    if training:
        _show_training(training)
    if settings.json is not None:
        numbers = {name: cost.to_dict() for name, cost in costs.items()}
        write_json(settings.json, numbers | {n: numbers[n] | {"training": c.to_dict()} for n, c in training.items()})


def _directory(name: str) -> Path | None:
    """The directory of a model, be it on the hub; None where `name` is a recipe's.

    Raises:
        UsageError: if there is no such directory, nor a model on the hub.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.suffix == ".toml" or path.is_file() or path.name == name:
        return None
    if is_hub_name(name):
        return model_directory(name, weights=False)
    raise UsageError(
        f"There is no directory {name}; give that of a model, or a recipe by its name or the path of its .toml file."
    )


def _read_config(name: str, directory: Path | None) -> HybridConfig:
    from holdfast.configuration import HybridConfig

    if directory is None:
        return read_recipe(name).build_config()
    if (directory / "config.json").is_file():
        return HybridConfig.from_pretrained(directory)
    if (directory / "recipe.toml").is_file():  # a run that has not finished
        return read_recipe(str(directory / "recipe.toml")).build_config()
    raise UsageError(f"{name} holds neither a config.json nor a recipe.toml; give a recipe or a model directory.")


def _show(costs: dict[str, ModelCost]) -> None:
    console = output_console()
    named = {part for cost in costs.values() for part in cost.parameters}
    fixed = ("retention scorer", "MLP", "norms", "output head")
    parts = ["embeddings", *sorted(named - {"embeddings", *fixed}), *(part for part in fixed if part in named)]
    table = _table("parameters", "part", costs)
    for part in parts:
        is_share = part == "retention scorer"
        cells = (_cell(cost.parameters.get(part), cost.total_parameters * is_share) for cost in costs.values())
        table.add_row(part, *cells)
    table.add_section()
    table.add_row("total", *(f"{cost.total_parameters:,}" for cost in costs.values()))
    console.print(table)

    table = _table("operations per token (forward, multiply-adds × 2)", "context", costs)
    first = next(iter(costs.values()))
    for context in first.flops:
        table.add_row(f"{context:,}", *(format_count(cost.flops[context]) for cost in costs.values()))
    if any(cost.scorer_flops for cost in costs.values()):
        table.add_section()
        scorers = (format_count(cost.scorer_flops) if cost.scorer_flops else "–" for cost in costs.values())
        table.add_row("retention scorer alone", *scorers)
    console.print(table)

    rows = "1 row" if first.batch_size == 1 else f"{first.batch_size} rows"
    table = _table(f"cache ({rows}, {first.dtype})", "context", costs)
    for context in first.cache_bytes:
        table.add_row(f"{context:,}", *(format_bytes(cost.cache_bytes[context]) for cost in costs.values()))
    console.print(table)


def _show_training(costs: dict[str, TrainingCost]) -> None:
    table = _table("training (memory of one device, without sharding)", "", costs)
    rows = {
        "tokens a step": [f"{cost.tokens_per_step:,}" for cost in costs.values()],
        "tokens": [format_count(cost.tokens) for cost in costs.values()],
        "operations": [format_count(cost.flops) for cost in costs.values()],
        "weights, gradients, AdamW": [format_bytes(cost.state_bytes) for cost in costs.values()],
        "activations (estimate)": [format_bytes(cost.activation_bytes) for cost in costs.values()],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    output_console().print(table)


def _table(title: str, first_heading: str, costs: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", min_width=40)
    table.add_column(first_heading, justify="left", no_wrap=True)
    for name in costs:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _cell(count: int | None, of: int = 0) -> str:
    """The count, and its share where it is one `of` a total."""
    if count is None:
        return "–"
    return f"{count:,} ({count / of:.1%})" if of else f"{count:,}"
