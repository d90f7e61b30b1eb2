"""The forward pass: one program per tile of queries, one softmax over the far keys and those in the window."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.ops.retained_attention.triton.launch import NUMBERS, Plan, Shape, launch_options, on_device
from holdfast.ops.retained_attention.triton.sizes import Tile
from holdfast.ops.retained_attention.triton.tiles import (
    attend,
    far_keys,
    far_runs,
    load_rows,
    near_tiles,
    pairs_of,
    plan_of,
    query_rows,
    query_tile,
    skip,
    store_rows,
    visible,
)


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, window: int, scale: float, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Output [B, Tq, H, Dv] in the dtype of q, and base-2 log-sum-exp fp32 [B, Tq, H], +∞ where a query sees nothing.

    q, k and v are contiguous, and no size is 0.
    """
    shape = Shape.of(q, k, v, plan)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    log_sum = q.new_empty(q.shape[:3], dtype=torch.float32)
    options = launch_options(shape, tile)
    with on_device(q):
        grid = (shape.rows * shape.query_tiles(tile),)
        forward_kernel[grid](q, k, v, out, log_sum, *plan, scale / math.log(2), *shape.numbers, window, **options)
    return out, log_sum


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    q, k, v, out, log_sum, until, order, offsets, starts, scale, queries, keys, kv_heads, window,
    GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_UNTIL: tl.constexpr, HAS_FAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tensors as in `forward`; the scale turns products into base-2 logarithms of weights."""
    row, position, last = query_tile(queries, keys, GROUP_BLOCK, BLOCK_M)
    first = keys - queries + position
    number, index, real = query_rows(row, position, queries, kv_heads, GROUPS, GROUP_BLOCK, BLOCK_M)
    i = keys - queries + number
    q_tile = load_rows(q, index, DIM, real, DIM, BLOCK_DIM)
    k += pairs_of(row, keys, kv_heads) * DIM
    v += pairs_of(row, keys, kv_heads) * VALUE_DIM
    until, order, offsets, starts = plan_of(row, until, order, offsets, starts, keys, HAS_UNTIL)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_VALUE], tl.float32)
    if HAS_FAR:
        begin, end, shift = far_runs(first, offsets, keys, window)
        for n in range(0, tl.max(end, axis=0), BLOCK_N):
            j, known = far_keys(n + tl.arange(0, BLOCK_N), begin, end, shift, order)
            known &= j < first - window
            seen = visible(i, j, known, until, window, HAS_UNTIL)
            k_tile = load_rows(k, j, kv_heads * DIM, known, DIM, BLOCK_DIM)
            v_tile = load_rows(v, j, kv_heads * VALUE_DIM, known, VALUE_DIM, BLOCK_VALUE)
            highest, total, sums = attend(highest, total, sums, q_tile, k_tile, v_tile, seen, scale, True, PRECISION)
    start, tiles, begin, end = near_tiles(first, last, offsets, starts, keys, window, BLOCK_N, HAS_UNTIL)
    for n in range(0, tiles - (end - begin)):
        j = start + skip(n, begin, end) * BLOCK_N + tl.arange(0, BLOCK_N)
        known = j <= last
        seen = visible(i, j, known, until, window, HAS_UNTIL)
        k_tile = load_rows(k, j, kv_heads * DIM, known, DIM, BLOCK_DIM)
        v_tile = load_rows(v, j, kv_heads * VALUE_DIM, known, VALUE_DIM, BLOCK_VALUE)
        highest, total, sums = attend(highest, total, sums, q_tile, k_tile, v_tile, seen, scale, True, PRECISION)
    for n in range(begin, end):
        j = start + n * BLOCK_N + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, j, kv_heads * DIM, j <= last, DIM, BLOCK_DIM)
        v_tile = load_rows(v, j, kv_heads * VALUE_DIM, j <= last, VALUE_DIM, BLOCK_VALUE)
        highest, total, sums = attend(highest, total, sums, q_tile, k_tile, v_tile, None, scale, False, PRECISION)

    sees = total > 0
    store_rows(out, index, VALUE_DIM, sums / tl.where(sees, total, 1.0)[:, None], real, VALUE_DIM, BLOCK_VALUE)
    tl.store(log_sum + index, tl.where(sees, highest + tl.log2(tl.where(sees, total, 1.0)), float("inf")), mask=real)
