"""What the attention kernels share: which rows a tile holds, which keys it walks over, which pairs are visible.

Queries are held as rows of BLOCK_M: the G query heads of a KV head, padded to GROUP_BLOCK, for consecutive queries.
All tensors are contiguous, [B, T, heads, D]. Addresses are computed in 64 bits.
"""

import os

import triton
import triton.language as tl

from holdfast.ops.retained_attention.triton import sizes

KEY_BLOCK = tl.constexpr(sizes.KEY_BLOCK)
CLASSES = tl.constexpr(sizes.CLASSES)
# The interpreter holds bfloat16 as integers and would multiply those. Products of halves are exact in float32.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b in fp32."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def load_rows(rows, index, stride, known, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[len(index), BLOCK] from rows of WIDTH elements; 0 where a row is not known and in the padding."""
    column = tl.arange(0, BLOCK)
    mask = known[:, None] if WIDTH == BLOCK else known[:, None] & (column < WIDTH)[None, :]
    return tl.load(rows + index.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(rows, index, stride, values, known, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_rows`."""
    column = tl.arange(0, BLOCK)
    mask = known[:, None] if WIDTH == BLOCK else known[:, None] & (column < WIDTH)[None, :]
    pointers = rows + index.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointers, values.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def query_tile(queries, keys, GROUP_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row, number of the first query, and index of the last one, of this program."""
    STEP: tl.constexpr = BLOCK_M // GROUP_BLOCK
    tiles = tl.cdiv(queries, STEP)
    # The last tiles see the most keys, so they go first.
    position = (tiles - 1 - tl.program_id(0) % tiles) * STEP
    return tl.program_id(0) // tiles, position, keys - queries + tl.minimum(position + STEP, queries) - 1


@triton.jit
def pairs_of(row, keys, kv_heads):
    """Index of the row's first key in [B·Tk·Hkv]."""
    return (row // kv_heads).to(tl.int64) * keys * kv_heads + row % kv_heads


@triton.jit
def plan_of(row, until, order, offsets, starts, keys, HAS_UNTIL: tl.constexpr):
    """The row's part of each table of the plan."""
    if HAS_UNTIL:
        row = row.to(tl.int64)
        until += row * keys
        order += row * keys
        offsets += row * ((CLASSES + 1) * tl.cdiv(keys, KEY_BLOCK) + 1)
        starts += row * tl.cdiv(keys, KEY_BLOCK)
    return until, order, offsets, starts


@triton.jit
def query_rows(
    row, position, queries, kv_heads, GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Each row of the tile that begins with query number `position`: its query, its index in [B·Tq·H], if it exists."""
    m = tl.arange(0, BLOCK_M)
    number, group = position + m // GROUP_BLOCK, m % GROUP_BLOCK
    token = (row // kv_heads).to(tl.int64) * queries + number
    index = (token * kv_heads + row % kv_heads) * GROUPS + group
    return number, index, (number < queries) & (group < GROUPS)


@triton.jit
def near_tiles(first, last, offsets, starts, keys, window, BLOCK_N: tl.constexpr, HAS_UNTIL: tl.constexpr):
    """The key tiles in the window of the queries first … last.

    Returns the first key, the number of tiles, and the run of tiles [begin, end) that every query sees whole.
    """
    start = tl.maximum(first - window, 0)
    if HAS_UNTIL:
        # Keys in front that nobody sees any more (pads, earlier documents) are not even read.
        start = tl.minimum(tl.maximum(start, tl.load(starts + first // KEY_BLOCK) * KEY_BLOCK), last + 1)
    total = tl.cdiv(last + 1 - start, BLOCK_N)
    begin = tl.minimum(tl.cdiv(tl.maximum(last - window - start, 0), BLOCK_N), total)
    end = tl.maximum(tl.minimum(tl.maximum(first + 1 - start, 0) // BLOCK_N, total), begin)
    if HAS_UNTIL:
        cut = offsets + CLASSES * tl.cdiv(keys, KEY_BLOCK)
        lost = tl.load(cut + first // KEY_BLOCK + 1) - tl.load(cut + tl.minimum(start, first) // KEY_BLOCK)
        end = tl.where(lost > 0, begin, end)
    return start, total, begin, end


@triton.jit
def far_runs(first, offsets, keys, window):
    """The runs of the sorted keys, one per class, that hold all keys a query from `first` on sees beyond its window.

    Returns their begin and end, as if they lay one behind the other, and what leads from there into the list.
    """
    c = tl.arange(0, CLASSES)
    blocks = tl.cdiv(keys, KEY_BLOCK)
    left = tl.maximum(first - window, 0)
    longest = tl.where(c == CLASSES - 1, keys, ((2 << c) - 1) * KEY_BLOCK)
    low = tl.load(offsets + c * blocks + tl.maximum(left - longest, 0) // KEY_BLOCK)
    high = tl.load(offsets + c * blocks + tl.cdiv(left, KEY_BLOCK))
    end = tl.cumsum(high - low, axis=0)
    begin = end - (high - low)
    return begin, end, low - begin


@triton.jit
def far_keys(place, begin, end, shift, order):
    """The keys at `place` in the runs, and whether there are any."""
    inside = (place[:, None] >= begin[None, :]) & (place[:, None] < end[None, :])
    known = place < tl.max(end, axis=0)
    return tl.load(order + place + tl.sum(tl.where(inside, shift[None, :], 0), axis=1), mask=known, other=0), known


@triton.jit
def last_query(j, known, until, window, HAS_UNTIL: tl.constexpr):
    """The last query that sees each key; −1 for keys that are not known."""
    return tl.load(until + j, mask=known, other=-1) if HAS_UNTIL else tl.where(known, j + window, -1)


@triton.jit
def visible(i, j, known, until, window, HAS_UNTIL: tl.constexpr):
    """[len(i), len(j)]: whether query i sees key j."""
    last = last_query(j, known, until, window, HAS_UNTIL)
    return (j[None, :] <= i[:, None]) & (i[:, None] <= last[None, :])


@triton.jit
def skip(n, begin, end):
    """The n-th tile that is not in begin … end − 1."""
    return tl.where(n < begin, n, n + end - begin)


@triton.jit
def attend(highest, total, sums, q_tile, k_tile, v_tile, seen, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the softmax that never holds more than a tile of scores (Milakov & Gimelshein, arXiv 1805.02867)."""
    scores = dot(q_tile, tl.trans(k_tile), None, PRECISION) * scale
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    risen = tl.maximum(highest, tl.max(scores, axis=1))
    # A query that has seen nothing yet must not subtract −∞ from −∞.
    level = tl.where(risen == float("-inf"), 0.0, risen) if MASKED else risen
    weights = tl.exp2(scores - level[:, None])
    shrink = tl.exp2(highest - level)
    total = total * shrink + tl.sum(weights, axis=1)
    sums = dot(weights.to(v_tile.dtype), v_tile, sums * shrink[:, None], PRECISION)
    return risen, total, sums


@triton.jit
def add_keys(
    sums, q_tile, grad_tile, k_tile, v_tile, level, mean, seen, scale_2, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """Add one tile of keys to the gradient of the queries."""
    weights = tl.exp2(dot(q_tile, tl.trans(k_tile), None, PRECISION) * scale_2 - level[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    grad_weights = dot(grad_tile, tl.trans(v_tile), None, PRECISION)
    grad_scores = weights * (grad_weights - mean[:, None])
    return dot(grad_scores.to(k_tile.dtype), k_tile, sums, PRECISION)


@triton.jit
def add_queries(
    dk_tile, dv_tile, k_tile, v_tile, q_tile, grad_tile, level, mean, seen, scale_2,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to the gradients of keys and values. Scores are transposed: [keys, queries]."""
    weights = tl.exp2(dot(k_tile, tl.trans(q_tile), None, PRECISION) * scale_2 - level[None, :])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    dv_tile = dot(weights.to(grad_tile.dtype), grad_tile, dv_tile, PRECISION)
    grad_weights = dot(v_tile, tl.trans(grad_tile), None, PRECISION)
    grad_scores = weights * (grad_weights - mean[None, :])
    dk_tile = dot(grad_scores.to(q_tile.dtype), q_tile, dk_tile, PRECISION)
    return dk_tile, dv_tile
