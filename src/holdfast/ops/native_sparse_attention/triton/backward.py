"""The backward kernels: weights computed anew, no atomic additions, so the same inputs give the same bits.

The gradient of the queries takes the walk of the forward pass. The gradients of keys and values take tiles of keys over
the queries that see them: for a mean all later queries, divided among programs; for the keys of a block the users that
chose it, in segments of one length, because all users choose block 0 and few choose most others. What the programs of
one key found is added up in the order of the queries.
"""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.ops.native_sparse_attention.packing import ends_of
from holdfast.ops.native_sparse_attention.triton.launch import NUMBERS, Shape, options, strides
from holdfast.ops.native_sparse_attention.triton.segments import Segments
from holdfast.ops.native_sparse_attention.triton.tiles import (
    first_blocks,
    first_key,
    head_rows,
    index_before,
    keys_at,
    level_of,
    places_until,
    query_tile,
    users_of,
)
from holdfast.ops.retained_attention.triton.launch import on_device
from holdfast.ops.retained_attention.triton.sizes import Tile
from holdfast.ops.retained_attention.triton.tiles import add_keys, add_queries, load_rows, store_rows
from holdfast.ops.window_step.kernels import programs_of

# Parts of a gradient, each as large as the means themselves.
_MOST_SPLITS = 32


def run_query_gradient(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    lengths: Tensor | None,
    begins: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    shape: Shape,
    scale: float,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Gradient of q, and Σ out·grad_out fp32 [B, Tq, H]; tensors as in `run_attend`, grad_out and out contiguous."""
    listed = blocks is not None
    tile = shape.single(tile) if listed else tile
    dq, inner = torch.empty_like(q), torch.empty_like(log_sum)
    with on_device(q):
        query_gradient_kernel[(shape.programs(tile, single=listed),)](
            *(q, k, v, blocks, lengths, begins, out, grad_out, log_sum, inner, dq),
            *(scale, scale / math.log(2), *shape.numbers, *strides(k), *strides(v)),
            **shape.constants(tile, single=listed), **options(tile), LISTED=listed,
        )  # fmt: skip
    return dq, inner


@triton.jit(do_not_specialize=NUMBERS)
def query_gradient_kernel(
    q, k, v, blocks, lengths, begins, out, grad_out, log_sum, inner, dq, scale, scale_2, queries, keys, kv_heads,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    NUM_BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    PACKED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Tensors as in `run_query_gradient`."""
    row, position, last, i, _, index, real = query_tile(
        lengths, queries, keys, kv_heads, GROUPS, GROUP_BLOCK, CHUNKS, BLOCK_M, HAS_LENGTHS
    )
    q_tile = load_rows(q, index, DIM, real, DIM, BLOCK_DIM)
    grad_tile = load_rows(grad_out, index, VALUE_DIM, real, VALUE_DIM, BLOCK_VALUE)
    out_tile = load_rows(out, index, VALUE_DIM, real, VALUE_DIM, BLOCK_VALUE)
    mean = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), axis=1)
    tl.store(inner + index, mean, mask=real)
    level = level_of(log_sum, index, real)
    k = first_key(k, row, kv_heads, k_stride_b, k_stride_h, DIM)
    v = first_key(v, row, kv_heads, v_stride_b, v_stride_h, VALUE_DIM)
    if LISTED:
        blocks += users_of(row, position, queries, kv_heads) * NUM_BLOCKS

    total, begin = places_until(begins, last, NUM_BLOCKS, BLOCK_SIZE, PACKED, LISTED), 0
    if PACKED and not LISTED:
        first, begin = first_blocks(begins, i, last, BLOCK_SIZE)
    sums = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for start in range(begin, total, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        known = place < total
        j, seen_from = keys_at(place, known, blocks, BLOCK_SIZE, LISTED)
        known &= seen_from <= last
        seen = known[None, :] & (seen_from[None, :] <= i[:, None])
        if PACKED and not LISTED:
            seen &= place[None, :] >= first[:, None]
        k_tile = load_rows(k, j, k_stride_t * DIM, known, DIM, BLOCK_DIM).to(q_tile.dtype)
        v_tile = load_rows(v, j, v_stride_t * VALUE_DIM, known, VALUE_DIM, BLOCK_VALUE).to(q_tile.dtype)
        sums = add_keys(sums, q_tile, grad_tile, k_tile, v_tile, level, mean, seen, scale_2, True, "ieee")
    store_rows(dq, index, DIM, sums * scale, real, DIM, BLOCK_DIM)


def mean_splits(shape: Shape, tile: Tile, device: torch.device) -> int:
    """Among how many programs to divide the queries of a tile of means, of which there are few."""
    tiles = max(shape.rows * -(-shape.complete // tile.keys), 1)
    return max(1, min(programs_of(device) // tiles, _MOST_SPLITS))


def run_mean_gradient(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    begins: Tensor | None,
    log_sum: Tensor,
    inner: Tensor,
    shape: Shape,
    scale: float,
    tile: Tile,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of means k [B, M, Hkv, D] and v [B, M, Hkv, Dv] in their dtypes, the queries divided by `splits`."""
    if shape.complete == 0:
        return torch.zeros_like(k), torch.zeros_like(v)
    sizes = (splits, shape.batch, shape.complete, shape.kv_heads)
    dk, dv = (x.new_empty(*sizes, x.shape[3], dtype=torch.float32) for x in (k, v))
    tables = (None, None, None, None, None if begins is None else ends_of(begins))
    with on_device(q):
        key_gradient_kernel[(shape.rows * -(-shape.complete // tile.keys), splits)](
            *(q, k, v, lengths, grad_out, log_sum, inner, dk, dv, *tables),
            *(scale, scale / math.log(2), *shape.numbers, *strides(k), *strides(v), 0, 0),
            **shape.constants(tile), **options(tile), LISTED=False,
        )  # fmt: skip
    return dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)


def run_key_gradient(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    log_sum: Tensor,
    inner: Tensor,
    segments: Segments,
    shape: Shape,
    scale: float,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Gradients of the keys and values of chosen blocks, contiguous, in the shapes and dtypes of k and v."""
    shape, tile = replace(shape, packed=False), shape.within_block(tile)  # the table of users knows of packing
    dk_parts, dv_parts = (x.new_empty(segments.most, shape.block_size, x.shape[3], dtype=torch.float32) for x in (k, v))
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    tiles_of_block = -(-shape.block_size // tile.keys)
    with on_device(q):
        key_gradient_kernel[(segments.most, tiles_of_block)](
            *(q, k, v, lengths, grad_out, log_sum, inner, dk_parts, dv_parts),
            *(segments.order, segments.starts, segments.first, segments.owner, None),
            *(scale, scale / math.log(2), *shape.numbers, *strides(k), *strides(v), segments.size, shape.rows),
            **shape.constants(tile), **options(tile), LISTED=True,
        )  # fmt: skip
        sum_kernel[(shape.rows * shape.blocks, -(-shape.block_size // SUM_TILE.keys))](
            *(dk_parts, dv_parts, segments.first, dk, dv, shape.keys, shape.kv_heads),
            **sum_constants(shape), **options(SUM_TILE),
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=NUMBERS)
def key_gradient_kernel(
    q, k, v, lengths, grad_out, log_sum, inner, dk, dv, order, starts, first, owner, ends, scale, scale_2,
    queries, keys, kv_heads, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    segment_size, rows,
    NUM_BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    PACKED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Parts of dk and dv: [segments, S, D] if LISTED, of the users in one segment; else [splits, B, M, Hkv, D].

    ends [M], if PACKED: the first block behind the sequence of each block, whose queries are the last to see it.
    """
    STEP: tl.constexpr = BLOCK_M // GROUP_BLOCK
    if LISTED:
        if tl.load(owner + tl.program_id(0)) >= rows * tl.cdiv(keys, BLOCK_SIZE):
            return  # there are fewer segments than could be
        row, j, target, begin, end = _segment(starts, first, owner, keys, segment_size, BLOCK_SIZE, BLOCK_N)
        known, seen_from, step = target < (tl.program_id(0).to(tl.int64) + 1) * BLOCK_SIZE, j, STEP
        known &= j < keys
    else:
        row, j, target = _means(keys, kv_heads, BLOCK_SIZE, BLOCK_N)
        known, seen_from, step = j < keys // BLOCK_SIZE, (j + 1) * BLOCK_SIZE - 1, STEP * tl.num_programs(1)
    before = index_before(row, lengths, queries, keys, kv_heads, HAS_LENGTHS)
    if not LISTED:
        begin, end = tl.maximum(tl.min(seen_from, axis=0) - before, 0) + tl.program_id(1) * STEP, queries
    if PACKED and not LISTED:
        seen_until = tl.load(ends + j, mask=known, other=0).to(tl.int32) * BLOCK_SIZE
        end = tl.max(seen_until, axis=0)
    k = first_key(k, row, kv_heads, k_stride_b, k_stride_h, DIM)
    v = first_key(v, row, kv_heads, v_stride_b, v_stride_h, VALUE_DIM)
    k_tile = load_rows(k, j, k_stride_t * DIM, known, DIM, BLOCK_DIM)
    v_tile = load_rows(v, j, v_stride_t * VALUE_DIM, known, VALUE_DIM, BLOCK_VALUE)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_DIM], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_VALUE], tl.float32)
    for start in range(begin, end, step):
        place = start + tl.arange(0, BLOCK_M) // GROUP_BLOCK
        if LISTED:
            user = tl.load(order + place, mask=place < end, other=0) // NUM_BLOCKS
            number = user.to(tl.int32) // kv_heads % queries  # a division of 64 bits would be a call
        else:
            number = place
            user = users_of(row, number, queries, kv_heads)
        seen = known[:, None] & (seen_from[:, None] <= (before + number)[None, :])
        if PACKED and not LISTED:
            seen &= number[None, :] < seen_until[:, None]
        for chunk in tl.static_range(CHUNKS):
            index, real = head_rows(user, place < end, chunk, GROUPS, GROUP_BLOCK, BLOCK_M)
            q_tile = load_rows(q, index, DIM, real, DIM, BLOCK_DIM)
            grad_tile = load_rows(grad_out, index, VALUE_DIM, real, VALUE_DIM, BLOCK_VALUE)
            level = level_of(log_sum, index, real)
            mean = tl.load(inner + index, mask=real, other=0.0)
            dk_tile, dv_tile = add_queries(
                dk_tile, dv_tile, k_tile, v_tile, q_tile, grad_tile, level, mean, seen, scale_2, True, "ieee"
            )
    store_rows(dk, target, DIM, dk_tile * scale, known, DIM, BLOCK_DIM)
    store_rows(dv, target, VALUE_DIM, dv_tile, known, VALUE_DIM, BLOCK_VALUE)


@triton.jit
def _segment(starts, first, owner, keys, segment_size, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The row, the keys and their places among the parts, and the users of this program's segment."""
    segment, blocks = tl.program_id(0), tl.cdiv(keys, BLOCK_SIZE)
    block = tl.load(owner + segment).to(tl.int32)  # of all rows
    offset = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(starts + block) + (segment - tl.load(first + block)) * segment_size
    end = tl.minimum(begin + segment_size, tl.load(starts + block + 1))
    return block // blocks, block % blocks * BLOCK_SIZE + offset, segment.to(tl.int64) * BLOCK_SIZE + offset, begin, end


@triton.jit
def _means(keys, kv_heads, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The row, the means and their places among the parts of this program."""
    complete = keys // BLOCK_SIZE
    tiles = tl.cdiv(complete, BLOCK_N)
    row = tl.program_id(0) // tiles
    j = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tiles // kv_heads) + row // kv_heads
    return row, j, (batch * complete + j) * kv_heads + row % kv_heads


SUM_TILE = Tile(16, 16, 4, 1)


def sum_constants(shape: Shape) -> dict[str, int]:
    """Of the constants of a shape, those of `sum_kernel`."""
    needed = ("BLOCK_SIZE", "DIM", "BLOCK_DIM", "VALUE_DIM", "BLOCK_VALUE", "BLOCK_N")
    constants = shape.constants(SUM_TILE)
    return {name: constants[name] for name in needed}


@triton.jit(do_not_specialize=NUMBERS)
def sum_kernel(
    dk_parts, dv_parts, first, dk, dv, keys, kv_heads,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up the segments of one block into dk [B, Tk, Hkv, D] and dv [B, Tk, Hkv, Dv]."""
    blocks = tl.cdiv(keys, BLOCK_SIZE)
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    offset = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = block * BLOCK_SIZE + offset
    known = (offset < BLOCK_SIZE) & (j < keys)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_DIM], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_VALUE], tl.float32)
    for segment in range(tl.load(first + tl.program_id(0)), tl.load(first + tl.program_id(0) + 1)):
        source = offset.to(tl.int64) + segment * BLOCK_SIZE
        dk_tile += load_rows(dk_parts, source, DIM, known, DIM, BLOCK_DIM)
        dv_tile += load_rows(dv_parts, source, VALUE_DIM, known, VALUE_DIM, BLOCK_VALUE)
    target = ((row // kv_heads).to(tl.int64) * keys + j) * kv_heads + row % kv_heads
    store_rows(dk, target, DIM, dk_tile, known, DIM, BLOCK_DIM)
    store_rows(dv, target, VALUE_DIM, dv_tile, known, VALUE_DIM, BLOCK_VALUE)
