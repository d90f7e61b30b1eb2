"""What the matrix products of the gated delta rule in chunks amount to, for FLOP counters."""

from typing import Any

from torch import Tensor

from .chunked import _chunk_length, scan_flops


def native_flops(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, cu_seqlens: Tensor | None, *_: Any
) -> int:
    """Operations of a forward pass in C++: those of `chunked`, whose chunks have other lengths."""
    n, nk, C, K, V = _sizes(k, v)
    packed = 0 if cu_seqlens is None else n * C * C
    return scan_flops(n, C, K, V) + 2 * (2 * nk * C * C * K + n * (C * C * V + C * K * V) + packed)


def native_backward_flops(d_out: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> int:
    """The same of the backward pass, for all inputs."""
    n, nk, C, K, V = _sizes(k, v)
    packed = 0 if others[-2] is None else n * C * C
    inside = 4 * nk * C * C * K + n * (2 * C * C * V + 2 * C * K * V + C * C * C)  # the last of the triangular system
    return 2 * scan_flops(n, C, K, V) + 2 * (inside + packed)


def _sizes(k: Tensor, v: Tensor) -> tuple[int, int, int, int, int]:
    """Chunks of value heads and of key heads, tokens in a chunk, K and V."""
    (B, T, Hk, K), (Hv, V) = k.shape, v.shape[2:]
    C = min(T, _chunk_length(K, V, v.device))
    chunks = B * -(-T // C)
    return chunks * Hv, chunks * Hk, C, K, V
