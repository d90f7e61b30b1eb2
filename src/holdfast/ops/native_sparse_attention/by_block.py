"""Selected attention block by block: all queries that chose a block are computed together.

The softmax of a query is put together from its blocks, each with the highest score so far as the zero point. A block
is read once, the queries n times; no key is copied. Shapes as in `selected.py`; P queries of one visit.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from holdfast.ops.native_sparse_attention.tiles import attend, attend_backward, most_scores


def by_block(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, blocks: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """The contract of `selected_attention`."""
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    log_sum = q.new_full(q.shape[:3], -torch.inf)
    q_flat, out_flat, sum_flat = q.flatten(0, 1), out.flatten(0, 1), log_sum.flatten(0, 1)
    for visit in _visits(q, positions, blocks, block_size):
        some = q_flat.index_select(0, visit.queries).unsqueeze(0)
        block_out, block_sum, *_ = attend(some, k[visit.keys], v[visit.keys], visit.hidden)
        before = sum_flat.index_select(0, visit.queries)
        after = torch.logaddexp2(before, block_sum[0])
        merged = out_flat.index_select(0, visit.queries).mul_(torch.exp2(before - after).unsqueeze(-1))
        merged.addcmul_(block_out[0], torch.exp2(block_sum[0] - after).unsqueeze(-1))
        out_flat.index_copy_(0, visit.queries, merged)
        sum_flat.index_copy_(0, visit.queries, after)
    return out, log_sum.masked_fill_(log_sum == -torch.inf, 0.0)


def by_block_backward(
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
    """Gradients of q, k and v, in the dtype of q."""
    dq, dk, dv = (torch.zeros_like(x, dtype=q.dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
    of_queries = [x.flatten(0, 1) for x in (q, log_sum, inner, grad)]
    dq_flat = dq.flatten(0, 1)
    for visit in _visits(q, positions, blocks, block_size):
        some, *statistics = (x.index_select(0, visit.queries).unsqueeze(0) for x in of_queries)
        gradients = attend_backward(some, k[visit.keys], v[visit.keys], visit.hidden, *statistics)
        dq_flat.index_add_(0, visit.queries, gradients[0][0])
        dk[visit.keys] += gradients[1]
        dv[visit.keys] += gradients[2]
    return dq, dk, dv


class _Visit(NamedTuple):
    """Some of the queries that chose one block."""

    queries: Tensor  # [P] int64, rising, numbers in [R·Tq]
    keys: tuple[slice, slice]  # row, keys
    hidden: Tensor  # [1, S or fewer, S], keys that the first queries do not see


def _visits(q: Tensor, positions: Tensor, blocks: Tensor, block_size: int) -> Iterator[_Visit]:
    rows, queries, groups = q.shape[:3]
    limit = max(16, most_scores(q.device) // (groups * block_size))
    positions = positions.expand(rows, queries).flatten()
    count = int(blocks.max()) + 1
    offset = torch.arange(block_size, device=q.device)
    number = blocks + count * torch.arange(rows, device=q.device)[:, None, None]
    number = torch.where(blocks < 0, rows * count, number).flatten()
    by_number = number.argsort(stable=True) // blocks.shape[2]
    end = 0
    for block, visitors in enumerate(number.bincount(minlength=rows * count)[: rows * count].tolist()):
        start, end = end, end + visitors
        row, first_key = block // count, block % count * block_size
        keys = slice(row, row + 1), slice(first_key, first_key + block_size)
        for part in range(start, end, limit):
            some = by_number[part : min(part + limit, end)]
            # A block is incomplete only for queries inside it, which are the first to read it.
            at = positions[some[: max(0, block_size - (part - start))]]
            yield _Visit(some, keys, (first_key + offset > at[:, None]).unsqueeze(0))
