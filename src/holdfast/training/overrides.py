"""Recipes with changes from a command line, which may reach every setting, named in the recipe or not."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, get_type_hints

from holdfast.configuration import DEFAULT_MIXERS, DEFAULT_OPTIONS, HybridConfig
from holdfast.mixers import MIXERS, MixerOptions
from holdfast.training.recipe import NeedleData, Recipe, TextData

logger = logging.getLogger(__name__)


def override(recipe: Recipe, arguments: Sequence[str], parse: Callable[..., Any]) -> Recipe:
    """The recipe with the changes that `arguments` make, such as `--model.rms-norm-eps 1e-5`.

    A recipe holds the model's settings as a mapping of those that it names. Here they become a dataclass of all that
    `HybridConfig` and the mixers know, so that each has its type, its help text and its place in error messages; only
    what was changed goes back. Options of a mixer that the changes bring in start from the library's defaults, those
    of a mixer that they take out are dropped; so is the configuration of a data set that they replace, with a warning.

    Args:
        recipe: a whole recipe.
        arguments: of the command line.
        parse: `tyro.cli`, or a function that takes the same type, `args` and `default`.

    Raises:
        ValueError: if the changed recipe does not fit together.
        Whatever `parse` raises for arguments that are unknown or of the wrong type.
    """
    before = _typed(recipe, arguments)
    after = parse(type(before), args=list(arguments), default=before)
    changed = _changes(before.model, after.model)
    options = changed.pop("mixer_options", {})
    model = recipe.model | changed
    inherited = model.get("mixer_options", {})
    known = {name: inherited.get(name, DEFAULT_OPTIONS.get(name, {})) | options.get(name, {}) for name in options}
    kept = {name: values for name, values in (inherited | known).items() if name in after.model.mixers}
    sections = {field.name: getattr(after, field.name) for field in dataclasses.fields(Recipe)}
    sections["data"] = _without_old_config(recipe.data, after.data, arguments)
    result = Recipe(**(sections | {"model": model | {"mixer_options": kept}}))
    result.build_config()
    return result


def _without_old_config(before: NeedleData | TextData, after: Any, arguments: Sequence[str]) -> Any:
    """The data `after` the changes, without the configuration of another source unless the changes name it."""
    if not isinstance(before, TextData) or not isinstance(after, TextData):
        return after
    named = any(argument.split("=")[0] == "--data.config" for argument in arguments)
    if before.config is None or before.source == after.source or named:
        return after
    logger.warning(
        "data.config %r is of %s, so it is left out for %s (--data.config gives another).",
        *(before.config, before.source, after.source),
    )
    return dataclasses.replace(after, config=None)


def _typed(recipe: Recipe, arguments: Sequence[str]) -> Any:
    """The recipe with a dataclass for a model, which has the options of its mixers and of those that are named."""
    config = recipe.build_config()
    assert config.mixers is not None
    said = " ".join(arguments).replace("-", "_")
    names = [name for name in MIXERS if name in config.mixers or name in said]
    options = {name: _options(config, name) for name in names}
    mixers = _instance("MixerOptions", {name: (type(value), value) for name, value in options.items()})
    # Those of transformers' own settings that a recipe does not name are none of its business.
    own = SimpleNamespace(__annotations__=HybridConfig.__annotations__)
    hints = get_type_hints(own, globalns=vars(sys.modules[HybridConfig.__module__]))
    settings = {name: (hint, getattr(config, name)) for name, hint in hints.items() if name in _fields(HybridConfig)}
    settings |= {name: (type(value), value) for name, value in recipe.model.items() if name not in hints}
    del settings["controller"]  # a section of its own
    settings["mixers"] = (list[str], list(recipe.model.get("mixers", DEFAULT_MIXERS)))
    settings["mixer_options"] = (type(mixers), mixers)
    model = _instance("Model", settings)
    kind = dataclasses.make_dataclass("Recipe", [("model", type(model))], bases=(Recipe,), frozen=True)
    return kind(**{name: model if name == "model" else getattr(recipe, name) for name in _fields(Recipe)})


def _options(config: HybridConfig, name: str) -> MixerOptions:
    assert config.mixers is not None
    if name in config.mixers:
        return config.options_for(name)
    return MIXERS[name].Options.from_mapping(name, DEFAULT_OPTIONS.get(name, {}))


def _instance(name: str, fields: dict[str, tuple[Any, Any]]) -> Any:
    """An instance of a new dataclass with these fields: their types and values."""
    kind = dataclasses.make_dataclass(name, [(key, hint) for key, (hint, _) in fields.items()], frozen=True)
    return kind(**{key: value for key, (_, value) in fields.items()})


def _fields(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.init]


def _changes(before: Any, after: Any) -> dict[str, Any]:
    """The fields in which two instances of a dataclass differ, nested ones as nested mappings."""
    changed: dict[str, Any] = {}
    for name in _fields(before):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            nested = dataclasses.is_dataclass(old)
            changed[name] = _changes(old, new) if nested else list(new) if isinstance(new, tuple) else new
    return changed
