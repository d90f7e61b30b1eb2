"""What a model costs, known from its configuration alone: parameters, operations per token, bytes of cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from holdfast.cache import HybridCache
from holdfast.configuration import HybridConfig
from holdfast.mixers import TokenMixer
from holdfast.modeling import HybridForCausalLM

__all__ = ["CONTEXTS", "ModelCost", "describe_cost", "flops_per_token", "parameters_by_part"]

CONTEXTS = tuple(1024 * 4**power for power in range(6))
"""Context lengths that a report shows: 1,024 to 1,048,576 tokens."""


@dataclass(frozen=True)
class ModelCost:
    """Result of `describe_cost`.

    Attributes:
        parameters: by part, in the order in which a token meets them.
        flops: floating-point operations of one forward token at each context length.
        scorer_flops: how many of them the retention scorers make, at every context length.
        cache_bytes: bytes of the cache after as many tokens, by context length.
        dtype: of the cache's keys and values, such as "bfloat16".
        batch_size: rows of the cache.
    """

    parameters: dict[str, int]
    flops: dict[int, int]
    scorer_flops: int
    cache_bytes: dict[int, int]
    dtype: str
    batch_size: int

    @property
    def total_parameters(self) -> int:
        """All parameters; tied embeddings count once."""
        return sum(self.parameters.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, ready for JSON."""
        return {
            "total_parameters": self.total_parameters,
            "parameters": self.parameters,
            "flops_per_token": {str(context): count for context, count in self.flops.items()},
            "scorer_flops_per_token": self.scorer_flops,
            "cache_bytes": {str(context): count for context, count in self.cache_bytes.items()},
            "cache_dtype": self.dtype,
            "batch_size": self.batch_size,
        }


def describe_cost(
    config: HybridConfig,
    *,
    contexts: tuple[int, ...] = CONTEXTS,
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 1,
) -> ModelCost:
    """What a model of this configuration costs. Nothing is allocated, however large it is.

    Args:
        config: of the model.
        contexts: context lengths in tokens, each at least 1.
        dtype: that the model computes in, and so of the cache's keys and values.
        batch_size: rows generated at once, at least 1.

    Raises:
        ValueError: if `batch_size` or a context is below 1.
    """
    if batch_size < 1 or min(contexts, default=1) < 1:
        raise ValueError(f"batch_size is {batch_size} and contexts are {contexts}; give at least 1 everywhere.")
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    return ModelCost(
        parameters=parameters_by_part(model),
        flops={context: flops_per_token(model, context) for context in contexts},
        scorer_flops=sum(layer.scorer_flops_per_token for layer in model.model.eviction_layers()),
        cache_bytes={context: HybridCache.bytes_for(config, batch_size, dtype, context) for context in contexts},
        dtype=str(dtype).removeprefix("torch."),
        batch_size=batch_size,
    )


def parameters_by_part(model: HybridForCausalLM) -> dict[str, int]:
    """Parameters of the embeddings, the mixers by kind, the retention scorers, the MLPs, the norms and the head.

    They add up to all parameters of the model: a head that is tied to the embeddings counts there.
    """
    mixers = model.config.mixers
    assert mixers is not None
    counts = dict.fromkeys(["embeddings", *mixers, "retention scorer", "MLP", "norms", "output head"], 0)
    for name, parameter in model.named_parameters():
        counts[_part(name, mixers)] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def flops_per_token(model: HybridForCausalLM, context: int) -> int:
    """Floating-point operations (multiply-adds × 2) of one forward token at `context` tokens, the head included.

    Matrix products, attention and state updates are counted; norms, activations and the embedding are not.
    """
    config = model.config
    assert config.intermediate_size is not None
    total = 2 * config.hidden_size * config.vocab_size
    for block in model.model.layers:
        mixer = block.attn
        assert isinstance(mixer, TokenMixer)
        total += mixer.flops_per_token(context) + 6 * config.hidden_size * config.intermediate_size
    return total


def _part(name: str, mixers: list[str]) -> str:
    """The part of the model that the parameter `name` belongs to."""
    path = name.removeprefix("model.").split(".")
    if path[0] == "embeddings":
        return "embeddings"
    if path[0] == "lm_head":
        return "output head"
    if path[0] == "router":
        return "retention scorer"
    if path[0] == "norm" or path[2].endswith("_norm"):
        return "norms"
    if path[2] == "mlp":
        return "MLP"
    return "retention scorer" if path[3] == "router" else mixers[int(path[1])]
