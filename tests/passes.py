"""Ways to put tokens through small models, for the tests that compare them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from holdfast import HybridCache, HybridForCausalLM

ModelFactory = Callable[..., HybridForCausalLM]

STACKS = [
    ("gated_deltanet",),
    ("full_attention",),
    ("sliding_attention",),
    ("learned_eviction",),
    ("gated_deltanet", "learned_eviction"),
    ("native_sparse_attention",),
    ("learned_eviction", "learned_eviction"),
    ("gated_deltanet", "native_sparse_attention"),
    ("native_sparse_attention", "native_sparse_attention"),
    ("gated_deltanet", "full_attention", "sliding_attention", "native_sparse_attention", "learned_eviction"),
]
ATOL = 1e-4


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """No token twice in a row: equal pairs would have equal scores, whose order is a matter of rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(100, generator=generator)[:length] for _ in range(batch)])


def one_pass(model: HybridForCausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def in_chunks(model: HybridForCausalLM, ids: Tensor, lengths: list[int], cache: HybridCache | None = None) -> Tensor:
    """Logits of `ids`, given to the model in chunks of these lengths (the last one takes what is left)."""
    cache = HybridCache(model.config) if cache is None else cache
    pieces, start = [], 0
    with torch.no_grad():
        for length in [*lengths, ids.shape[1]]:
            if start < ids.shape[1]:
                pieces.append(model(ids[:, start : start + length], past_key_values=cache).logits)
                start += length
    return torch.cat(pieces, dim=1)


def assert_equal_logits(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
