"""Retained attention in Triton, for CUDA and ROCm; the interpreter (TRITON_INTERPRET=1) runs it on the CPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.ops.retained_attention.triton import operators, sizes

if TYPE_CHECKING:
    from holdfast.ops.kernels import ShippedKernel

__all__ = ["is_available", "retained_attention_triton", "shipped_kernels", "supports"]


_AVAILABLE = importlib.util.find_spec("triton") is not None


def is_available() -> bool:
    """Whether Triton can be imported; it is not imported before its first use."""
    return _AVAILABLE


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there are kernels for these dtypes, head sizes and groups of query heads."""
    return not _obstacle(q, k, v)


def retained_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor | None, window: int | None, scale: float
) -> Tensor:
    """The contract of `retained_attention` in O(Tq·(window + kept) + Tk) time and O(Tk) memory, without a host stall.

    Gradients are deterministic. Products of float32 are exact unless `torch.set_float32_matmul_precision` asks for
    TF32. Inputs that are not contiguous are copied.

    Raises:
        ImportError: Triton is not installed.
        TypeError: the dtype is none of bfloat16, float16 and float32.
        ValueError: heads are too large, or too many of them share a key, or the tensors are on a CPU.
    """
    if not is_available():
        raise ImportError("backend 'triton' needs Triton: install triton, or take backend 'blocked'.")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"backend 'triton' has no kernels for {q.dtype}: take backend 'blocked'.")
    if obstacle := _obstacle(q, k, v):
        raise ValueError(f"backend 'triton' {obstacle}: take backend 'blocked'.")
    if 0 in (*q.shape[:3], v.shape[3]):
        # Nothing to launch, but still a function of the inputs.
        return q.new_zeros(*q.shape[:3], v.shape[3]) + 0 * (q.sum() + k.sum() + v.sum())
    keys = k.shape[1]
    window = keys if window is None else min(window, keys)
    plan: tuple[Tensor | None, ...] = (None,) * 4
    if visible_until is not None:
        plan = operators.retention_plan(visible_until, q.shape[1], window)
    return operators.attend(q, k, v, *plan, window, scale)[0]


def shipped_kernels() -> Iterator[ShippedKernel]:
    """Every kernel at the sizes and dtypes of published models; imports Triton."""
    from holdfast.ops.retained_attention.triton.shipped import shipped_kernels

    return shipped_kernels()


def _obstacle(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why the kernels cannot take these tensors; empty if they can."""
    dim, groups = max(q.shape[3], v.shape[3]), q.shape[2] // k.shape[2]
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"has no kernels for {q.dtype}"
    if not 0 < q.shape[3] <= dim <= sizes.LARGEST_HEAD:
        return f"takes heads of 1 to {sizes.LARGEST_HEAD} channels, not {dim}"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"needs a GPU (or TRITON_INTERPRET=1 before the first import of Triton), not {q.device}"
    most = sizes.most_groups(q.dtype, dim)
    if groups > most:
        return f"takes at most {most} query heads per key/value head here, not {groups}"
    return ""
