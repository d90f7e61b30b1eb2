"""The forward kernels: attention over means or chosen blocks, and the choice of the blocks."""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.ops.native_sparse_attention.triton.launch import NUMBERS, Shape, options, strides
from holdfast.ops.native_sparse_attention.triton.tiles import (
    NOWHERE,
    first_blocks,
    first_key,
    head_rows,
    keys_at,
    merged_level,
    places_until,
    query_tile,
    users_of,
)
from holdfast.ops.retained_attention.triton.launch import on_device
from holdfast.ops.retained_attention.triton.sizes import Tile, padded
from holdfast.ops.retained_attention.triton.tiles import attend, dot, load_rows, store_rows


@dataclass(frozen=True)
class Splits:
    """How the places of a query are divided among programs, `each` a whole number of tiles."""

    each: int
    count: int = 1
    window: int = 0
    """Programs for the keys in the window, behind the `count` for means or chosen blocks."""


def run_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    lengths: Tensor | None,
    begins: Tensor | None,
    shape: Shape,
    scale: float,
    tile: Tile,
    splits: Splits | None = None,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention over the means of complete blocks, or over the keys of chosen ones and those of a window.

    Args:
        q: [B, Tq, H, D], contiguous. k, v: as `by_rows` returns them; means where `blocks` is None.
        blocks: int64 [B, Tq, Hkv, n], rising, −1 where fewer exist.
        begins: int64 [M], the first block of the sequence of each block, where sequences are packed; without splits.
        splits: None: none, and the output is in the dtype of q.

    Returns:
        Output fp32 [splits, B, Tq, H, Dv] and base-2 log-sum-exp fp32 [splits, B, Tq, H], −∞ where nothing is seen.
        Without splits, the same without the first dimension.
    """
    listed = blocks is not None
    tile = shape.single(tile) if listed else tile
    count = 1 if splits is None else splits.count + splits.window
    leading = () if splits is None else (count,)
    out = q.new_empty(*leading, *q.shape[:3], shape.value_dim, dtype=None if splits is None else torch.float32)
    log_sum = q.new_empty(*leading, *q.shape[:3], dtype=torch.float32)
    each = 1 << 30 if splits is None else splits.each
    grid = (shape.programs(tile, single=listed), count)
    with on_device(q):
        attend_kernel[grid](
            *(q, k, v, blocks, lengths, begins, out, log_sum),
            *(scale / math.log(2), *shape.numbers, shape.users * shape.groups),
            *(*strides(k), *strides(v), each, count if splits is None else splits.count, window),
            **shape.constants(tile, single=listed), **options(tile),
            LISTED=listed, HAS_WINDOW=splits is not None and splits.window > 0,
        )  # fmt: skip
    return out, log_sum


@triton.jit(do_not_specialize=NUMBERS)
def attend_kernel(
    q, k, v, blocks, lengths, begins, out, log_sum, scale, queries, keys, kv_heads, size,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h, each, listed, window,
    NUM_BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    PACKED: tl.constexpr, LISTED: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Tensors as in `run_attend`; LISTED: the program has one query, whose blocks are given; size = B·Tq·H."""
    row, position, last, i, _, index, real = query_tile(
        lengths, queries, keys, kv_heads, GROUPS, GROUP_BLOCK, CHUNKS, BLOCK_M, HAS_LENGTHS
    )
    q_tile = load_rows(q, index, DIM, real, DIM, BLOCK_DIM)
    k = first_key(k, row, kv_heads, k_stride_b, k_stride_h, DIM)
    v = first_key(v, row, kv_heads, v_stride_b, v_stride_h, VALUE_DIM)
    if LISTED:
        blocks += users_of(row, position, queries, kv_heads) * NUM_BLOCKS

    split = tl.program_id(1)
    begin, total = split * each, places_until(begins, last, NUM_BLOCKS, BLOCK_SIZE, PACKED, LISTED)
    in_blocks = total
    if HAS_WINDOW:
        recent = split >= listed
        begin = tl.where(recent, split - listed, split) * each
        total = tl.where(recent, tl.minimum(window, tl.maximum(last + 1, 0)), total)
        in_blocks = tl.where(recent, 0, total)
    if PACKED and not LISTED:
        first, begin = first_blocks(begins, i, last, BLOCK_SIZE)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_of_weights = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_VALUE], tl.float32)
    for start in range(begin, tl.minimum(total, begin + each), BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        known = place < total
        j, seen_from = keys_at(place, place < in_blocks, blocks, BLOCK_SIZE, LISTED)
        if HAS_WINDOW:
            j = tl.where(recent, last + 1 - total + place, j)
            seen_from = j
        known &= seen_from <= last
        seen = known[None, :] & (seen_from[None, :] <= i[:, None])
        if PACKED and not LISTED:
            seen &= place[None, :] >= first[:, None]
        k_tile = load_rows(k, j, k_stride_t * DIM, known, DIM, BLOCK_DIM).to(q_tile.dtype)
        v_tile = load_rows(v, j, v_stride_t * VALUE_DIM, known, VALUE_DIM, BLOCK_VALUE).to(q_tile.dtype)
        highest, sum_of_weights, sums = attend(
            highest, sum_of_weights, sums, q_tile, k_tile, v_tile, seen, scale, True, "ieee"
        )

    index += split.to(tl.int64) * size
    sees = sum_of_weights > 0
    divisor = tl.where(sees, sum_of_weights, 1.0)
    store_rows(out, index, VALUE_DIM, sums / divisor[:, None], real, VALUE_DIM, BLOCK_VALUE)
    tl.store(log_sum + index, tl.where(sees, highest + tl.log2(divisor), float("-inf")), mask=real)


def run_choose(
    q: Tensor,
    k: Tensor,
    log_sums: Tensor,
    lengths: Tensor | None,
    begins: Tensor | None,
    shape: Shape,
    scale: float,
    tile: Tile,
    splits: int = 1,
) -> Tensor:
    """The chosen blocks int64 [B, Tq, Hkv, n], in rising order, −1 where fewer exist.

    Args:
        q, k, begins: queries and means of keys as in `run_attend`. log_sums: its second result.
    """
    blocks = q.new_empty(*q.shape[:2], shape.kv_heads, shape.num_blocks, dtype=torch.int64)
    group_block = shape.group_block(tile)
    grid = (shape.rows * -(-shape.queries // (tile.queries // group_block)),)
    constants = {name: value for name, value in shape.constants(tile).items() if "VALUE" not in name}
    with on_device(q):
        choose_kernel[grid](
            *(q, k, log_sums, lengths, begins, blocks),
            *(scale / math.log(2), *shape.numbers, shape.users * shape.groups),
            *(*strides(k), splits),
            **constants, **options(tile), CHOICE_BLOCK=padded(shape.num_blocks, 2),
        )  # fmt: skip
    return blocks


@triton.jit(do_not_specialize=NUMBERS)
def choose_kernel(
    q, k, log_sums, lengths, begins, blocks, scale, queries, keys, kv_heads, size,
    k_stride_b, k_stride_t, k_stride_h, splits,
    NUM_BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr, CHOICE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Tensors as in `run_choose`. Holds the best blocks so far while it computes the importance of all."""
    STEP: tl.constexpr = BLOCK_M // GROUP_BLOCK
    row, position, last, i, user, index, real = query_tile(
        lengths, queries, keys, kv_heads, GROUPS, GROUP_BLOCK, 1, BLOCK_M, HAS_LENGTHS
    )
    k = first_key(k, row, kv_heads, k_stride_b, k_stride_h, DIM)
    q_tile = load_rows(q, index, DIM, real, DIM, BLOCK_DIM)
    level = merged_level(log_sums, index, real, size, splits)
    query = position + tl.arange(0, STEP)
    index_of_query = last - tl.minimum(position + STEP, queries) + 1 + query
    first, begin = tl.zeros([STEP], tl.int32), 0
    if PACKED:
        first, begin = first_blocks(begins, index_of_query, last, BLOCK_SIZE)
    slot = tl.arange(0, CHOICE_BLOCK)
    # What is vacant counts as less than nothing; the padding is never the least.
    vacant = tl.where(slot < NUM_BLOCKS, -1.0, float("inf"))
    best = tl.zeros([STEP, CHOICE_BLOCK], tl.float32) + vacant[None, :]
    chosen = tl.full([STEP, CHOICE_BLOCK], NOWHERE, tl.int32)
    for start in range(begin, tl.cdiv(tl.maximum(last + 1, 0), BLOCK_SIZE), BLOCK_N):
        m = start + tl.arange(0, BLOCK_N)
        seen_from = (m + 1) * BLOCK_SIZE - 1
        k_tile = load_rows(k, m, k_stride_t * DIM, seen_from <= last, DIM, BLOCK_DIM).to(q_tile.dtype)
        importance = tl.zeros([STEP, BLOCK_N], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            if CHUNKS > 1:
                index, real = head_rows(user, i <= last, chunk, GROUPS, GROUP_BLOCK, BLOCK_M)
                q_tile = load_rows(q, index, DIM, real, DIM, BLOCK_DIM)
                level = merged_level(log_sums, index, real, size, splits)
            weights = tl.exp2(dot(q_tile, tl.trans(k_tile), None, "ieee") * scale - level[:, None])
            weights = tl.where(seen_from[None, :] <= i[:, None], weights, 0.0)
            importance += tl.sum(tl.reshape(weights, [STEP, GROUP_BLOCK, BLOCK_N]), axis=1)
        ranked = _ranked(importance, m, index_of_query, first, BLOCK_SIZE)
        best, chosen = _keep_best(best, chosen, ranked, m, slot)

    chosen = tl.sort(chosen, 1)
    target = blocks + users_of(row, query, queries, kv_heads)[:, None] * NUM_BLOCKS + slot[None, :]
    known = (query < queries)[:, None] & (slot < NUM_BLOCKS)[None, :]
    tl.store(target, tl.where(chosen == NOWHERE, -1, chosen).to(tl.int64), mask=known)


@triton.jit
def _ranked(importance, m, i, first, BLOCK_SIZE: tl.constexpr):
    """Importance [queries, blocks], where the sequence's first, the previous and the own block lead; others nowhere."""
    own = tl.maximum(i, 0) // BLOCK_SIZE
    back = own[:, None] - m[None, :]
    before = m[None, :] < first[:, None]
    importance = tl.where(m[None, :] == first[:, None], 1e20, importance)
    importance = tl.where(back == 1, 1e30, importance)
    importance = tl.where(back == 0, float("inf"), importance)
    return tl.where((back < 0) | before | (i < 0)[:, None], -2.0, importance)


@triton.jit
def _keep_best(best, chosen, importance, m, slot):
    """While one of the blocks m beats the least of the best, it takes its place."""
    improving = 1
    while improving > 0:
        top, least = tl.max(importance, axis=1), tl.min(best, axis=1)
        better = top > least
        block = tl.min(tl.where(importance == top[:, None], m[None, :], NOWHERE), axis=1)
        place = tl.min(tl.where(best == least[:, None], slot[None, :], NOWHERE), axis=1)
        here = better[:, None] & (slot[None, :] == place[:, None])
        best = tl.where(here, top[:, None], best)
        chosen = tl.where(here, block[:, None], chosen)
        importance = tl.where(m[None, :] == block[:, None], -2.0, importance)
        improving = tl.max(better.to(tl.int32), axis=0)
    return best, chosen
