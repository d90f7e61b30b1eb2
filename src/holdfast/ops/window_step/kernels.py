"""The decoding step in Triton: one kernel attends, split over the slots, and one merges and writes the state.

The first kernel reads the slots as they were and attends over them as they will be: the new pair comes from its
arguments and the pair that enters the store from its old slot. Only the second writes, when nobody reads any more. So
two launches are enough, whatever the split, and no two programs meet in one slot.

All tensors are contiguous; `row` counts B·Hkv. Addresses are computed in 64 bits.
"""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.ops.window_step.slots import Slots

# The interpreter holds bfloat16 as integers and would multiply those. Products of halves are exact in float32.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
_LOG2_E = 1.4426950408889634
# Programs per multiprocessor that hide the latency of memory.
PROGRAMS = 2


@triton.jit
def _logits(query, k, EXACT: tl.constexpr):
    """query [G, D] · k [N, D] → fp32 [G, N]."""
    if EXACT:
        logits = tl.sum(query[:, None, :] * k[None, :, :], axis=2)
    elif _INTERPRETED:
        logits = tl.dot(query.to(tl.float32), tl.trans(k.to(tl.float32)))
    else:
        logits = tl.dot(query, tl.trans(k))
    return logits


@triton.jit
def _weighted(weights, v, EXACT: tl.constexpr):
    """weights fp32 [G, N] · v [N, D] → fp32 [G, D]."""
    if EXACT:
        mean = tl.sum(weights[:, :, None] * v[None, :, :], axis=1)
    elif _INTERPRETED:
        mean = tl.dot(weights, v.to(tl.float32))
    else:
        mean = tl.dot(weights.to(v.dtype), v)
    return mean


@triton.jit
def _leaving_score(score, scores, row, count, BUDGET: tl.constexpr, RING: tl.constexpr, DELAY: tl.constexpr, SINKS):
    """Score of the pair that leaves the window, the one that has just become final included."""
    own = tl.load(scores + row * (BUDGET + RING) + BUDGET + count % RING)
    if DELAY == RING:
        own = tl.load(score + row)
    return tl.where(count - RING < SINKS, float("inf"), own)


@triton.jit
def _target(scores, positions, own, row, count, BUDGET: tl.constexpr, BUDGET_BLOCK: tl.constexpr, RING: tl.constexpr):
    """Slot of the store that the leaving pair takes; −1 where it is forgotten."""
    n = tl.arange(0, BUDGET_BLOCK)
    stored = tl.load(scores + row * (BUDGET + RING) + n, mask=n < BUDGET, other=float("inf"))
    held = tl.load(positions + row * BUDGET + n, mask=n < BUDGET, other=-2)
    lowest = tl.min(stored, axis=0)
    # Of several lowest the latest goes; of several free slots any would do, and the first is taken.
    latest = tl.max(tl.where(stored == lowest, held, -2), axis=0)
    slot = tl.min(tl.where((stored == lowest) & (held == latest), n, BUDGET_BLOCK), axis=0)
    return tl.where((own > 0) & (own > lowest) & (count >= RING), slot, -1)


@triton.jit
def _rows(rows, new, source, held, is_new, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[len(source), BLOCK_DIM]: the rows that are held, 0 elsewhere, and the new row in its place."""
    d = tl.arange(0, BLOCK_DIM)
    known = (held & (is_new == 0))[:, None] & (d < DIM)[None, :]
    old = tl.load(rows + source[:, None] * DIM + d[None, :], mask=known, other=0.0)
    return tl.where(is_new[:, None], new[None, :], old)


@triton.jit
def _attend(
    query,
    new_key,
    new_value,
    keys,
    values,
    positions,
    row,
    split,
    count,
    new,
    target,
    scale,
    BUDGET: tl.constexpr,
    RING: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Mean [G, D] of the values in TILES tiles of slots, and the logarithm [G], base 2, of the sum of the weights."""
    place = (BUDGET + count % RING).to(tl.int32)
    highest = tl.full([query.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([query.shape[0]], tl.float32)
    mean = tl.zeros(query.shape, tl.float32)
    for tile in range(TILES):
        n = (split * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        held = (n >= BUDGET) & (n < BUDGET + RING) & (n - BUDGET < count + new)
        if BUDGET > 0:
            stored = tl.load(positions + row * BUDGET + n, mask=n < BUDGET, other=-1)
            held = held | (stored >= 0) | (n == target)
        is_new = (n == place) & (new > 0)
        source = row * (BUDGET + RING) + tl.where(n == target, place, n)
        k = _rows(keys, new_key, source, held, is_new, DIM, BLOCK_DIM)
        v = _rows(values, new_value, source, held, is_new, DIM, BLOCK_DIM)
        logits = _logits(query, k.to(query.dtype), EXACT) * scale
        logits = tl.where(held[None, :], logits, float("-inf"))
        rising = tl.maximum(highest, tl.max(logits, axis=1))
        base = tl.where(rising == float("-inf"), 0.0, rising)
        weights = tl.exp2(logits - base[:, None])
        decay = tl.exp2(highest - base)
        total = total * decay + tl.sum(weights, axis=1)
        mean = mean * decay[:, None] + _weighted(weights, v.to(query.dtype), EXACT)
        highest = rising

    empty = total == 0.0
    mean = mean / tl.where(empty, 1.0, total)[:, None]
    return mean, tl.where(empty, float("-inf"), highest + tl.log2(tl.where(empty, 1.0, total)))


@triton.jit
def attend_kernel(
    q,
    key,
    value,
    score,
    real,
    keys,
    values,
    seen,
    scores,
    positions,
    plan,
    parts,
    log_sums,
    kv_heads,
    sinks,
    scale,
    BUDGET: tl.constexpr,
    BUDGET_BLOCK: tl.constexpr,
    RING: tl.constexpr,
    DELAY: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    HAS_REAL: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One row's parts [rows, splits, G, D] and log_sums [rows, splits, G]; plan [rows, 2] gets `_target` and seen."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(seen + row // kv_heads)
    new = 1
    if HAS_REAL:
        new = tl.load(real + row // kv_heads).to(tl.int32)
    target = -1
    if BUDGET > 0:  # noqa: SIM102  # decided when compiling, the other when running
        if split * TILES * BLOCK_N < BUDGET:
            own = _leaving_score(score, scores, row, count, BUDGET, RING, DELAY, sinks)
            target = _target(scores, positions, own, row, count, BUDGET, BUDGET_BLOCK, RING)
            target = tl.where(new > 0, target, -1)
    if split == 0:
        tl.store(plan + 2 * row, target)
        tl.store(plan + 2 * row + 1, count)

    g, d = tl.arange(0, GROUP_BLOCK), tl.arange(0, BLOCK_DIM)
    heads = (g < GROUPS)[:, None] & (d < DIM)[None, :]
    query = tl.load(q + (row * GROUPS + g)[:, None] * DIM + d[None, :], mask=heads, other=0.0)
    new_key = tl.load(key + row * DIM + d, mask=d < DIM, other=0.0).to(keys.dtype.element_ty)
    new_value = tl.load(value + row * DIM + d, mask=d < DIM, other=0.0).to(values.dtype.element_ty)
    mean, log_sum = _attend(
        query, new_key, new_value, keys, values, positions, row, split, count, new, target, scale,
        BUDGET, RING, DIM, BLOCK_DIM, BLOCK_N, TILES, EXACT,
    )  # fmt: skip
    part = (row * tl.num_programs(1) + split) * GROUPS + g
    tl.store(parts + part[:, None] * DIM + d[None, :], mean, mask=heads)
    tl.store(log_sums + part, log_sum, mask=g < GROUPS)


@triton.jit
def _merge(
    parts,
    log_sums,
    out,
    row,
    GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
):
    """The mean of the parts of one row, each weighted by its sum, into out [B, H, D]."""
    g, d, s = tl.arange(0, GROUP_BLOCK), tl.arange(0, BLOCK_DIM), tl.arange(0, SPLIT_BLOCK)
    heads = (g < GROUPS)[:, None] & (d < DIM)[None, :]
    first = row * SPLITS * GROUPS
    known = (s < SPLITS)[:, None] & (g < GROUPS)[None, :]
    logs = tl.load(log_sums + first + s[:, None] * GROUPS + g[None, :], mask=known, other=float("-inf"))
    highest = tl.max(logs, axis=0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(logs - highest[None, :]), axis=0)
    mean = tl.zeros([GROUP_BLOCK, BLOCK_DIM], tl.float32)
    for split in range(SPLITS):
        part = first + split * GROUPS + g
        weight = tl.exp2(tl.load(log_sums + part, mask=g < GROUPS, other=float("-inf")) - highest)
        mean += weight[:, None] * tl.load(parts + part[:, None] * DIM + d[None, :], mask=heads, other=0.0)
    mean = mean / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + (row * GROUPS + g)[:, None] * DIM + d[None, :], mean.to(out.dtype.element_ty), mask=heads)


@triton.jit
def write_kernel(
    key,
    value,
    score,
    real,
    keys,
    values,
    seen,
    scores,
    positions,
    plan,
    parts,
    log_sums,
    out,
    kv_heads,
    sinks,
    BUDGET: tl.constexpr,
    RING: tl.constexpr,
    DELAY: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    HAS_REAL: tl.constexpr,
):
    """Merge the parts of one row into out [B, H, D] and write what the step changes in its slots."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_DIM)
    _merge(parts, log_sums, out, row, GROUPS, GROUP_BLOCK, DIM, BLOCK_DIM, SPLITS, SPLIT_BLOCK)
    target, count = tl.load(plan + 2 * row), tl.load(plan + 2 * row + 1)
    new = 1
    if HAS_REAL:
        new = tl.load(real + row // kv_heads).to(tl.int32)
    slots = row * (BUDGET + RING)
    ring = slots + BUDGET
    here = (ring + count % RING) * DIM + d
    if BUDGET > 0:
        old_key = tl.load(keys + here, mask=d < DIM)
        old_value = tl.load(values + here, mask=d < DIM)
        own = _leaving_score(score, scores, row, count, BUDGET, RING, DELAY, sinks)
        # Several threads may hold the same element, and none may read it after another has written it.
        tl.debug_barrier()
        enters = target >= 0
        there = (slots + target) * DIM + d
        tl.store(keys + there, old_key, mask=(d < DIM) & enters)
        tl.store(values + there, old_value, mask=(d < DIM) & enters)
        tl.store(scores + slots + target, own, mask=enters)
        tl.store(positions + row * BUDGET + target, (count - RING).to(tl.int32), mask=enters)
        final = (new > 0) & (count >= DELAY)
        tl.store(scores + ring + (count + RING - DELAY) % RING, tl.load(score + row), mask=final)
    written = (d < DIM) & (new > 0)
    tl.store(keys + here, tl.load(key + row * DIM + d, mask=d < DIM).to(keys.dtype.element_ty), mask=written)
    tl.store(values + here, tl.load(value + row * DIM + d, mask=d < DIM).to(values.dtype.element_ty), mask=written)
    if row % kv_heads == 0:
        tl.store(seen + row // kv_heads, count + new)


def step(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    score: Tensor | None,
    real: Tensor | None,
    sinks: int,
    delay: int,
    scale: float,
    programs: int | None = None,
) -> Tensor:
    """`window_step` of contiguous tensors; `programs` to spread the slots over, None: as many as the device hides."""
    out = torch.empty_like(q)
    if q.numel() == 0:
        return out
    batch, kv_heads, _, dim = slots.keys.shape
    rows, groups = batch * kv_heads, q.shape[1] // kv_heads
    tile = tile_size(q.dtype, dim, groups)
    tiles, splits = split(slots.keys.shape[2], tile, rows, programs or programs_of(q.device))
    plan = slots.seen.new_empty(rows, 2)
    parts = q.new_empty(rows, splits, groups, dim, dtype=torch.float32)
    log_sums = q.new_empty(rows, splits, groups, dtype=torch.float32)
    shared = constants(slots.budget, slots.ring_size, delay, groups, dim, real is not None, q.dtype == torch.float32)
    attends = {
        "BLOCK_N": tile,
        "TILES": tiles,
        "EXACT": q.dtype == torch.float32,
        "BUDGET_BLOCK": padded(slots.budget, 1),
    }
    state = (slots.keys, slots.values, slots.seen, slots.scores, slots.positions)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        attend_kernel[rows, splits](
            *(q, key, value, score, real, *state, plan, parts, log_sums),
            *(kv_heads, sinks, scale * _LOG2_E),
            **shared,
            **attends,
            **ATTEND_OPTIONS,
        )
        write_kernel[(rows,)](
            *(key, value, score, real, *state, plan, parts, log_sums, out, kv_heads, sinks),
            **shared,
            SPLITS=splits,
            SPLIT_BLOCK=padded(splits, 1),
            **WRITE_OPTIONS,
        )
    return out


ATTEND_OPTIONS = {"num_warps": 4, "num_stages": 2}
WRITE_OPTIONS = {"num_warps": 8, "num_stages": 1}


def padded(size: int, least: int = 16) -> int:
    """The next power of two, as blocks must be, at least `least`."""
    return max(least, triton.next_power_of_2(size))


def tile_size(dtype: torch.dtype, dim: int, groups: int) -> int:
    """Slots per tile: as many as the registers hold. Exact products of float32 are all held at once."""
    if dtype == torch.float32:
        return max(2, min(64, 4096 // (padded(dim) * padded(groups, 1))))
    return max(16, min(64, 8192 // padded(dim)))


def split(slots: int, tile: int, rows: int, programs: int) -> tuple[int, int]:
    """Tiles per program and programs per row, so that about `programs` run at once."""
    tiles = triton.cdiv(slots, tile)
    each = triton.cdiv(tiles, max(1, programs // rows))
    return each, triton.cdiv(tiles, each)


@functools.cache
def programs_of(device: torch.device) -> int:
    """How many programs are to run at once on this device."""
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def constants(budget: int, ring: int, delay: int, groups: int, dim: int, has_real: bool, exact: bool) -> dict[str, Any]:
    """What the step's kernels are compiled for; `exact`: with the products of float32."""
    return {
        "BUDGET": budget,
        "RING": ring,
        "DELAY": delay,
        "GROUPS": groups,
        "GROUP_BLOCK": padded(groups, 1 if exact else 16),
        "DIM": dim,
        "BLOCK_DIM": padded(dim),
        "HAS_REAL": has_real,
    }
