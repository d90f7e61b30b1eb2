"""Whole models to measure: this library's, and transformers' Llama and OLMo-Hybrid of equal size; random weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    PreTrainedModel,
)

from holdfast.bench.settings import ModelSettings, SizeName
from holdfast.cache import HybridCache
from holdfast.configuration import HybridConfig
from holdfast.data.progress import track
from holdfast.info import flops_per_token
from holdfast.modeling import HybridForCausalLM

__all__ = [
    "MIXTURES",
    "SIZES",
    "Compiled",
    "Contender",
    "Holdfast",
    "Size",
    "Transformers",
    "contenders",
    "equal_configs",
    "hybrid_config",
    "keep_about",
]

LONGEST = 1 << 21
"""Tokens that the peers' rotary embeddings are told to expect."""
BEGINNING = 32
"""Tokens that a peer truly reads before its cache is filled up."""


_SPARSE = {"num_heads": 32, "num_kv_heads": 2, "head_dim": 64, "block_size": 64, "num_blocks": 16, "window": 512}
_NARROW_SPARSE = _SPARSE | {"num_heads": 16, "num_kv_heads": 1}
_TINY_SPARSE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "block_size": 4, "num_blocks": 3, "window": 16}


@dataclass(frozen=True)
class Size:
    """The numbers that the configurations of all models follow from."""

    layers: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    linear_heads: int
    linear_dim: int
    window: int = 768
    budget: int = 512
    tied: bool = True
    sparse: dict[str, int] = field(default_factory=lambda: _SPARSE)
    """Options of native sparse attention."""


SIZES: dict[SizeName, Size] = {
    "tiny": Size(
        2, 64, 256, heads=4, kv_heads=2, linear_heads=2, linear_dim=32, window=32, budget=16, sparse=_TINY_SPARSE
    ),
    "30m": Size(8, 512, 4096, heads=8, kv_heads=4, linear_heads=4, linear_dim=128, sparse=_NARROW_SPARSE),
    "43m": Size(12, 512, 4096, heads=8, kv_heads=8, linear_heads=4, linear_dim=128, sparse=_NARROW_SPARSE),
    "0.4b": Size(24, 1024, 32000, heads=16, kv_heads=16, linear_heads=8, linear_dim=128),
    "1.4b": Size(24, 2048, 32000, heads=32, kv_heads=8, linear_heads=8, linear_dim=256, tied=False),
}
"""0.4b and 1.4b are the published ones. By `equal_configs`, models of 30m have 29.9 to 30.0 million parameters, and of
43m, whatever its name says, 46.1 to 46.3 million.
"""


MIXTURES: dict[str, tuple[str, ...]] = {
    "GDN": ("gated_deltanet",),
    "GDN + SWA": ("gated_deltanet", "sliding_attention"),
    "laLTE": ("gated_deltanet", "learned_eviction"),
    "laNSA": ("gated_deltanet", "native_sparse_attention"),
    "GDN + full attention": ("gated_deltanet", "full_attention"),
    "full attention": ("full_attention",),
}
"""The models that are compared, by name, and the mixers of their layers."""


def hybrid_config(size: Size, mixers: Sequence[str], width: int | None = None) -> HybridConfig:
    """This library's configuration; raises ValueError for a mixer that does not exist.

    A mixer without an entry here has the options of a configuration that gives none. width: of the MLPs; None: the
    usual one.
    """
    heads = {"num_heads": size.heads, "num_kv_heads": size.kv_heads, "head_dim": size.hidden // size.heads}
    options: dict[str, dict[str, Any]] = {
        "gated_deltanet": {"num_heads": size.linear_heads, "head_dim": size.linear_dim},
        "full_attention": heads,
        "sliding_attention": heads | {"window": size.window + 1},
        "learned_eviction": heads | {"window": size.window, "budget": size.budget, "sinks": 4},
        "native_sparse_attention": size.sparse,
    }
    return HybridConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        mixers=list(mixers),
        intermediate_size=width,
        mixer_options={name: options[name] for name in dict.fromkeys(mixers) if name in options},
        tie_word_embeddings=size.tied,
        bos_token_id=None,
        eos_token_id=None,
    )


def equal_configs(size: Size) -> dict[str, HybridConfig]:
    """Configurations of `MIXTURES` with as many parameters as laLTE, as nearly as the width of the MLPs allows."""
    with torch.device("meta"):
        like = HybridForCausalLM(hybrid_config(size, MIXTURES["laLTE"])).num_parameters()

    def config(mixers: Sequence[str]) -> HybridConfig:
        def build(width: int) -> PreTrainedModel:
            return HybridForCausalLM(hybrid_config(size, mixers, width))

        return hybrid_config(size, mixers, _matching_width(build, size, like))

    return {name: config(mixers) for name, mixers in MIXTURES.items()}


class Contender(ABC):
    """A causal language model in evaluation mode, and how to feed it."""

    name: str
    model: Any
    filling: str
    """How `filled_caches` does it, in words."""

    @property
    def parameters(self) -> int:
        return self.model.num_parameters()

    @abstractmethod
    def empty_cache(self) -> Any: ...

    @abstractmethod
    def filled_caches(self, contexts: Sequence[int], batch_size: int, chunk: int) -> dict[int, Any]:
        """A cache of its own for each context, as if so many tokens had been read."""

    @abstractmethod
    def rewinding(self, cache: Any) -> Callable[[], object]:
        """A function that sets a cache back to what it is now, where it would grow otherwise."""

    @abstractmethod
    def cache_bytes(self, cache: Any) -> int:
        """Bytes that hold what the model remembers."""

    @abstractmethod
    def flops(self, context: int) -> int:
        """Operations of one forward token that sees `context` tokens, the head included."""

    def flops_of_sequence(self, length: int) -> int:
        """Operations of the forward pass of a sequence: each token sees itself and those before it.

        Summed by the midpoints of stretches, within which the operations grow evenly.
        """
        stretch = -(-length // 64)
        starts = range(0, length, stretch)
        parts = ((min(stretch, length - start), start) for start in starts)
        return sum(count * self.flops(start + (count + 1) // 2) for count, start in parts)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that every token needs: all but untied embeddings, of which it needs a row."""
        weights = {id(weight): weight.nbytes for weight in self.model.parameters()}
        embeddings, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        return sum(weights.values()) - (0 if embeddings is head else embeddings.nbytes)

    def read(self, ids: Tensor, cache: Any) -> Tensor:
        """Logits [B, 1, V] after ids [B, T], which enter the cache."""
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits

    def prefill(self, ids: Tensor, chunk: int | None) -> Any:
        """A cache that has read ids [B, T], `chunk` tokens a call; None: all in one."""
        cache = self.empty_cache()
        for part in ids.split(chunk or ids.shape[1], dim=1):
            self.read(part, cache)
        return cache

    def random_ids(self, batch_size: int, length: int) -> Tensor:
        """[B, T] on the model's device, from PyTorch's generator."""
        return torch.randint(self.model.config.vocab_size, (batch_size, length)).to(self.model.device)


class Holdfast(Contender):
    """This library's model."""

    filling = "read, in chunks"

    def __init__(self, model: HybridConfig | HybridForCausalLM, name: str = "holdfast") -> None:
        """A configuration stands for a new model, with random weights."""
        self.name = name
        self.model = (HybridForCausalLM(model) if isinstance(model, HybridConfig) else model).eval()

    def empty_cache(self) -> HybridCache:
        return HybridCache(self.model.config)

    def filled_caches(self, contexts: Sequence[int], batch_size: int, chunk: int) -> dict[int, HybridCache]:
        caches: dict[int, HybridCache] = {}
        reader = self.empty_cache()
        for context in sorted(set(contexts)):
            rest = self.random_ids(batch_size, context - (reader.columns if caches else 0))
            for ids in track(rest.split(chunk, dim=1), f"reading {context:,} tokens"):
                self.read(ids, reader)
            caches[context] = self.empty_cache()
            caches[context].restore(reader.snapshot())
        return caches

    def rewinding(self, cache: HybridCache) -> Callable[[], object]:
        return lambda: None  # it goes on, so that the steps of all turns are steps in a row

    def cache_bytes(self, cache: HybridCache) -> int:
        return cache.nbytes

    def flops(self, context: int) -> int:
        return flops_per_token(self.model, context)


class Compiled(Holdfast):
    """The same model, its steps compiled for constant shapes: on a GPU each is one CUDA graph.

    Args:
        ours: the model; of mixers whose memory does not grow.
        caches: its filled caches, by context, which are copied.
    """

    def __init__(self, ours: Holdfast, caches: dict[int, HybridCache]) -> None:
        super().__init__(ours.model, f"{ours.name}, compiled")
        self._step = torch.compile(ours.model, mode="reduce-overhead", fullgraph=True)
        self._caches = caches

    def filled_caches(self, contexts: Sequence[int], batch_size: int, chunk: int) -> dict[int, HybridCache]:
        copies = {context: self.empty_cache() for context in sorted(set(contexts))}
        for context, cache in track(list(copies.items()), "compiling"):
            cache.restore(self._caches[context].snapshot())
            for _ in range(3):  # compiled, recorded, played
                self.read(self.random_ids(batch_size, 1), cache)
        return copies

    def read(self, ids: Tensor, cache: Any) -> Tensor:
        if ids.shape[1] > 1:
            return super().read(ids, cache)
        torch.compiler.cudagraph_mark_step_begin()
        return self._step(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits


class Transformers(Contender):
    """A model of transformers, with as many parameters as `like`."""

    filling = f"{BEGINNING} tokens read, then keys and values filled up with random numbers"

    def __init__(self, name: str, build: Callable[[int], PreTrainedModel], size: Size, like: int) -> None:
        """`build` takes the width of the MLP, the one number that is free to make the sizes equal."""
        self.name = name
        self.model = build(_matching_width(build, size, like)).eval()

    def empty_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def filled_caches(self, contexts: Sequence[int], batch_size: int, chunk: int) -> dict[int, DynamicCache]:
        ids = self.random_ids(batch_size, BEGINNING)
        caches = {}
        for context in sorted(set(contexts)):
            caches[context] = self.prefill(ids, None)
            for layer in _attention_layers(caches[context]):
                rows, heads, _, dim = layer.keys.shape
                layer.keys, layer.values = (layer.keys.new_empty(rows, heads, context, dim).normal_() for _ in range(2))
        return caches

    def rewinding(self, cache: DynamicCache) -> Callable[[], object]:
        layers = _attention_layers(cache)
        kept = [(layer.keys, layer.values) for layer in layers]

        def rewind() -> None:  # an update makes new tensors, so these stay as they are
            for layer, (keys, values) in zip(layers, kept, strict=True):
                layer.keys, layer.values = keys, values

        return rewind

    def cache_bytes(self, cache: DynamicCache) -> int:
        return sum(tensor.nbytes for layer in cache.layers for tensor in _tensors(vars(layer)))

    def flops(self, context: int) -> int:
        config = self.model.config
        total = 2 * sum(module.weight.numel() for module in self.model.modules() if isinstance(module, nn.Linear))
        for kind in _layer_types(config):
            if kind == "linear_attention":
                total += 6 * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
            else:
                total += 4 * context * config.hidden_size
        return total


def contenders(settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> list[Contender]:
    """This library's model first, then its peers: OLMo-Hybrid only beside a model that has linear layers and others.

    Raises:
        ValueError: if a mixer does not exist.
    """
    size = SIZES[settings.size]
    ours = Holdfast(hybrid_config(size, settings.mixers))
    found: list[Contender] = [ours]
    if settings.peers:
        like = ours.parameters
        found.append(Transformers("Llama", lambda width: _llama(size, width), size, like))
        mixers = ours.model.config.mixers
        layers = ["linear_attention" if name == "gated_deltanet" else "full_attention" for name in mixers]
        if len(set(layers)) == 2:
            found.append(Transformers("OLMo-Hybrid", lambda width: _olmo_hybrid(size, width, layers), size, like))
    for contender in found:
        contender.model.to(device, dtype)
    return found


def keep_about(model: HybridForCausalLM, ids: Tensor, kept: int) -> None:
    """Shift the scorers' last biases so that each head finds about `kept` of the pairs of ids [B, T] worth keeping,
    as a trained model does; one that has not been trained keeps them all.
    """
    with torch.no_grad():
        retention = model(input_ids=ids, use_cache=False).retention
        if retention is None or kept >= ids.shape[1]:
            return
        for layer, scores in zip(model.model.eviction_layers(), retention.scores, strict=True):
            threshold = torch.tensor(layer.options.threshold)
            logits = torch.logit((scores + threshold).flatten(0, 1), eps=1e-6)  # [B·T, Hkv]
            shift = logits.quantile(1 - kept / ids.shape[1], dim=0) - torch.logit(threshold, eps=1e-6)
            bias = layer.router.conv_stack.proj.bias
            bias.sub_((shift.mean() if layer.router.shared else shift).to(bias.dtype))


def _shared(size: Size, width: int) -> dict[str, Any]:
    """What the configurations of the peers have in common."""
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "tie_word_embeddings": size.tied,
        "max_position_embeddings": LONGEST,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _llama(size: Size, width: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_shared(size, width)))


def _olmo_hybrid(size: Size, width: int, layers: list[str]) -> PreTrainedModel:
    linear: dict[str, Any] = {
        "linear_num_key_heads": size.linear_heads,
        "linear_num_value_heads": size.linear_heads,
        "linear_key_head_dim": size.linear_dim,
        "linear_value_head_dim": size.linear_dim,
    }
    return OlmoHybridForCausalLM(OlmoHybridConfig(layer_types=layers, **linear, **_shared(size, width)))


def _matching_width(build: Callable[[int], PreTrainedModel], size: Size, like: int) -> int:
    """The multiple of 8 for the width of the MLPs that brings the number of parameters closest to `like`."""
    with torch.device("meta"):
        without = build(8).num_parameters() - 8 * 3 * size.hidden * size.layers
    return 8 * max(1, round((like - without) / (8 * 3 * size.hidden * size.layers)))


def _layer_types(config: Any) -> list[str]:
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def _attention_layers(cache: DynamicCache) -> list[Any]:
    return [layer for layer in cache.layers if torch.is_tensor(getattr(layer, "keys", None))]


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested dictionaries."""
    if torch.is_tensor(value):
        return [value]
    return [tensor for part in value.values() for tensor in _tensors(part)] if isinstance(value, dict) else []
