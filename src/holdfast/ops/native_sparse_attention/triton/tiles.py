"""What the kernels share: which queries a program has, which keys it walks over, and who sees whom.

A *row* is one key/value head of one sequence, a *user* a query with one key/value head, numbered over [B, Tq, Hkv]. The
G query heads of a user stand side by side in a tile of BLOCK_M rows, padded to GROUP_BLOCK; more than fit are CHUNKS
tiles. Queries, gates and outputs are contiguous; keys and means have strides, counted in rows of D elements.

Keys are walked over by *place*. LISTED: the place in the chosen blocks of one query, one behind the other. Else: the
number of a block, whose mean is the key. A mean is seen from the last query of its block on; PACKED: by the queries of
its own sequence, `begins` [M] being the first block of the sequence of each block.
"""

import triton
import triton.language as tl

NOWHERE = tl.constexpr(1 << 30)


@triton.jit
def index_before(row, lengths, queries, keys, kv_heads, HAS_LENGTHS: tl.constexpr):
    """What to add to the number of a query for its index; negative where a row is shorter than its queries."""
    end = tl.load(lengths + row // kv_heads).to(tl.int32) if HAS_LENGTHS else keys
    return end - queries


@triton.jit
def users_of(row, number, queries, kv_heads):
    """The users that are the queries `number` of the row."""
    return ((row // kv_heads).to(tl.int64) * queries + number) * kv_heads + row % kv_heads


@triton.jit
def head_rows(user, known, chunk, GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Index in [B·Tq·H] of each row of a tile, whose users are `user`, and whether it exists."""
    group = chunk * GROUP_BLOCK + tl.arange(0, BLOCK_M) % GROUP_BLOCK
    return user * GROUPS + group, known & (group < GROUPS)


@triton.jit
def query_tile(
    lengths, queries, keys, kv_heads,
    GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """The row of this program, the number of its first query and the index of its last; then, of each row of the tile,
    the index of its query, its user, its index in [B·Tq·H], and whether it exists.
    """
    STEP: tl.constexpr = BLOCK_M // GROUP_BLOCK
    tiles = tl.cdiv(queries, STEP)
    rest = tl.program_id(0) // tiles
    row = rest // CHUNKS
    # The last tiles see the most blocks, so they go first.
    position = (tiles - 1 - tl.program_id(0) % tiles) * STEP
    before = index_before(row, lengths, queries, keys, kv_heads, HAS_LENGTHS)
    number = position + tl.arange(0, BLOCK_M) // GROUP_BLOCK
    user = users_of(row, number, queries, kv_heads)
    index, real = head_rows(user, number < queries, rest % CHUNKS, GROUPS, GROUP_BLOCK, BLOCK_M)
    last = before + tl.minimum(position + STEP, queries) - 1
    return row, position, last, before + number, user, index, real


@triton.jit
def first_key(keys, row, kv_heads, stride_b, stride_h, WIDTH: tl.constexpr):
    """Where the row's keys of WIDTH elements begin."""
    batch, head = (row // kv_heads).to(tl.int64), (row % kv_heads).to(tl.int64)
    return keys + (batch * stride_b + head * stride_h) * WIDTH


@triton.jit
def first_blocks(begins, i, last, BLOCK_SIZE: tl.constexpr):
    """The first block of the sequence of each packed query of the index i <= last, and the least of these blocks."""
    first = tl.load(begins + i // BLOCK_SIZE, mask=i <= last, other=NOWHERE).to(tl.int32)
    return first, tl.min(first, axis=0)


@triton.jit
def places_until(
    begins, last, NUM_BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, PACKED: tl.constexpr, LISTED: tl.constexpr
):
    """How many places the query of the index `last` walks over."""
    seen = tl.maximum(last + 1, 0)
    if PACKED and LISTED:
        seen -= tl.load(begins + last // BLOCK_SIZE).to(tl.int32) * BLOCK_SIZE
    return tl.minimum(tl.cdiv(seen, BLOCK_SIZE), NUM_BLOCKS) * BLOCK_SIZE if LISTED else seen // BLOCK_SIZE


@triton.jit
def keys_at(place, known, blocks, BLOCK_SIZE: tl.constexpr, LISTED: tl.constexpr):
    """The key at each known place, and the index of the first query that sees it."""
    if LISTED:
        block = tl.load(blocks + place // BLOCK_SIZE, mask=known, other=0).to(tl.int32)
        key = block * BLOCK_SIZE + place % BLOCK_SIZE
        seen_from = key
    else:
        key = place
        seen_from = (place + 1) * BLOCK_SIZE - 1
    return key, seen_from


@triton.jit
def level_of(log_sum, index, real):
    """What to subtract from the scores of each row; +∞ where a query sees nothing, so that its weights are 0."""
    level = tl.load(log_sum + index, mask=real, other=float("-inf"))
    return tl.where(level == float("-inf"), float("inf"), level)


@triton.jit
def merged_level(log_sums, index, real, size, splits):
    """`level_of` a softmax whose keys were divided: log_sums [splits, size]."""
    level = tl.load(log_sums + index, mask=real, other=float("-inf"))
    for split in range(1, splits):
        other = tl.load(log_sums + size.to(tl.int64) * split + index, mask=real, other=float("-inf"))
        highest = tl.maximum(level, other)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        level = base + tl.log2(tl.exp2(level - base) + tl.exp2(other - base))
    return tl.where(level == float("-inf"), float("inf"), level)
