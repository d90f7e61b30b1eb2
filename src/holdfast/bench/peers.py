"""Other implementations of the same operations. Those that need a package or a GPU are left out where it is missing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CAUSAL", "CAUSAL_BY_TIME", "causal_attention", "delta_rule_peers", "flex_attention"]

DeltaRule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

CAUSAL = "SDPA, causal"
"""How results call `causal_attention`."""
CAUSAL_BY_TIME = "SDPA, causal, by time"
"""The same on tensors [B, T, H, D], as a model's projections give them."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`F.scaled_dot_product_attention` over everything: q [B, H, T, D], k and v [B, Hkv, T, D] → [B, H, T, D]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def flex_attention(q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, *, compiled: bool = True) -> Tensor:
    """PyTorch's flex attention with the mask of `retained_attention`, its block mask built in the same call.

    Args:
        q: [B, H, T, D]. k, v: [B, Hkv, T, D].
        visible_until: int64 [B, T, Hkv].
        compiled: False for tests on a CPU, where it takes O(T²) memory.

    Returns:
        [B, H, T, D].
    """
    from torch.nn.attention.flex_attention import create_block_mask

    batch, heads, length, _ = q.shape
    groups = heads // k.shape[1]
    until = visible_until.transpose(1, 2).contiguous()  # [B, Hkv, T]

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query <= until[row, head // groups, key])

    mask = create_block_mask(sees, batch, heads, length, length, device=str(q.device), _compile=compiled)
    return _flex(compiled)(q, k, v, block_mask=mask, enable_gqa=groups > 1)


@functools.cache
def _flex(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention import flex_attention as module

    function: Any = torch.compile(module.flex_attention) if compiled else module.flex_attention
    return function


def delta_rule_peers(device: torch.device) -> dict[str, DeltaRule]:
    """Functions (q, k, v, g, beta) → out by name, all in the layout of `holdfast.ops.gated_delta_rule`.

    transformers' chunked PyTorch code everywhere; on CUDA also the kernels of fla-core, where it is installed.
    """
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid

    decorated = modeling_olmo_hybrid.torch_chunk_gated_delta_rule
    # The name may stand for fla-core's kernels where that is installed.
    fallback = getattr(decorated, "__wrapped__", decorated)
    peers: dict[str, DeltaRule] = {"transformers": lambda q, k, v, g, beta: fallback(q, k, v, g, beta)[0]}
    if device.type == "cuda":
        try:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        except ImportError:
            return peers
        peers["fla-core"] = lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g, beta)[0]
    return peers
