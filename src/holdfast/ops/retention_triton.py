"""The streaming store in Triton: one program per sequence and head, the store in registers, key after key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.ops.kernels import ShippedKernel

# `visible_until` of a key that was never forgotten, as in holdfast.ops.retention.
_FOREVER = 1 << 62


@triton.jit
def store_kernel(
    scores,
    starts,
    until,
    stride_b,
    stride_t,
    stride_h,
    length,
    heads,
    window,
    sinks,
    BUDGET: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """until int64 [B, T, Hkv], filled with FOREVER, from scores [B, T, Hkv] by strides and starts bool [B, T].

    Every element is written once at most: when its key is forgotten.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    scores += batch * stride_b + head * stride_h
    until += batch * length * heads + head
    n = tl.arange(0, BLOCK)
    # The padding is never the lowest, or only among slots that nothing can take.
    vacant = tl.where(n < BUDGET, float("-inf"), float("inf")).to(scores.dtype.element_ty)
    nobody = tl.where(n < BUDGET, -1, -2)
    stored, held = vacant, nobody
    lowest = tl.min(vacant, axis=0)
    zero = row * 0
    begin = zero
    for index in range(length):
        j = zero + index
        if HAS_STARTS:  # noqa: SIM102  # decided when compiling, the other when running
            if tl.load(starts + batch * length + j):
                stored, held = vacant, nobody
                lowest = tl.min(vacant, axis=0)
                begin = j
        score = tl.load(scores + j * stride_t)
        score = tl.where(j - begin < sinks, float("inf"), score).to(scores.dtype.element_ty)
        forgotten = j
        if (score > 0) & (score > lowest):
            # Of several lowest the latest goes.
            latest = tl.max(tl.where(stored == lowest, held, -2), axis=0)
            slot = tl.min(tl.where((stored == lowest) & (held == latest), n, BLOCK), axis=0)
            stored = tl.where(n == slot, score, stored)
            held = tl.where(n == slot, j.to(tl.int32), held)
            lowest = tl.min(stored, axis=0)
            forgotten = latest.to(tl.int64)
        tl.store(until + forgotten * heads, j + window, mask=forgotten >= 0)


def run_store(scores: Tensor, budget: int, window: int, sinks: int, starts: Tensor | None) -> Tensor:
    """`streaming_retention` with a budget of at least 1; scores fp32 or fp64 [B, T, Hkv], any strides."""
    batch, length, heads = scores.shape
    until = torch.full(scores.shape, _FOREVER, dtype=torch.int64, device=scores.device)
    if scores.numel() == 0:
        return until
    with torch.cuda.device(scores.device) if scores.is_cuda else nullcontext():
        store_kernel[(batch * heads,)](
            scores,
            None if starts is None else starts.contiguous(),
            until,
            *scores.stride(),
            *(length, heads, window, sinks),
            BUDGET=budget,
            BLOCK=triton.next_power_of_2(budget),
            HAS_STARTS=starts is not None,
            num_warps=_warps(budget),
            num_stages=1,
        )
    return until


def _warps(budget: int) -> int:
    """One warp needs no barrier to find the lowest; it holds 16 slots per thread, then more warps share them."""
    return min(16, max(1, triton.next_power_of_2(budget) // 512))


def shipped_kernels() -> Iterator[ShippedKernel]:
    """The store of published models, a large one, and that of packed sequences."""
    numbers = ("stride_b", "stride_t", "stride_h", "length", "heads", "window", "sinks")
    for budget in (512, 4096):
        for packed in (False, True):
            constants = {"BUDGET": budget, "BLOCK": budget, "HAS_STARTS": packed} | ({} if packed else {"starts": None})
            signature = {"scores": "*fp32", "until": "*i64", **dict.fromkeys(numbers, "i32")}
            if packed:
                signature = {"scores": "*fp32", "starts": "*i1", "until": "*i64", **dict.fromkeys(numbers, "i32")}
            name = f"streaming_retention/{'packed' if packed else 'plain'}/fp32/budget {budget}"
            yield ShippedKernel(name, store_kernel, signature, constants, num_warps=_warps(budget), num_stages=1)
