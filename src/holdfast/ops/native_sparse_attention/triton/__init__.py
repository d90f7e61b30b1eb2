"""Native Sparse Attention in Triton, for CUDA and ROCm; the interpreter (TRITON_INTERPRET=1) runs it on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.ops.native_sparse_attention.blocked import block_means, sliding_attention
from holdfast.ops.native_sparse_attention.packing import last_in_window
from holdfast.ops.native_sparse_attention.triton import operators, sizes
from holdfast.ops.retained_attention.triton import is_available
from holdfast.ops.retained_attention.triton.sizes import LARGEST_HEAD

if TYPE_CHECKING:
    from holdfast.ops.kernels import ShippedKernel

__all__ = ["native_sparse_attention_triton", "shipped_kernels", "supports"]


def supports(q: Tensor, v: Tensor, num_blocks: int) -> bool:
    """Whether Triton is installed and has kernels for these dtypes, head sizes and numbers of chosen blocks."""
    return is_available() and not _obstacle(q, v, num_blocks)


def native_sparse_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    block_size: int,
    num_blocks: int,
    window: int,
    lengths: Tensor | None,
    begins: Tensor | None,
    compressed: tuple[Tensor, Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The contract of `native_sparse_attention` without a host stall, in the time and memory of "blocked".

    Inputs of 16 bits are multiplied in 16 bits and summed in fp32; the means and the weights are rounded to the dtype
    of q for it. Products of float32 are exact. Gradients are deterministic. A few queries for which no gradient is
    wanted are divided over the keys, and keys and means are read where they lie.

    Raises:
        ImportError: Triton is not installed.
        TypeError: the dtype is none of bfloat16, float16 and float32.
        ValueError: heads are too large, or more blocks chosen than fit, or the tensors are on a CPU.
    """
    if not is_available():
        raise ImportError("backend 'triton' needs Triton: install triton, or take backend 'blocked'.")
    if obstacle := _obstacle(q, v, num_blocks):
        error = ValueError if q.dtype in sizes.DTYPES else TypeError
        raise error(f"backend 'triton' {obstacle}: take backend 'blocked'.")
    keys = k.shape[1]
    if 0 in q.shape[:3]:
        # Nothing to launch, but still a function of the inputs.
        out = q.new_zeros(*q.shape[:3], v.shape[3]) + 0 * (q.sum() + k.sum() + v.sum() + gates.sum().to(q.dtype))
        return out, torch.full((*q.shape[:2], k.shape[2], num_blocks), -1, dtype=torch.int64, device=q.device)
    complete = keys // block_size
    if compressed is None:
        compressed = block_means(k, complete, block_size), block_means(v, complete, block_size)
    means_k, means_v = (means[:, :complete] for means in compressed)
    if begins is None and q.shape[1] <= sizes.FEW_QUERIES and not _wants_gradient(q, k, v, gates, means_k, means_v):
        return operators.step(q, k, v, gates, means_k, means_v, lengths, block_size, num_blocks, window, scale)
    means_k, means_v = means_k.to(q.dtype), means_v.to(q.dtype)
    of_means, _, blocks = operators.compressed_attention(
        q, means_k, means_v, lengths, begins, keys, block_size, num_blocks, scale
    )
    of_blocks, _ = operators.selected_attention(q, k, v, blocks, lengths, begins, block_size, scale)
    until = None if begins is None else last_in_window(begins, window, block_size)
    recent = sliding_attention(q, k, v, window, lengths, until, scale, q.dtype)
    return operators.gated_sum(gates, of_means, of_blocks, recent), blocks


def shipped_kernels() -> Iterator[ShippedKernel]:
    """Every kernel at the sizes and dtypes of published models; imports Triton."""
    from holdfast.ops.native_sparse_attention.triton.shipped import shipped_kernels

    return shipped_kernels()


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _obstacle(q: Tensor, v: Tensor, num_blocks: int) -> str:
    """Why the kernels cannot take these tensors; empty if they can."""
    dim = max(q.shape[3], v.shape[3])
    if q.dtype not in sizes.DTYPES:
        return f"has no kernels for {q.dtype}"
    if not 0 < min(q.shape[3], v.shape[3]) <= dim <= LARGEST_HEAD:
        return f"takes heads of 1 to {LARGEST_HEAD} channels, not {dim}"
    if num_blocks > sizes.LARGEST_CHOICE:
        return f"chooses at most {sizes.LARGEST_CHOICE} blocks, not {num_blocks}"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"needs a GPU (or TRITON_INTERPRET=1 before the first import of Triton), not {q.device}"
    return ""
