"""Typed settings from plain mappings (a TOML file) and back, with errors that name the file and the key."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class SettingsError(ValueError):
    """A setting that is unknown, missing, of the wrong type or out of range; the message says where."""


def from_mapping(cls: type[T], values: Mapping[str, Any], source: str, path: str = "") -> T:
    """Build a (nested) dataclass from a mapping, checking every key and value.

    Args:
        cls: a dataclass whose fields are dataclasses, unions, Literals, tuples, lists, dicts, str, int, float or bool.
        values: the mapping, e.g. from `tomllib`.
        source: what to call the file in errors.
        path: dotted path of `values` inside the file.

    Raises:
        SettingsError: naming `source` and the key.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise SettingsError(f"{source}: unknown key {_join(path, key)!r}{suggest(key, fields)}.")
    hints = get_type_hints(cls)
    arguments = {key: _convert(hints[key], value, source, _join(path, key)) for key, value in values.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise SettingsError(f"{source}: key {_join(path, name)!r} is missing.")
    try:
        return cls(**arguments)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"{source}: {f'[{path}] ' if path else ''}{error}") from error


def to_toml(settings: Any) -> str:
    """A (nested) dataclass as TOML text that `from_mapping` reads back equal.

    TOML has no null, so None is left out: a field that may be None must default to None.
    """
    lines: list[str] = []
    _write_table(dataclasses.asdict(settings), "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


OTHER_NAMES = {
    "dataloader_num_workers": "workers",
    "eval_steps": "eval_every",
    "gradient_accumulation_steps": "accumulation",
    "logging_steps": "log_every",
    "max_grad_norm": "clip",
    "per_device_train_batch_size": "batch_size",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "torch_compile": "compile",
}
"""What TrainingArguments of transformers calls what has another name here."""


def suggest(key: str, known: Any) -> str:
    """` (did you mean 'x'?)`, or a list of all, to end an error about an unknown name."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1)
    if OTHER_NAMES.get(key) in known:
        close = [OTHER_NAMES[key]]
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def _convert(hint: Any, value: Any, source: str, path: str) -> Any:
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_mapping(hint, _expect(Mapping, value, source, path, "a table"), source, path)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise SettingsError(f"{source}: {path} must be one of {', '.join(map(repr, arguments))}, got {value!r}.")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, source, path)
    if origin in (tuple, list):
        return _convert_sequence(origin, arguments, value, source, path)
    if origin is dict:
        table = _expect(Mapping, value, source, path, "a table")
        return {key: _convert(arguments[1], item, source, _join(path, key)) for key, item in table.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and hint is not bool:
        raise SettingsError(f"{source}: {path} must be {_names[hint]}, got {str(value).lower()}.")
    return _expect(hint, value, source, path, _names[hint])


_names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def _convert_union(choices: tuple[Any, ...], value: Any, source: str, path: str) -> Any:
    if value is None and types.NoneType in choices:
        return None
    tables = [choice for choice in choices if dataclasses.is_dataclass(choice)]
    if tables:
        kinds = {get_args(get_type_hints(choice)["kind"])[0]: choice for choice in tables}
        kind = _expect(Mapping, value, source, path, "a table").get("kind")
        if kind not in kinds:
            options = ", ".join(map(repr, kinds))
            raise SettingsError(f"{source}: {_join(path, 'kind')} must be one of {options}, got {kind!r}.")
        return _convert(kinds[kind], value, source, path)
    scalars = [choice for choice in choices if choice is not types.NoneType]
    if type(value) in scalars:  # an int stays an int where int | float is allowed
        return value
    return _convert(scalars[-1], value, source, path)


def _convert_sequence(origin: type, item_hints: tuple[Any, ...], value: Any, source: str, path: str) -> Any:
    items = _expect((list, tuple), value, source, path, "a list")
    if origin is tuple and item_hints[-1:] != (Ellipsis,):
        if len(items) != len(item_hints):
            raise SettingsError(f"{source}: {path} must have {len(item_hints)} entries, got {len(items)}.")
        hints = list(item_hints)
    else:
        hints = [item_hints[0]] * len(items)
    return origin(
        _convert(hint, item, source, f"{path}[{n}]") for n, (hint, item) in enumerate(zip(hints, items, strict=True))
    )


def _expect(kind: Any, value: Any, source: str, path: str, name: str) -> Any:
    if not isinstance(value, kind):
        raise SettingsError(f"{source}: {path} must be {name}, got {value!r}.")
    return value


def _write_table(table: Mapping[str, Any], path: str, lines: list[str]) -> None:
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping) and value is not None}
    if path and (plain or not table):
        lines += ["", f"[{path}]"]
    lines += [f"{key} = {_format(value)}" for key, value in plain.items()]
    for key, value in table.items():
        if isinstance(value, Mapping):
            _write_table(value, _join(path, key), lines)


def _format(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_format, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    # JSON's strings, integers and booleans are TOML's too, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
