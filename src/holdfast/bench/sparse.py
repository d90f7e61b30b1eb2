"""`holdfast bench ops --only sparse`: Native Sparse Attention beside full attention of the same heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.bench.memory import peak_bytes
from holdfast.bench.peers import CAUSAL, causal_attention
from holdfast.bench.results import Case, Result
from holdfast.bench.settings import PASSES, WARM_UP_TOKENS, OpsSettings
from holdfast.bench.setup import Setup
from holdfast.bench.timing import Variant
from holdfast.ops.native_sparse_attention import native_sparse_attention

__all__ = ["KIND", "SPARSE", "SparseSize", "pairs_read", "sparse_cases", "sparse_work"]

KIND = "native sparse attention"
SPARSE = "holdfast, sparse"


@dataclass(frozen=True)
class SparseSize:
    """Everything that the inputs follow from; picklable, for processes that measure memory."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    num_blocks: int
    window: int
    device: str
    dtype: torch.dtype
    seed: int

    @classmethod
    def of(cls, setup: Setup[OpsSettings], tokens: int) -> SparseSize:
        settings = setup.settings
        return cls(
            settings.batch_size,
            tokens,
            settings.heads,
            settings.heads // settings.group_size,
            settings.head_dim,
            settings.block_size,
            settings.num_blocks,
            settings.sparse_window,
            str(setup.device),
            setup.dtype,
            settings.seed,
        )

    def inputs(self) -> tuple[Tensor, ...]:
        """q, k, v and the gradient of the output by time [B, T, heads, D], gates [B, T, H, 3]."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        shapes = [(self.batch, self.tokens, count, self.head_dim) for count in heads]
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        gates = torch.rand(*shapes[0][:3], 3, generator=generator)
        return tuple(x.to(self.device, self.dtype) for x in (*drawn, gates))


def sparse_work(name: str, size: SparseSize, backward: bool) -> Callable[[], Any]:
    """A function that computes the output, and the gradients with `backward`."""
    q, k, v, grad, gates = size.inputs()
    if name == CAUSAL:  # in the layout that it likes
        q, k, v, grad = (x.transpose(1, 2).contiguous() for x in (q, k, v, grad))
    leaves = [x.detach().requires_grad_(backward) for x in ((q, k, v) if name == CAUSAL else (q, k, v, gates))]

    def forward() -> Tensor:
        if name == CAUSAL:
            return causal_attention(*leaves)
        q, k, v, gates = leaves
        return native_sparse_attention(
            q, k, v, gates, block_size=size.block_size, num_blocks=size.num_blocks, window=size.window
        )[0]

    def forward_and_backward() -> object:
        return torch.autograd.grad(forward(), leaves, grad)

    return forward_and_backward if backward else torch.no_grad()(forward)


def pairs_read(name: str, size: SparseSize) -> int:
    """Pairs of a query and a key, or a mean of keys, that it sees, over batch and query heads."""
    seen = torch.arange(1, size.tokens + 1)  # keys up to each query
    if name == SPARSE:
        blocks = -(-seen // size.block_size)
        own = seen - (blocks - 1) * size.block_size
        chosen = (blocks.clamp(max=size.num_blocks) - 1) * size.block_size + own
        seen = seen // size.block_size + chosen + seen.clamp(max=size.window)
    return size.batch * size.heads * int(seen.sum())


def sparse_cases(setup: Setup[OpsSettings], tokens: int) -> Iterator[Case]:
    """Forward, and forward with backward, at one length."""
    size, settings = SparseSize.of(setup, tokens), setup.settings
    small = dataclasses.replace(size, tokens=min(tokens, WARM_UP_TOKENS))
    names = [SPARSE, *([CAUSAL] if settings.peers else [])]
    for label, backward in PASSES.items():
        variants = [Variant(name, sparse_work(name, size, backward)) for name in names]
        timings = setup.measure(variants, f"{KIND}, {tokens:,} tokens, {label}")
        results = []
        for name in names:
            peak = None
            if settings.memory:
                work = (name, size, backward)
                peak = peak_bytes(_work_once, work, warm_up=(name, small, backward), device=setup.device)
            pairs = pairs_read(name, size)
            # q·k and the weighted sum of v; backward: q·k again, and the gradients of v, the weights, q and k.
            flops = pairs * size.head_dim * (14 if backward else 4)
            moved = _bytes(size, backward)
            results.append(Result(name, timings[name], flops, moved, peak_bytes=peak, notes={"pairs": pairs}))
        yield Case(KIND, {"tokens": tokens, "pass": label}, tuple(results))


def _work_once(name: str, size: SparseSize, backward: bool) -> None:
    """What memory is measured of: the inputs and one call."""
    sparse_work(name, size, backward)()


def _bytes(size: SparseSize, backward: bool) -> int:
    """Inputs read once and outputs written once, in each pass."""
    row = size.batch * size.tokens * size.head_dim * size.dtype.itemsize
    query, pair = row * size.heads, 2 * row * size.kv_heads
    return 2 * query + pair + (4 * query + 2 * pair if backward else 0)
