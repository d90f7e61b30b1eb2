"""The selected branch: every query reads its chosen blocks in full.

Three ways, of which the cheapest is taken: the keys of each query gathered (a few queries); all keys with a mask (where
the chosen blocks are a good part of all keys); block by block, all queries that chose a block at once (long sequences:
no key is copied, and the products are large).

Shape legend: R rows (key/value heads of sequences), G query heads per row, M blocks of S keys, D and V head dimensions,
n chosen blocks; in a tile, N rows, L queries and C keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.ops.flops import attention_flops, count_with, selected_pairs
from holdfast.ops.native_sparse_attention.by_block import by_block, by_block_backward
from holdfast.ops.native_sparse_attention.tiles import attend, attend_backward, most_scores, of_tile, tiles
from holdfast.ops.second_derivatives import refuse_in

# Up to this many queries, their keys are gathered.
_FEW_QUERIES = 16
# What visiting one block costs, whoever reads it, in scores computed.
_VISIT = 1 << 14


@torch.library.custom_op("holdfast::selected_attention", mutates_args=())
def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, blocks: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Attention over chosen blocks. A custom op, lest a compiler unroll the loops.

    Args:
        q: [R, Tq, G, D] in the dtype of the arithmetic, with the scale and 1/ln 2 in it.
        k: [R, M·S, D]. v: [R, M·S, V].
        positions: [R or 1, Tq], the index of each query, below M·S.
        blocks: int64 [R, Tq, n] in rising order, none after that of the query; −1: none.
        block_size: S.

    Returns:
        Output [R, Tq, G, V] and base-2 log-sum-exp [R, Tq, G]; 0 where a query sees nothing.
    """
    if (tiles_read := _tiles(q, k, positions, blocks, block_size)) is None:
        return by_block(q, k, v, positions, blocks, block_size)
    out, log_sum = _empty_outputs(q, k, v, positions, blocks, block_size)
    for tile in tiles_read:
        attended = attend(q[tile.queries], tile.read(k), tile.read(v), tile.hidden)
        out[tile.queries], log_sum[tile.queries] = attended[:2]
    return out, log_sum


@selected_attention.register_fake
def _empty_outputs(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, blocks: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3])


@torch.library.custom_op("holdfast::selected_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    blocks: Tensor,
    log_sum: Tensor,
    inner: Tensor,
    grad: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of `selected_attention`, in the dtype of q; inner [R, Tq, G] = ⟨output, its gradient⟩."""
    if (tiles_read := _tiles(q, k, positions, blocks, block_size)) is None:
        return by_block_backward(q, k, v, positions, blocks, log_sum, inner, grad, block_size)
    dq, dk, dv = (torch.zeros_like(x, dtype=q.dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
    for tile in tiles_read:
        of_queries = (x[tile.queries] for x in (log_sum, inner, grad))
        gradients = attend_backward(q[tile.queries], tile.read(k), tile.read(v), tile.hidden, *of_queries)
        dq[tile.queries] = gradients[0]
        tile.add(dk, gradients[1])
        tile.add(dv, gradients[2])
    return dq, dk, dv


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    blocks: Tensor,
    log_sum: Tensor,
    inner: Tensor,
    grad: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, positions, blocks, ctx.block_size = inputs
    ctx.save_for_backward(q, k, v, positions, blocks, *output)


def _differentiate(ctx: Any, grad: Tensor, _log_sum: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, positions, blocks, out, log_sum = ctx.saved_tensors
    inner = (out * grad).sum(-1)
    dq, dk, dv = _backward(q, k, v, positions, blocks, log_sum, inner, grad, ctx.block_size)
    return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


selected_attention.register_autograd(_differentiate, setup_context=_setup)
refuse_in("native_sparse_attention", "blocked", _backward)


def _flops(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, blocks: Tensor, *others: Any) -> int:
    """Of the forward pass; of the backward pass where it is given what that has more."""
    pairs = q.shape[2] * selected_pairs(positions, blocks, others[-1], k.shape[1])
    return attention_flops(pairs, q.shape[3], v.shape[2], backward=len(others) > 1)


count_with(_flops, selected_attention)
count_with(_flops, _backward)


def _tiles(
    q: Tensor, k: Tensor, positions: Tensor, blocks: Tensor, block_size: int
) -> "Iterator[_Gathered | _Masked] | None":
    """The tiles of queries; None where going block by block is cheaper."""
    if q.shape[1] <= _FEW_QUERIES or q.shape[0] == 0:
        return _gathered_tiles(q, positions, blocks, block_size)
    # With a mask, all blocks are read from the first chosen one to that of the query.
    reach = (positions // block_size + 1 - blocks[..., 0].clamp(min=0)).float().mean().item()
    of_block = q.shape[1] * q.shape[2] * block_size
    if of_block * reach <= of_block * blocks.shape[2] + _VISIT * (k.shape[1] // block_size):
        return _masked_tiles(q, k, positions, blocks, block_size)
    return None


@dataclass(frozen=True)
class _Gathered:
    """Queries, one in each row of the tile, and copies of the blocks that they read."""

    queries: tuple[Tensor, Tensor]  # [N, 1] each, their rows and numbers
    blocks: Tensor  # [N, n]
    block_size: int
    hidden: Tensor  # [N, 1, n·S]

    def read(self, keys: Tensor) -> Tensor:
        """[N, n·S, D] from [R, M·S, D]."""
        size, dim = self.block_size * keys.shape[2], keys.shape[2]
        if keys.stride()[1:] != (dim, 1) or keys.stride(0) % size:
            return keys.unflatten(1, (-1, self.block_size))[self.queries[0], self.blocks].flatten(1, 2)
        # Blocks as rows of one matrix, whose rows are copied whole; a cache has room between the rows of keys.
        step = keys.stride(0) // size
        matrix = keys.as_strided(((keys.shape[0] - 1) * step + keys.shape[1] // self.block_size, size), (size, 1))
        return matrix.index_select(0, (self.queries[0] * step + self.blocks).flatten()).view(len(self.blocks), -1, dim)

    def add(self, keys: Tensor, gradient: Tensor) -> None:
        """Add the gradient of what `read` returned to that of the keys."""
        by_block = gradient.unflatten(1, (-1, self.block_size))
        keys.unflatten(1, (-1, self.block_size)).index_put_((self.queries[0], self.blocks), by_block, accumulate=True)


def _gathered_tiles(q: Tensor, positions: Tensor, blocks: Tensor, block_size: int) -> Iterator[_Gathered]:
    rows, queries, groups, dim = q.shape
    number = torch.arange(rows * queries, device=q.device)[:, None]
    offset = torch.arange(block_size, device=q.device)
    at = positions.expand(rows, queries).reshape(-1, 1, 1)
    chosen = blocks.flatten(0, 1)
    size = max(1, 4 * most_scores(q.device) // (chosen.shape[1] * block_size * max(groups, dim)))
    for part in range(0, rows * queries, size):
        tile = slice(part, part + size)
        some = chosen[tile]
        keys = some[:, :, None] * block_size + offset
        hidden = ((some < 0)[:, :, None] | (keys > at[tile])).flatten(1).unsqueeze(1)
        yield _Gathered((number[tile] // queries, number[tile] % queries), some.clamp(min=0), block_size, hidden)


@dataclass(frozen=True)
class _Masked:
    """Queries side by side and all keys from the first chosen block up to the last of them."""

    queries: tuple[slice, slice]
    keys: tuple[slice, slice]
    hidden: Tensor  # [N, L, C]

    def read(self, keys: Tensor) -> Tensor:
        """[N, C, D] from [R, M·S, D]."""
        return keys[self.keys]

    def add(self, keys: Tensor, gradient: Tensor) -> None:
        """Add the gradient of what `read` returned to that of the keys."""
        keys[self.keys] += gradient


def _masked_tiles(q: Tensor, k: Tensor, positions: Tensor, blocks: Tensor, block_size: int) -> Iterator[_Masked]:
    for rows, queries in tiles(q, k.shape[1]):
        at, chosen = of_tile(positions, rows, queries), blocks[rows, queries]
        first = max(int(chosen[..., 0].min()), 0)
        count = max(int(at.max()) // block_size + 1 - first, 1)
        # Blocks that do not exist fall into a column behind, which is cut off.
        unread = torch.ones(*chosen.shape[:2], count + 1, dtype=torch.bool, device=q.device)
        unread.scatter_(2, torch.where(chosen < 0, count, chosen - first), False)
        key = slice(first * block_size, (first + count) * block_size)
        future = torch.arange(key.start, key.stop, device=q.device) > at.unsqueeze(2)
        hidden = unread[..., :count].repeat_interleave(block_size, dim=2) | future
        yield _Masked((rows, queries), (rows, key), hidden)
