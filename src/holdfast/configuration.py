"""One configuration for every model: which mixer each layer has, and the mixers' settings."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from holdfast.files import replacing
from holdfast.mixers import MIXERS, MixerOptions
from holdfast.published import PUBLISHED_TYPES, from_published
from holdfast.settings import from_mapping

DEFAULT_MIXERS = ["gated_deltanet", "learned_eviction"]
DEFAULT_OPTIONS: dict[str, dict[str, Any]] = {
    "gated_deltanet": {"num_heads": 8, "head_dim": 128},
    "full_attention": {"num_heads": 16},
    "sliding_attention": {"num_heads": 16, "window": 1024},
    "learned_eviction": {"num_heads": 16, "window": 768, "budget": 512, "sinks": 4},
    "native_sparse_attention": {
        "num_heads": 32,
        "num_kv_heads": 2,
        "head_dim": 64,
        "block_size": 64,
        "num_blocks": 16,
        "window": 512,
    },
}
"""The published 0.4B sizes; used for mixers whose options a configuration does not give."""

AUTO_FILE = "holdfast_auto.py"
AUTO_CODE = '''"""For transformers' Auto classes with trust_remote_code=True; the code is in the package holdfast."""

from holdfast import HybridConfig, HybridForCausalLM, HybridModel

__all__ = ["HybridConfig", "HybridForCausalLM", "HybridModel"]
'''
"""Saved beside every configuration, so that programs that do not import holdfast can load the model where it is
installed."""


@strict
class HybridConfig(PreTrainedConfig):
    """Configuration of `HybridForCausalLM`. The defaults are the published laLTE model of 0.4B parameters.

    Args:
        vocab_size, hidden_size, num_hidden_layers: as usual.
        mixers: the token mixer of each layer, first to last; a shorter list is a pattern that repeats. Names are
            the keys of `holdfast.mixers.MIXERS`.
        mixer_options: settings of each mixer used, by name (see the mixer's `Options`). `head_dim` defaults to
            hidden_size // num_heads.
        intermediate_size: width of the MLP; None = 256·ceil(int(hidden_size · 4 · 2/3) / 256).
        rms_norm_eps: ε of every RMSNorm.
        initializer_range: standard deviation of the linear maps and embeddings.
        scale_residual_init: scale the output maps of each block down by √(2 · num_hidden_layers).
        max_position_embeddings: the length the model was trained at (a note; nothing limits it).
        controller: settings of the budget controller in training (`holdfast.training.ControllerConfig`).

    Raises:
        ValueError: naming the setting that is misspelt, out of range or of the wrong type. Names that are not close to
            one of these go to transformers, which keeps them as they are.
    """

    model_type = "holdfast"
    keys_to_ignore_at_inference = ["past_key_values", "retention", "selection", "lm_loss", "retention_loss"]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    mixers: list[str] | None = None
    mixer_options: dict | None = None
    intermediate_size: int | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    scale_residual_init: bool = True
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    controller: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_misspelt(kwargs)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
            if isinstance(size := getattr(self, name), int) and size < 1:  # other types are refused by `strict`
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.mixers = self._expand(self.mixers or DEFAULT_MIXERS)
        given = self.mixer_options or {}
        if unused := sorted(set(given) - set(self.mixers)):
            raise ValueError(
                f"mixer_options names {', '.join(unused)}, which no layer uses; mixers: {set(self.mixers)}"
            )
        self.mixer_options = {
            name: self._resolve(name, given.get(name, DEFAULT_OPTIONS.get(name, {})))
            for name in dict.fromkeys(self.mixers)
        }
        self.controller = _checked_controller(self.controller or {})
        if self.intermediate_size is None:
            self.intermediate_size = 256 * -(-int(self.hidden_size * 4 * 2 / 3) // 256)
        super().__post_init__(**kwargs)

    def options_for(self, name: str) -> MixerOptions:
        """The checked settings of the mixer `name`."""
        assert self.mixer_options is not None
        return MIXERS[name].Options.from_mapping(name, self.mixer_options[name])

    def _expand(self, mixers: list[str]) -> list[str]:
        if not isinstance(mixers, list | tuple) or not all(isinstance(name, str) for name in mixers):
            raise ValueError(f"mixers must be a list of names, such as {DEFAULT_MIXERS}; got {mixers!r}")
        if unknown := sorted(set(mixers) - set(MIXERS)):
            raise ValueError(f"no mixer is named {', '.join(unknown)}; there are {', '.join(MIXERS)}")
        if self.num_hidden_layers % len(mixers):
            raise ValueError(f"mixers has {len(mixers)} entries, which do not divide {self.num_hidden_layers} layers")
        return list(mixers) * (self.num_hidden_layers // len(mixers))

    def _resolve(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """All settings of a mixer, the defaults included, as plain JSON values."""
        options = MIXERS[name].Options.from_mapping(name, values)
        if getattr(options, "head_dim", 0) is None:
            heads: int = options.num_heads  # type: ignore[attr-defined]
            if self.hidden_size % heads:
                raise ValueError(
                    f"mixer '{name}': {heads} heads do not divide hidden_size {self.hidden_size}; set head_dim"
                )
            options = MIXERS[name].Options.from_mapping(name, {**values, "head_dim": self.hidden_size // heads})
        resolved = dataclasses.asdict(options)  # type: ignore[call-overload]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in resolved.items()}

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write `config.json`, and beside it the few lines by which the Auto classes find this package.

        `save_pretrained` calls this after it has noted what lies in the directory, so that both files are uploaded.
        """
        module = AUTO_FILE.removesuffix(".py")
        written = copy.copy(self)
        written.auto_map = {
            "AutoConfig": f"{module}.HybridConfig",
            "AutoModel": f"{module}.HybridModel",
            "AutoModelForCausalLM": f"{module}.HybridForCausalLM",
        }
        with replacing(Path(json_file_path).parent / AUTO_FILE) as temporary:
            temporary.write_text(AUTO_CODE, encoding="utf-8")
        super(HybridConfig, written).to_json_file(json_file_path, use_diff)

    @classmethod
    def register_for_auto_class(cls, *_: Any, **__: Any) -> None:
        """Nothing: source files need not be copied beside a checkpoint (see `save_pretrained`)."""

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a `config.json`; a published one is translated.

        Raises:
            ValueError: it is that of another library's model, or holds no settings.
        """
        values, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls._translated(values, str(pretrained_model_name_or_path)), rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration from a dictionary in this or the published format.

        Args:
            config_dict: what a `config.json` holds.
            kwargs: settings that replace those of the dictionary. `mixer_options` and `controller` are laid over what
                is there, option by option; `num_hidden_layers` repeats the pattern of the mixers anew.

        Raises:
            ValueError: as the constructor; whatever is replaced is checked with all the rest. Or the dictionary is of
                another library's model.
        """
        _refuse_misspelt(kwargs)
        changes = {name: kwargs.pop(name) for name in HybridConfig.__annotations__ if name in kwargs}
        return super().from_dict(_overlay(cls._translated(config_dict), changes), **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        """Read the file of a configuration in this or the published format.

        Raises:
            ValueError: as `from_dict`, or the file holds no settings.
        """
        return cls.from_dict(cls._translated(cls._dict_from_json_file(json_file), str(json_file)))

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """What a file holds; transformers, which reads every file with this, takes for granted that it is an object."""
        values = super()._dict_from_json_file(json_file)
        if not isinstance(values, dict):
            raise ValueError(
                f"{json_file} must hold an object with the settings of a model, got {reprlib.repr(values)}; copy the "
                "model's own there."
            )
        return values

    @classmethod
    def _translated(cls, values: dict[str, Any], name: str = "the configuration") -> dict[str, Any]:
        """Arguments of this class; of a composite configuration, the section for it."""
        kind = values.get("model_type")
        if kind in PUBLISHED_TYPES:
            return from_published(values)
        if not kind or kind in (cls.model_type, HybridConfig.model_type):
            return values
        for section in values.values():
            if isinstance(section, Mapping) and section.get("model_type") == cls.model_type:
                return dict(section)
        raise ValueError(
            f"the model_type of {name} is {kind!r}, which this library cannot read; it reads its own, "
            f"{HybridConfig.model_type}, and those of the published checkpoints: {', '.join(PUBLISHED_TYPES)}."
        )


def _overlay(saved: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a saved configuration with changes."""
    merged = saved | changes
    if "num_hidden_layers" in changes and "mixers" not in changes and saved.get("mixers"):
        merged["mixers"] = _pattern(saved["mixers"])
    for name in ("controller", "mixer_options"):
        if isinstance(changes.get(name), Mapping):
            merged[name] = dict(saved.get(name) or {}) | changes[name]
    options = merged.get("mixer_options")
    if not isinstance(options, Mapping):
        return merged
    before, given = saved.get("mixer_options") or {}, changes.get("mixer_options") or {}
    used = {*(merged.get("mixers") or DEFAULT_MIXERS), *given}  # a saved mixer that no layer uses any more is dropped
    merged["mixer_options"] = {
        name: before[name] | values if name in before and isinstance(values, Mapping) else values
        for name, values in options.items()
        if name in used
    }
    return merged


def _pattern(mixers: list[str]) -> list[str]:
    """The shortest beginning of a list that gives the list when it is repeated."""
    periods = (n for n in range(1, len(mixers) + 1) if len(mixers) % n == 0)
    return next(mixers[:n] for n in periods if mixers[:n] * (len(mixers) // n) == mixers)


def _refuse_misspelt(names: Iterable[str]) -> None:
    """Raise for a name that is nearly one of this configuration's own; others are transformers' business."""
    for name in names:
        close = difflib.get_close_matches(name, HybridConfig.__annotations__, n=1, cutoff=0.84)
        if close and name not in HybridConfig.__annotations__:
            raise ValueError(f"there is no setting {name!r} (did you mean {close[0]!r}?)")


def _checked_controller(values: Mapping[str, Any]) -> dict[str, Any]:
    from holdfast.training.controller import ControllerConfig  # here: training builds on models, and so on this file

    if not isinstance(values, Mapping):
        raise ValueError(f"controller must be a mapping of settings, got {values!r}")
    from_mapping(ControllerConfig, values, "the model's configuration", "controller")
    return dict(values)


AutoConfig.register("holdfast", HybridConfig)
