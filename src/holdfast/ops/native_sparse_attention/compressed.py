"""The compressed branch: attention over the means of complete blocks, and the choice of blocks that follows from it.

Shape legend: R rows (key/value heads of sequences), G query heads per row, M blocks, D and V head dimensions, n chosen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.ops.flops import attention_flops, compressed_pairs, count_with
from holdfast.ops.native_sparse_attention.tiles import attend, attend_backward, of_tile, tiles
from holdfast.ops.second_derivatives import refuse_in


@torch.library.custom_op("holdfast::compressed_attention", mutates_args=())
def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    begins: Tensor | None,
    keys: int,
    block_size: int,
    num_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over complete blocks, and the n most important blocks. A custom op, lest a compiler unroll the tiles.

    Args:
        q: [R, Tq, G, D] in the dtype of the arithmetic, with the scale and 1/ln 2 in it.
        k: [R, M, D], M = keys // S: means of blocks. v: [R, M, V].
        positions: [R or 1, Tq], the index of each query; at most keys − Tq + t, negative where it sees nothing.
        begins: int64 [M], rising: the first block of the sequence of each block, where Tq = keys; None: block 0.
        keys: how many keys the blocks were made of, those of the last and incomplete one included.

    Returns:
        Output [R, Tq, G, V]; base-2 log-sum-exp [R, Tq, G]; chosen blocks int64 [R, Tq, n], −1 where fewer exist.
    """
    out, log_sum, chosen = _empty_outputs(q, v, num_blocks)
    for tile in _tiles(q, positions, begins, keys, block_size):
        importance = q.new_zeros(tile.hidden.shape[0], tile.hidden.shape[1], 0)
        if tile.hidden.shape[2]:
            attended = attend(q[tile.queries], k[tile.blocks], v[tile.blocks], tile.hidden)
            out[tile.queries], log_sum[tile.queries], weights, total = attended
            importance = weights.div_(total).sum(dim=2)
        else:
            out[tile.queries], log_sum[tile.queries] = 0.0, 0.0
        chosen[tile.queries] = _choose(importance, tile, num_blocks)
    return out, log_sum, chosen


@compressed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(q, v, num_blocks=others[-1])


def _empty_outputs(q: Tensor, v: Tensor, num_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen = q.new_empty(*q.shape[:2], num_blocks, dtype=torch.int64)
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3]), chosen


@dataclass(frozen=True)
class _Tile:
    """Queries side by side and the blocks that some of them see or may choose."""

    queries: tuple[slice, slice]  # rows, and queries
    blocks: tuple[slice, slice]  # rows, and complete blocks
    hidden: Tensor  # [N or 1, L, complete] bool
    candidates: int  # the complete blocks and those behind them in which queries lie
    current: Tensor  # [N or 1, L, 1], among the candidates, the block in which each query lies; negative: sees nothing
    first: Tensor  # [N or 1, L, 1], the first block of its sequence


def _tiles(q: Tensor, positions: Tensor, begins: Tensor | None, keys: int, block_size: int) -> Iterator[_Tile]:
    for rows, queries in tiles(q, keys // block_size):
        at = of_tile(positions, rows, queries).unsqueeze(2)
        current = at // block_size
        first = torch.zeros_like(current) if begins is None else begins[current]
        start = 0 if begins is None else int(first.min())
        end = keys - q.shape[1] + queries.stop
        blocks = slice(start, max(start, end // block_size))
        number = torch.arange(blocks.start, blocks.stop, device=at.device)
        hidden = number >= (at + 1) // block_size
        if begins is not None:
            hidden |= number < first
        candidates = (end - 1) // block_size + 1 - start
        yield _Tile((rows, queries), (rows, blocks), hidden, candidates, current - start, first - start)


def _choose(importance: Tensor, tile: _Tile, num_blocks: int) -> Tensor:
    """The n most important candidates of a tile, [N, L, n] in rising order, −1 where fewer exist.

    `importance` [N, L, complete], below 2·G, is 0 for blocks that a query does not see.
    """
    rows, queries, complete = importance.shape
    count, current, first = tile.candidates, tile.current.expand(rows, queries, 1), tile.first
    ranked = torch.nn.functional.pad(importance, (0, count - complete))
    number = torch.arange(count, device=current.device)
    ranked.masked_fill_((number > current) | (number < first), -1.0)
    # The first, the previous, the current one; a later one takes the place of an earlier.
    for certain, rank in ((first, 1e20), (current - 1, 1e30), (current, torch.inf)):
        ranked.scatter_(2, torch.maximum(certain, first).expand_as(current), rank)
    best = ranked.topk(min(num_blocks, count), dim=2, sorted=False)
    chosen = best.indices.masked_fill_((best.values < 0) | (current < 0), count).sort(dim=2).values
    chosen = torch.where(chosen == count, -1, chosen + tile.blocks[1].start)
    return torch.nn.functional.pad(chosen, (0, max(0, num_blocks - count)), value=-1)


@torch.library.custom_op("holdfast::compressed_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    begins: Tensor | None,
    log_sum: Tensor,
    inner: Tensor,
    grad: Tensor,
    keys: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of `compressed_attention`, in the dtype of q."""
    dq, dk, dv = (torch.zeros_like(x, dtype=q.dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
    for tile in _tiles(q, positions, begins, keys, block_size):
        if tile.hidden.shape[2]:
            of_queries = (x[tile.queries] for x in (log_sum, inner, grad))
            gradients = attend_backward(q[tile.queries], k[tile.blocks], v[tile.blocks], tile.hidden, *of_queries)
            dq[tile.queries] = gradients[0]
            dk[tile.blocks] += gradients[1]
            dv[tile.blocks] += gradients[2]
    return dq, dk, dv


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    begins: Tensor | None,
    log_sum: Tensor,
    inner: Tensor,
    grad: Tensor,
    keys: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, positions, begins, ctx.keys, ctx.block_size, _ = inputs
    ctx.save_for_backward(q, k, v, positions, begins, *output[:2])


def _differentiate(ctx: Any, grad: Tensor, _log_sum: Tensor, _chosen: None) -> tuple[Tensor | None, ...]:
    q, k, v, positions, begins, out, log_sum = ctx.saved_tensors
    inner = (out * grad).sum(-1)
    dq, dk, dv = _backward(q, k, v, positions, begins, log_sum, inner, grad, ctx.keys, ctx.block_size)
    return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


compressed_attention.register_autograd(_differentiate, setup_context=_setup)
refuse_in("native_sparse_attention", "blocked", _backward)


def _flops(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, begins: Tensor | None, *others: Any) -> int:
    """Of the forward pass; of the backward pass where it is given what that has more."""
    backward = len(others) > 3
    block_size = others[-1] if backward else others[-2]
    positions = positions.expand(q.shape[:2])
    pairs = q.shape[2] * compressed_pairs(positions, begins, block_size, k.shape[1])
    return attention_flops(pairs, q.shape[3], v.shape[2], backward=backward)


count_with(_flops, compressed_attention)
count_with(_flops, _backward)
