"""The backward pass: weights computed anew, no atomic additions, so the same inputs give the same bits.

Three launches. The gradient of the queries takes the walk of the forward pass. The gradients of keys and values take
tiles of keys over the queries that see them: first the keys that outlive their window, in the order of the plan, over
the queries behind their windows; then all keys over the queries of their windows, which adds to what the first wrote.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.ops.retained_attention.triton.launch import NUMBERS, Plan, Shape, launch_options, on_device
from holdfast.ops.retained_attention.triton.plan import outlives
from holdfast.ops.retained_attention.triton.sizes import Tiles
from holdfast.ops.retained_attention.triton.tiles import (
    CLASSES,
    KEY_BLOCK,
    add_keys,
    add_queries,
    far_keys,
    far_runs,
    last_query,
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


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    plan: Plan,
    window: int,
    scale: float,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the shapes and dtypes of q, k and v, which are contiguous, as is grad_out."""
    shape = Shape.of(q, k, v, plan)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    inner = torch.empty_like(log_sum)
    factors = (scale, scale / math.log(2))
    with on_device(q):
        tile = tiles.of_queries
        grid = (shape.rows * shape.query_tiles(tile),)
        query_gradient_kernel[grid](
            q,
            k,
            v,
            out,
            grad_out,
            log_sum,
            inner,
            dq,
            *plan,
            *factors,
            *shape.numbers,
            window,
            **launch_options(shape, tile),
        )
        tile = tiles.of_keys
        grid = (shape.rows * shape.key_tiles(tile),)
        for far in (True, False) if shape.has_far else (False,):
            key_gradient_kernel[grid](
                q, k, v, grad_out, log_sum, inner, dk, dv, *plan, *factors, *shape.numbers, window,
                **launch_options(shape, tile), FAR=far,
            )  # fmt: skip
    return dq, dk, dv


@triton.jit(do_not_specialize=NUMBERS)
def query_gradient_kernel(
    q, k, v, out, grad_out, log_sum, inner, dq, until, order, offsets, starts, scale, scale_2, queries, keys, kv_heads,
    window,
    GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_UNTIL: tl.constexpr, HAS_FAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tensors as in `backward`. Also writes inner = Σ out·grad_out, fp32 [B, Tq, H], for the keys' kernel."""
    row, position, last = query_tile(queries, keys, GROUP_BLOCK, BLOCK_M)
    first = keys - queries + position
    number, index, real = query_rows(row, position, queries, kv_heads, GROUPS, GROUP_BLOCK, BLOCK_M)
    i = keys - queries + number
    q_tile = load_rows(q, index, DIM, real, DIM, BLOCK_DIM)
    grad_tile = load_rows(grad_out, index, VALUE_DIM, real, VALUE_DIM, BLOCK_VALUE)
    out_tile = load_rows(out, index, VALUE_DIM, real, VALUE_DIM, BLOCK_VALUE)
    level = tl.load(log_sum + index, mask=real, other=float("inf"))
    mean = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), axis=1)
    tl.store(inner + index, mean, mask=real)
    k += pairs_of(row, keys, kv_heads) * DIM
    v += pairs_of(row, keys, kv_heads) * VALUE_DIM
    until, order, offsets, starts = plan_of(row, until, order, offsets, starts, keys, HAS_UNTIL)

    sums = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    if HAS_FAR:
        begin, end, shift = far_runs(first, offsets, keys, window)
        for n in range(0, tl.max(end, axis=0), BLOCK_N):
            j, known = far_keys(n + tl.arange(0, BLOCK_N), begin, end, shift, order)
            known &= j < first - window
            seen = visible(i, j, known, until, window, HAS_UNTIL)
            k_tile = load_rows(k, j, kv_heads * DIM, known, DIM, BLOCK_DIM)
            v_tile = load_rows(v, j, kv_heads * VALUE_DIM, known, VALUE_DIM, BLOCK_VALUE)
            sums = add_keys(sums, q_tile, grad_tile, k_tile, v_tile, level, mean, seen, scale_2, True, PRECISION)
    start, tiles, begin, end = near_tiles(first, last, offsets, starts, keys, window, BLOCK_N, HAS_UNTIL)
    for n in range(0, tiles - (end - begin)):
        j = start + skip(n, begin, end) * BLOCK_N + tl.arange(0, BLOCK_N)
        known = j <= last
        seen = visible(i, j, known, until, window, HAS_UNTIL)
        k_tile = load_rows(k, j, kv_heads * DIM, known, DIM, BLOCK_DIM)
        v_tile = load_rows(v, j, kv_heads * VALUE_DIM, known, VALUE_DIM, BLOCK_VALUE)
        sums = add_keys(sums, q_tile, grad_tile, k_tile, v_tile, level, mean, seen, scale_2, True, PRECISION)
    for n in range(begin, end):
        j = start + n * BLOCK_N + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, j, kv_heads * DIM, j <= last, DIM, BLOCK_DIM)
        v_tile = load_rows(v, j, kv_heads * VALUE_DIM, j <= last, VALUE_DIM, BLOCK_VALUE)
        sums = add_keys(sums, q_tile, grad_tile, k_tile, v_tile, level, mean, None, scale_2, False, PRECISION)
    store_rows(dq, index, DIM, sums * scale, real, DIM, BLOCK_DIM)


@triton.jit(do_not_specialize=NUMBERS)
def key_gradient_kernel(
    q, k, v, grad_out, log_sum, inner, dk, dv, until, order, offsets, starts, scale, scale_2, queries, keys, kv_heads,
    window,
    GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_UNTIL: tl.constexpr, HAS_FAR: tl.constexpr, PRECISION: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Tensors as in `backward`. FAR: of keys that outlive their window, what comes from the queries behind it."""
    tiles = tl.cdiv(keys, BLOCK_N)
    row = tl.program_id(0) // tiles
    until, order, offsets, starts = plan_of(row, until, order, offsets, starts, keys, HAS_UNTIL)
    j = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    known = j < keys
    if FAR:
        known = j < tl.load(offsets + CLASSES * tl.cdiv(keys, KEY_BLOCK))
        j = tl.load(order + j, mask=known, other=0)
    low, high, shared = _seen_by(j, known, until, queries, keys, window, HAS_UNTIL, HAS_FAR, FAR)
    begin, steps, whole, end = _query_tiles(low, high, queries, keys, BLOCK_M // GROUP_BLOCK)

    pairs = pairs_of(row, keys, kv_heads)
    k_tile = load_rows(k + pairs * DIM, j, kv_heads * DIM, known, DIM, BLOCK_DIM)
    v_tile = load_rows(v + pairs * VALUE_DIM, j, kv_heads * VALUE_DIM, known, VALUE_DIM, BLOCK_VALUE)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_DIM], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_VALUE], tl.float32)
    for n in range(0, steps - (end - whole)):
        position = begin + skip(n, whole, end) * (BLOCK_M // GROUP_BLOCK)
        number, index, real = query_rows(row, position, queries, kv_heads, GROUPS, GROUP_BLOCK, BLOCK_M)
        i = keys - queries + number
        seen = (low[:, None] <= i[None, :]) & (i[None, :] <= high[:, None])
        q_tile = load_rows(q, index, DIM, real, DIM, BLOCK_DIM)
        grad_tile = load_rows(grad_out, index, VALUE_DIM, real, VALUE_DIM, BLOCK_VALUE)
        level = tl.load(log_sum + index, mask=real, other=float("inf"))
        mean = tl.load(inner + index, mask=real, other=0.0)
        dk_tile, dv_tile = add_queries(
            dk_tile, dv_tile, k_tile, v_tile, q_tile, grad_tile, level, mean, seen, scale_2, True, PRECISION
        )
    for n in range(whole, end):
        position = begin + n * (BLOCK_M // GROUP_BLOCK)
        number, index, real = query_rows(row, position, queries, kv_heads, GROUPS, GROUP_BLOCK, BLOCK_M)
        q_tile = load_rows(q, index, DIM, real, DIM, BLOCK_DIM)
        grad_tile = load_rows(grad_out, index, VALUE_DIM, real, VALUE_DIM, BLOCK_VALUE)
        level = tl.load(log_sum + index, mask=real, other=float("inf"))
        mean = tl.load(inner + index, mask=real, other=0.0)
        dk_tile, dv_tile = add_queries(
            dk_tile, dv_tile, k_tile, v_tile, q_tile, grad_tile, level, mean, None, scale_2, False, PRECISION
        )

    dk_tile *= scale
    dk += pairs * DIM
    dv += pairs * VALUE_DIM
    if HAS_FAR and not FAR:
        dk_tile += load_rows(dk, j, kv_heads * DIM, shared, DIM, BLOCK_DIM).to(tl.float32)
        dv_tile += load_rows(dv, j, kv_heads * VALUE_DIM, shared, VALUE_DIM, BLOCK_VALUE).to(tl.float32)
    store_rows(dk, j, kv_heads * DIM, dk_tile, known, DIM, BLOCK_DIM)
    store_rows(dv, j, kv_heads * VALUE_DIM, dv_tile, known, VALUE_DIM, BLOCK_VALUE)


@triton.jit
def _seen_by(j, known, until, queries, keys, window, HAS_UNTIL: tl.constexpr, HAS_FAR: tl.constexpr, FAR: tl.constexpr):
    """First and last query that each key is asked for, and whether the other launch asks for more of it."""
    shared = known
    high = last_query(j, known, until, window, HAS_UNTIL)
    if FAR:
        low = j + window + 1
    else:
        low = j
        if HAS_FAR:
            shared = known & outlives(j, high, queries, keys, window)
        high = tl.minimum(high, j + window)
    return tl.where(known, low, keys), tl.minimum(high, keys - 1), shared


@triton.jit
def _query_tiles(low, high, queries, keys, STEP: tl.constexpr):
    """The tiles of STEP queries between the lowest `low` and the highest `high`.

    Returns the number of the first query, the number of tiles, and the run of tiles in which each key is seen by all.
    """
    before = keys - queries
    begin = tl.maximum(tl.min(low, axis=0), before)
    steps = tl.cdiv(tl.maximum(tl.max(high, axis=0) + 1 - begin, 0), STEP)
    whole = tl.minimum(tl.cdiv(tl.maximum(tl.max(low, axis=0) - begin, 0), STEP), steps)
    end = tl.maximum(tl.minimum(tl.maximum(tl.min(high, axis=0) + 1 - begin, 0) // STEP, steps), whole)
    return begin - before, steps, whole, end
