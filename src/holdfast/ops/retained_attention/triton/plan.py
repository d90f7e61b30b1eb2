"""What the kernels must know of `visible_until`, found on the device in O(Tk) time and memory per row.

A row is one KV head of one sequence. A key *outlives its window* where `visible_until[j] > j + window`: only such keys
are gathered for later queries. How long it outlives it is its *lifetime*. The keys that outlive their window are sorted
by (class, index), where class c holds lifetimes that are alike within a factor of two. The keys of one class that a
query may see are then a contiguous run of that list: those that left their window at most the longest lifetime of the
class ago. So a tile of queries reads one run per class, of which a fixed share is alive whatever the budget, and a tile
of neighbours in the list is born and dies together, which bounds the queries that the gradient of its keys asks for.
Without a budget all keys live until the end and nothing in the runs is dead. Nothing is ever as long as T × kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.ops.retained_attention.triton import sizes
from holdfast.ops.retained_attention.triton.launch import NUMBERS, on_device

KEY_BLOCK = tl.constexpr(sizes.KEY_BLOCK)
CLASSES = tl.constexpr(sizes.CLASSES)
# Key blocks of one program.
_BLOCKS = tl.constexpr(8)
NUM_WARPS = 4


def make_plan(visible_until: Tensor, queries: int, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort the keys that outlive their window.

    Args:
        visible_until: int64 [B, Tk, Hkv]. queries: Tq, at least 1. window: in 0 … Tk.

    Returns:
        until: int32 [B·Hkv, Tk], `visible_until` clamped to −1 … Tk − 1.
        order: int32 [B·Hkv, Tk], the sorted keys; only the first offsets[row, CLASSES·blocks] are written. Empty
            where the window reaches over all keys.
        offsets: int32 [B·Hkv, (CLASSES + 1)·blocks + 1]: at c·blocks + n, how many of the sorted keys are of an earlier
            class, or of class c and before key n·KEY_BLOCK. The run behind the classes counts *cut* keys instead,
            those that queries lose inside the window.
        starts: int32 [B·Hkv, blocks]: the first key block that some query from n·KEY_BLOCK on sees.
    """
    batch, keys, kv_heads = visible_until.shape
    rows, blocks = batch * kv_heads, triton.cdiv(keys, sizes.KEY_BLOCK)
    device = visible_until.device
    until = torch.empty(rows, keys, dtype=torch.int32, device=device)
    order = torch.empty(rows, keys if window < keys - 1 else 0, dtype=torch.int32, device=device)
    counts = torch.zeros(rows, (sizes.CLASSES + 1) * blocks + 1, dtype=torch.int32, device=device)
    latest = torch.empty(rows, blocks, dtype=torch.int32, device=device)
    grid = (rows * triton.cdiv(blocks, _BLOCKS.value),)
    with on_device(visible_until):
        sizes_of = (queries, keys, kv_heads, window)
        count_kernel[grid](
            visible_until, *visible_until.stride(), until, counts, latest, *sizes_of, num_warps=NUM_WARPS
        )
        offsets = counts.cumsum(dim=1, dtype=torch.int32)
        if order.numel():
            sort_kernel[grid](until, offsets, order, queries, keys, window, num_warps=NUM_WARPS)
    first_query = torch.arange(0, keys, sizes.KEY_BLOCK, dtype=torch.int32, device=device).expand(rows, -1)
    starts = torch.searchsorted(latest.cummax(dim=1).values, first_query.contiguous(), out_int32=True)
    return until, order, offsets, starts


@triton.jit
def outlives(j, until, queries, keys, window):
    """Whether some query sees key j beyond its window; `until` is clamped to the last query."""
    return (until > j + window) & (until >= keys - queries)


@triton.jit
def _class_of(lifetime):
    """0 for 1 … 63 steps beyond the window, 1 up to 191, 2 up to 447, …: class c below KEY_BLOCK · (2^(c+1) − 1)."""
    steps = lifetime // KEY_BLOCK + 1
    found = tl.zeros_like(steps)
    for exponent in tl.static_range(1, CLASSES):
        found += (steps >= (1 << exponent)).to(tl.int32)
    return found


@triton.jit
def _classes(j, until, queries, keys, window):
    """The class of each key of a block; CLASSES where it has none."""
    alive = outlives(j, until, queries, keys, window) & (j < keys)
    return tl.where(alive, _class_of(tl.maximum(until - j - window, 0)), CLASSES)


@triton.jit
def _program_keys(keys):
    """Row, first key block, and the keys [_BLOCKS, KEY_BLOCK] of this program."""
    blocks = tl.cdiv(keys, KEY_BLOCK)
    programs = tl.cdiv(blocks, _BLOCKS)
    block = tl.program_id(0) % programs * _BLOCKS + tl.arange(0, _BLOCKS)
    return tl.program_id(0) // programs, block, block[:, None] * KEY_BLOCK + tl.arange(0, KEY_BLOCK)[None, :]


@triton.jit(do_not_specialize=NUMBERS)
def count_kernel(visible_until, stride_b, stride_t, stride_h, until, counts, latest, queries, keys, kv_heads, window):
    """Clamp `visible_until`, and count the keys of every class in every key block."""
    row, block, j = _program_keys(keys)
    blocks = tl.cdiv(keys, KEY_BLOCK)
    source = visible_until + (row // kv_heads).to(tl.int64) * stride_b + (row % kv_heads).to(tl.int64) * stride_h
    last = tl.load(source + j.to(tl.int64) * stride_t, mask=j < keys, other=-1)
    last = tl.minimum(tl.maximum(last, -1), keys - 1).to(tl.int32)
    tl.store(until + row.to(tl.int64) * keys + j, last, mask=j < keys)
    tl.store(latest + row.to(tl.int64) * blocks + block, tl.max(last, axis=1), mask=block < blocks)

    # One place later, so that the running sum says what lies before.
    target = counts + row.to(tl.int64) * ((CLASSES + 1) * blocks + 1) + block + 1
    found = _classes(j, last, queries, keys, window)
    for c in tl.static_range(CLASSES):
        tl.store(target + c * blocks, tl.sum((found == c).to(tl.int32), axis=1), mask=block < blocks)
    cut = (last < tl.minimum(j + window, keys - 1)) & (j < keys)
    tl.store(target + CLASSES * blocks, tl.sum(cut.to(tl.int32), axis=1), mask=block < blocks)


@triton.jit(do_not_specialize=NUMBERS)
def sort_kernel(until, offsets, order, queries, keys, window):
    """Write each key that outlives its window to its place."""
    row, block, j = _program_keys(keys)
    blocks = tl.cdiv(keys, KEY_BLOCK)
    last = tl.load(until + row.to(tl.int64) * keys + j, mask=j < keys, other=-1)
    found = _classes(j, last, queries, keys, window)
    source = offsets + row.to(tl.int64) * ((CLASSES + 1) * blocks + 1) + block
    place = tl.zeros_like(j)
    for c in tl.static_range(CLASSES):
        mine = (found == c).to(tl.int32)
        base = tl.load(source + c * blocks, mask=block < blocks, other=0)
        place += mine * (base[:, None] + tl.cumsum(mine, axis=1) - 1)
    tl.store(order + row.to(tl.int64) * keys + place, j, mask=found < CLASSES)
