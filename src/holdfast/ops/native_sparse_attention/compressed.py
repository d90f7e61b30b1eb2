"""The compressed branch: attention over the means of complete blocks, and the choice of blocks that follows from it.

Shape legend: R rows (key/value heads of sequences), G query heads per row, M blocks, D and V head dimensions, n chosen.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from holdfast.ops.native_sparse_attention.tiles import attend, attend_backward, of_tile, tiles


@torch.library.custom_op("holdfast::compressed_attention", mutates_args=())
def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, keys: int, block_size: int, num_blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over complete blocks, and the n most important blocks. A custom op, lest a compiler unroll the tiles.

    Args:
        q: [R, Tq, G, D] in the dtype of the arithmetic, with the scale and 1/ln 2 in it.
        k: [R, M, D], M = keys // S: means of blocks. v: [R, M, V].
        positions: [R or 1, Tq], the index of each query; at most keys − Tq + t, negative where it sees nothing.
        keys: how many keys the blocks were made of, those of the last and incomplete one included.

    Returns:
        Output [R, Tq, G, V]; base-2 log-sum-exp [R, Tq, G]; chosen blocks int64 [R, Tq, n], −1 where fewer exist.
    """
    out, log_sum, chosen = _empty_outputs(q, k, v, positions, keys, block_size, num_blocks)
    for rows, queries, complete in _tiles_of_blocks(q, keys, block_size):
        at = of_tile(positions, rows, queries)
        importance = q.new_zeros(rows.stop - rows.start, queries.stop - queries.start, 0)
        if complete:
            hidden = _incomplete(at, complete, block_size)
            tile = attend(q[rows, queries], k[rows, :complete], v[rows, :complete], hidden)
            out[rows, queries], log_sum[rows, queries], weights, total = tile
            importance = weights.div_(total).sum(dim=2)
        else:
            out[rows, queries], log_sum[rows, queries] = 0.0, 0.0
        count = (keys - q.shape[1] + queries.stop - 1) // block_size + 1
        chosen[rows, queries] = _choose(importance, at // block_size, count, num_blocks)
    return out, log_sum, chosen


@compressed_attention.register_fake
def _empty_outputs(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, keys: int, block_size: int, num_blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = positions.new_empty(*q.shape[:2], num_blocks)
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3]), chosen


def _tiles_of_blocks(q: Tensor, keys: int, block_size: int) -> Iterator[tuple[slice, slice, int]]:
    """Rows and queries of each tile, and how many blocks are complete at its last query."""
    for rows, queries in tiles(q, keys // block_size):
        yield rows, queries, (keys - q.shape[1] + queries.stop) // block_size


def _incomplete(at: Tensor, complete: int, block_size: int) -> Tensor:
    """[N or 1, L, complete] bool: blocks that are not complete yet at the positions `at` [N or 1, L]."""
    number = torch.arange(complete, device=at.device)
    return number >= ((at + 1) // block_size).unsqueeze(2)


def _choose(importance: Tensor, current: Tensor, count: int, num_blocks: int) -> Tensor:
    """The n most important of `count` blocks, [N, L, n] in rising order, −1 where fewer exist.

    Args:
        importance: [N, L, complete], below 2·G, 0 for blocks in the future.
        current: [N or 1, L], the block in which each query lies; negative where it sees nothing.
    """
    rows, queries, complete = importance.shape
    ranked = torch.nn.functional.pad(importance, (0, count - complete))
    current = current.expand(rows, queries).unsqueeze(2)
    ranked.masked_fill_(torch.arange(count, device=current.device) > current, -1.0)
    for back in (None, 1, 0):  # block 0, the previous, the current one; a later one takes the place of an earlier
        certain = torch.zeros_like(current) if back is None else (current - back).clamp_(min=0)
        ranked.scatter_(2, certain, torch.inf if back == 0 else 1e30 if back else 1e20)
    best = ranked.topk(min(num_blocks, count), dim=2, sorted=False)
    chosen = best.indices.masked_fill_((best.values < 0) | (current < 0), count).sort(dim=2).values
    chosen.masked_fill_(chosen == count, -1)
    return torch.nn.functional.pad(chosen, (0, max(0, num_blocks - count)), value=-1)


@torch.library.custom_op("holdfast::compressed_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    log_sum: Tensor,
    inner: Tensor,
    grad: Tensor,
    keys: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of `compressed_attention`, in the dtype of q."""
    dq, dk, dv = (torch.zeros_like(x, dtype=q.dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows, queries, complete in _tiles_of_blocks(q, keys, block_size):
        if complete:
            hidden = _incomplete(of_tile(positions, rows, queries), complete, block_size)
            of_queries = (x[rows, queries] for x in (log_sum, inner, grad))
            tile = attend_backward(q[rows, queries], k[rows, :complete], v[rows, :complete], hidden, *of_queries)
            dq[rows, queries] = tile[0]
            dk[rows, :complete] += tile[1]
            dv[rows, :complete] += tile[2]
    return dq, dk, dv


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    log_sum: Tensor,
    inner: Tensor,
    grad: Tensor,
    keys: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), k.new_empty(k.shape, dtype=q.dtype), v.new_empty(v.shape, dtype=q.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, positions, ctx.keys, ctx.block_size, _ = inputs
    ctx.save_for_backward(q, k, v, positions, *output[:2])


def _differentiate(ctx: Any, grad: Tensor, _log_sum: Tensor, _chosen: None) -> tuple[Tensor | None, ...]:
    q, k, v, positions, out, log_sum = ctx.saved_tensors
    inner = (out * grad).sum(-1)
    dq, dk, dv = _backward(q, k, v, positions, log_sum, inner, grad, ctx.keys, ctx.block_size)
    return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


compressed_attention.register_autograd(_differentiate, setup_context=_setup)
