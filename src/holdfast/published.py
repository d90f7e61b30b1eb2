"""Configurations of the published checkpoints, read and written (specification §3, §4)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.configuration import HybridConfig

PUBLISHED_TYPES = ("hybrid_gated_deltanet", "gated_deltanet", "transformer", "nsa")
"""`model_type` of the published configurations; parameters and buffers bear the same names as ours."""

PURE_TYPES = ("transformer", "nsa")
"""Of these, models of attention alone."""

SHARED_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "intermediate_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
    "use_cache": "use_cache",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
ATTENTION_KEYS = ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "qkv_bias")
EVICTION_KEYS = {
    "window_size": "window",
    "buffer_size": "budget",
    "sink_size": "sinks",
    "conv_size": "conv_size",
    "conv_dilation": "conv_dilation",
    "dropout_prob": "dropout",
    "routing_shared": "scorer_sharing",
}
CONTROLLER_KEYS = {
    "l1_lambda_shared": "sharing",
    "l1_lambda_init": "initial",
    "l1_lambda_min": "minimum",
    "l1_lambda_max": "maximum",
    "l1_alpha": "increase",
    "l1_alpha_neg": "decrease",
    "l1_lambda_initial_steps": "initial_steps",
    "l1_lambda_update_steps": "interval",
    "l1_lambda_tolerate": "tolerance",
}
NSA_KEYS = {"window_size": "window", "block_size": "block_size", "block_counts": "num_blocks"}
SPEED_KEYS = ("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy")
"""Of published configurations: how fast a model computes, and not what."""
CHECKED_KEYS = {
    "hidden_act": ("swish", "silu"),
    "hidden_ratio": (4,),
    "use_gate": (True,),
    "use_short_conv": (True,),
    "qk_norm": (False,),
    "routing_method": ("sigmoid",),
    "routing_grad": (True,),
}
"""Of published configurations, with the values that this library computes, the usual one first."""
LINEAR_KEYS = ("num_heads", "head_dim", "num_v_heads", "conv_size", "allow_neg_eigval")


def from_published(published: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `HybridConfig` for a published `config.json`.

    Settings that change speed only (`SPEED_KEYS`) are left out, and so is what `unread_settings` names.

    Raises:
        ValueError: naming the setting that is missing, or that this library does not compute.
    """
    model_type = published.get("model_type")
    if model_type not in PUBLISHED_TYPES:
        raise ValueError(f"model_type {model_type!r} is not a published format; known: {', '.join(PUBLISHED_TYPES)}")
    _need(published, "the published configuration", ("hidden_size", "num_hidden_layers"))
    _refuse(published, "hidden_act")
    _refuse(published, "hidden_ratio")
    arguments = {ours: published[theirs] for theirs, ours in SHARED_KEYS.items() if theirs in published}
    controller: dict[str, Any]
    if model_type in PURE_TYPES:
        name, options, controller = _attention(published, published["hidden_size"], model_type == "nsa")
        return arguments | {"mixers": [name], "mixer_options": {name: options}, "controller": controller}
    _refuse(published, "use_gate")
    _refuse(published, "use_short_conv")
    mixers = ["gated_deltanet"] * published["num_hidden_layers"]
    linear = {key: published[key] for key in LINEAR_KEYS if published.get(key) is not None}
    linear["expand_v"] = float(published.get("expand_v", 2))
    every = {"gated_deltanet": linear}
    controller = {}
    if attention := published.get("attn"):
        name, every_attention, controller = _attention(attention, published["hidden_size"], False)
        _need(attention, "the section 'attn'", ("layers",))
        for layer in attention["layers"]:
            if not 0 <= layer < len(mixers):
                raise ValueError(f"the section 'attn' names layer {layer}, but there are {len(mixers)} layers")
            mixers[layer] = name
        every[name] = every_attention
    return arguments | {"mixers": mixers, "mixer_options": every, "controller": controller}


def _attention(
    section: Mapping[str, Any], hidden_size: int, sparse: bool
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name, options and controller settings of the softmax mixer that a published section describes."""
    _refuse(section, "qk_norm")
    options = {key: section[key] for key in ATTENTION_KEYS if section.get(key) is not None}
    _need(options, "the attention section", ("num_heads",))
    options.setdefault("head_dim", hidden_size // options["num_heads"])
    kind = section.get("attn_type", "nsa" if sparse else None)
    if kind == "lte":
        _refuse(section, "routing_method")
        _refuse(section, "routing_grad")
        if section.get("routing_shared") == "all":
            raise ValueError("routing_shared = 'all': it is not known where such a checkpoint keeps its one scorer")
        options |= {ours: section[theirs] for theirs, ours in EVICTION_KEYS.items() if theirs in section}
        controller = {ours: section[theirs] for theirs, ours in CONTROLLER_KEYS.items() if theirs in section}
        return "learned_eviction", options, controller
    if kind == "nsa":
        options |= {ours: section[theirs] for theirs, ours in NSA_KEYS.items() if section.get(theirs) is not None}
        return "native_sparse_attention", options, {}
    if kind is not None:
        raise ValueError(f"attn_type {kind!r} is not known; known: lte, nsa, or none")
    if section.get("window_size") is None:
        return "full_attention", options, {}
    return "sliding_attention", options | {"window": section["window_size"]}, {}


def to_published(config: HybridConfig) -> dict[str, Any]:
    """The published `config.json` of a model, without what `unwritten_settings` names.

    Raises:
        ValueError: where the published format cannot say what the configuration says.
    """
    assert config.mixers is not None
    assert config.mixer_options is not None
    kinds = sorted(set(config.mixers) - {"gated_deltanet"})
    if len(kinds) > 1:
        raise ValueError(f"the published format holds one kind of attention per model, this one has {', '.join(kinds)}")
    published: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in SHARED_KEYS.items()}
    published |= {"hidden_act": "swish", "hidden_ratio": 4}
    if "gated_deltanet" not in config.mixers:
        return published | _published_attention(config, kinds[0], {"full_attention", "sliding_attention"})
    linear = dict(config.mixer_options["gated_deltanet"])
    published |= {"attn_mode": "chunk", "use_gate": True, "use_short_conv": True, "model_type": "gated_deltanet"}
    published |= {key: value for key, value in linear.items() if value is not None}
    published["attn"] = None
    if kinds:
        section = _published_attention(config, kinds[0], set(config.mixers))
        layers = [index for index, name in enumerate(config.mixers) if name == kinds[0]]
        published["attn"] = {"layers": layers} | {key: value for key, value in section.items() if key != "model_type"}
        if "attn_type" in section:
            published["model_type"] = "hybrid_gated_deltanet"
    return published


def unread_settings(published: Mapping[str, Any]) -> list[str]:
    """Settings of a published `config.json` that `from_published` leaves out, as `name = value`.

    Those that change speed only are not among them, nor what is null, 0 or false, nor the notes of transformers.
    """
    from transformers import PreTrainedConfig

    known = {*SHARED_KEYS, *LINEAR_KEYS, "expand_v", "attn", *SPEED_KEYS, *CHECKED_KEYS}
    known |= {*PreTrainedConfig().to_dict(), *_TRANSFORMERS_NOTES}
    attention = {*ATTENTION_KEYS, *EVICTION_KEYS, *CONTROLLER_KEYS, *NSA_KEYS, *CHECKED_KEYS, "attn_type", "layers"}
    if published.get("model_type") in PURE_TYPES:  # whose attention is described beside all else
        known |= attention
    section = published.get("attn") or {}
    unread = {key: value for key, value in published.items() if key not in known}
    unread |= {f"attn.{key}": value for key, value in section.items() if key not in attention}
    return [f"{key} = {json.dumps(value)}" for key, value in sorted(unread.items()) if value]


def unwritten_settings(config: HybridConfig) -> list[str]:
    """Settings of a model that `to_published` leaves out, as `name = value`; those at their defaults are not lost.

    Nothing that the model computes follows from them: they belong to its training, or to programs that read them.
    """
    from holdfast.training.controller import ControllerConfig  # here: training builds on models, and they on this file

    assert config.controller is not None
    defaults = dataclasses.asdict(ControllerConfig())
    unwritten = {
        f"controller.{key}": value
        for key, value in config.controller.items()
        if key not in CONTROLLER_KEYS.values() and value != defaults[key]
    }
    if not config.scale_residual_init:
        unwritten["scale_residual_init"] = False
    others = type(config)().to_dict()
    unwritten |= {
        key: value
        for key, value in config.to_dict().items()
        if key not in {*type(config).__annotations__, *_TRANSFORMERS_NOTES} and value != others.get(key)
    }
    return [f"{key} = {json.dumps(value)}" for key, value in sorted(unwritten.items())]


_TRANSFORMERS_NOTES = (
    "model_type",
    "architectures",
    "auto_map",
    "dtype",  # as that of the weights says
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
)


def _published_attention(config: HybridConfig, name: str, allowed: set[str]) -> dict[str, Any]:
    if name not in allowed and name != "native_sparse_attention":
        raise ValueError(f"the published format has no pure '{name}' model")
    assert config.mixer_options is not None
    assert config.controller is not None
    options = config.mixer_options[name]
    section: dict[str, Any] = {key: options.get(key) for key in ATTENTION_KEYS}
    section["num_kv_heads"] = section["num_kv_heads"] or section["num_heads"]
    if name == "learned_eviction":
        for key, computed in {
            "threshold": (0.5,),
            "scorer_causal": (False,),
            "scorer_sharing": ("head", "layer"),
        }.items():
            if key in options and options[key] not in computed:
                known = " or ".join(map(repr, computed))
                raise ValueError(f"the published format has only {key} = {known}, this model has {options[key]!r}")
        section |= {"attn_type": "lte", "routing_method": "sigmoid", "routing_grad": True}
        section |= {theirs: options[ours] for theirs, ours in EVICTION_KEYS.items() if ours in options}
        section |= {
            theirs: config.controller[ours] for theirs, ours in CONTROLLER_KEYS.items() if ours in config.controller
        }
        return section
    if name == "native_sparse_attention":
        section |= {theirs: options[ours] for theirs, ours in NSA_KEYS.items() if ours in options}
        return section | {"attn_type": "nsa", "model_type": "nsa"}
    return section | {"window_size": options.get("window"), "model_type": "transformer"}


def _need(section: Mapping[str, Any], where: str, keys: tuple[str, ...]) -> None:
    if lacking := [key for key in keys if section.get(key) is None]:
        raise ValueError(f"{where} lacks {', '.join(lacking)}")


def _refuse(section: Mapping[str, Any], key: str) -> None:
    computed = CHECKED_KEYS[key]
    if key in section and section[key] is not None and section[key] not in computed:
        raise ValueError(
            f"the published configuration has {key} = {section[key]!r}; this library computes only {computed[0]!r}"
        )
