"""One decoding step of attention over a sliding window and a store of fixed size: insert, evict or keep, attend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from holdfast.ops import one_token
from holdfast.ops.precision import without_autocast
from holdfast.ops.window_step import native
from holdfast.ops.window_step.native import window_step_native
from holdfast.ops.window_step.operator import is_available, supports, window_step_triton
from holdfast.ops.window_step.pytorch import window_step_pytorch
from holdfast.ops.window_step.reference import window_step_reference
from holdfast.ops.window_step.slots import EMPTY, Slots, ring_positions

__all__ = ["BACKENDS", "EMPTY", "Slots", "is_compiled", "ring_positions", "window_step"]

Backend = Callable[[Tensor, Tensor, Tensor, Slots, Tensor | None, Tensor | None, int, int, float], Tensor]

BACKENDS: dict[str, Backend] = {
    "reference": window_step_reference,
    "pytorch": window_step_pytorch,
    "native": window_step_native,
    "triton": window_step_triton,
}


def window_step(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    *,
    score: Tensor | None = None,
    real: Tensor | None = None,
    sinks: int = 0,
    delay: int = 0,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advance `slots` by one token per row, in place, and attend over what they then hold (specification §3.3).

    The new pair takes the ring slot of the pair that leaves the window. That one enters the store if its score is
    positive (of the first `sinks` tokens it counts as +inf) and strictly higher than the lowest stored; it takes the
    place of the lowest, among equals of the latest. A free slot counts as −inf. Otherwise it is forgotten. This is the
    rule of `streaming_retention`, ties included.

    Args:
        q: [B, H, D], H a multiple of Hkv. Query heads of one group are neighbours.
        key, value: [B, Hkv, D] of the new token, the key with its rotary embedding; stored in the dtype of `slots`.
        slots: changed in place. All empty slots must hold finite numbers.
        score: fp32 [B, Hkv], the score that has just become final: that of the token `delay` before the new one. It may
            be NaN, which is not positive. Needed with a store.
        real: bool [B], False where a row has no new token: nothing of it changes, and its output is the attention over
            what it holds. None: every row has one.
        sinks: first tokens of each row, kept forever; at most the budget.
        delay: at most the ring's size, so that a pair's score is known when it leaves.
        scale: factor on the products before the softmax; D^-½ if None.
        backend: "reference", "pytorch" (any device, differentiable), "native" (C++; float32 on a CPU) or "triton" (CUDA
            and ROCm). Where no gradient is wanted, None takes triton on a GPU if it is installed and has kernels for
            the dtypes and sizes (bfloat16, float16, float32; D ≤ 256), and native on a CPU if it can be compiled; else
            pytorch.

    Returns:
        [B, H, D] in the dtype of q; 0 where a row holds nothing. Softmax and sums are in fp32, or in fp64 for fp64;
        under autocast too. "pytorch" and "triton" multiply 16-bit numbers as such.

    Raises:
        TypeError, ValueError: a dtype, shape or backend does not fit.
        ImportError: backend "triton" without Triton.

    O(budget + window) time and no memory but the output's (and, if few rows are split over the GPU, partial results).
    The positions are read on the device and every shape is static: a CUDA graph can capture the step.
    """
    _check(q, key, value, slots, score, real, sinks, delay)
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} does not exist: choose one of {', '.join(map(repr, BACKENDS))}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = BACKENDS[backend or _fastest(q, key, value, slots, score, real)]
    # Autocast would lower the scores, and the output, to 16 bits.
    with without_autocast(q):
        return chosen(q, key, value, slots, score, real, sinks, delay, scale)


def is_compiled(q: Tensor, slots: Slots) -> bool:
    """Whether a step for queries like q [B, H, D], without gradients, is one or two calls of compiled code here.

    Else it is some dozens of PyTorch's operations. The same within `torch.compile`, which follows those.
    """
    if q.is_cuda:
        return is_available() and supports(q, slots)
    return q.device.type == "cpu" and q.dtype == slots.keys.dtype == torch.float32 and one_token.are_there()


def _fastest(q: Tensor, key: Tensor, value: Tensor, slots: Slots, score: Tensor | None, real: Tensor | None) -> str:
    if native.supports(q, key, value, slots, score, real):
        return "native"
    inputs = (q, key, value, slots.keys, slots.values, score)
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if not q.is_cuda or wants_gradient or not is_available():
        return "pytorch"
    return "triton" if supports(q, slots) else "pytorch"


def _check(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    score: Tensor | None,
    real: Tensor | None,
    sinks: int,
    delay: int,
) -> None:
    batch, kv_heads, count, dim = slots.keys.shape
    budget = slots.budget
    if q.dim() != 3 or q.shape[0] != batch or q.shape[2] != dim or q.shape[1] % kv_heads:
        raise ValueError(f"q must be [B, H, D] for slots {list(slots.keys.shape)}, not {list(q.shape)}.")
    for name, tensor, shape in (
        ("key", key, (batch, kv_heads, dim)),
        ("value", value, (batch, kv_heads, dim)),
        ("slots.values", slots.values, (batch, kv_heads, count, dim)),
        ("slots.seen", slots.seen, (batch,)),
        ("slots.scores", slots.scores, (batch, kv_heads, count)),
        ("slots.positions", slots.positions, (batch, kv_heads, budget)),
        ("score", score, (batch, kv_heads)),
        ("real", real, (batch,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, not {list(tensor.shape)}.")
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and q on {q.device}: move them to one device.")
    if real is not None and real.dtype != torch.bool:
        raise TypeError(f"real must be bool, not {real.dtype}.")
    if (slots.scores is None) != (slots.positions is None):
        raise ValueError("slots have scores and positions, or neither: give both for a store.")
    if budget and score is None:
        raise ValueError(f"score is missing: a store of {budget} slots needs the score of the leaving pair.")
    if slots.ring_size < 1:
        raise ValueError(f"slots.keys has {count} slots, a store of {budget} included: leave at least 1 for the ring.")
    if not 0 <= sinks <= budget and budget:
        raise ValueError(f"sinks must lie between 0 and the budget of {budget}, but there are {sinks}.")
    if not 0 <= delay <= slots.ring_size:
        raise ValueError(f"delay must lie between 0 and the ring's {slots.ring_size} slots, but is {delay}.")
