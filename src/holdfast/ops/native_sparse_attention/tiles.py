"""Attention of one tile of queries over keys that lie side by side, forward and backward.

Shape legend: N rows, a row being one key/value head of one sequence; L queries; G query heads per key/value head;
C keys; D and V head dimensions. Queries carry the scale, and 1/ln 2: weights are powers of two, which a CPU computes
twice as fast as powers of e.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from holdfast.ops.precision import without_autocast

LN2 = math.log(2)

# Scores in one tile. On a CPU they should stay in the cache from one pass over them to the next; an accelerator wants
# work enough for every kernel.
_CPU_SCORES = 1 << 19
_ACCELERATOR_SCORES = 1 << 24
_LONGEST_TILE = 256
_SHORTEST_TILE = 16


def most_scores(device: torch.device) -> int:
    """How many scores a tile should hold."""
    return _CPU_SCORES if device.type == "cpu" else _ACCELERATOR_SCORES


def tiles(q: Tensor, keys: int) -> Iterator[tuple[slice, slice]]:
    """Cut the rows and queries of q [R, Tq, G, D] so that each part with `keys` keys is a tile of moderate size."""
    rows, queries, groups = q.shape[:3]
    budget, keys = most_scores(q.device) // groups, max(keys, 1)
    length = min(max(budget // keys, _SHORTEST_TILE), _LONGEST_TILE, max(queries, 1))
    height = max(1, budget // (length * keys))
    for row in range(0, rows, height):
        for query in range(0, queries, length):
            yield slice(row, min(row + height, rows)), slice(query, min(query + length, queries))


def of_tile(positions: Tensor, rows: slice, queries: slice) -> Tensor:
    """The part [N or 1, L] of `positions` [R or 1, Tq] that belongs to a tile."""
    return positions[:, queries] if positions.shape[0] == 1 else positions[rows, queries]


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax attention in the dtype of q; no autograd.

    Args:
        q: [N, L, G, D]. k: [N, C, D], C ≥ 1. v: [N, C, V].
        hidden: [N or 1, L, C] bool, keys that a query does not see; it may see none at all. It may end before the last
            queries, which then see all.

    Returns:
        Output [N, L, G, V], base-2 log-sum-exp [N, L, G] and, before they are divided by their sum [N, L, G, 1], the
        weights [N, L, G, C], and the sum; output and weights are 0 where a query sees nothing.
    """
    weights = _scores(q, k, hidden)
    highest = weights.amax(dim=-1, keepdim=True)
    highest.masked_fill_(highest == -torch.inf, 0.0)
    total = weights.sub_(highest).exp2_().sum(dim=-1, keepdim=True)
    total.masked_fill_(total == 0, 1.0)
    out = torch.bmm(weights.flatten(1, 2), v.to(q.dtype)).view(*q.shape[:3], v.shape[-1]).div_(total)
    return out, highest.add_(total.log2()).squeeze(-1), weights, total


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, log_sum: Tensor, inner: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of `attend`, in the dtype of q.

    Args:
        q, k, v, hidden: as in `attend`. log_sum: its second result. grad: of its output, [N, L, G, V].
        inner: [N, L, G], the inner product of the output and its gradient.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    with without_autocast(q):
        return _gradients(q, k, v, hidden, log_sum, inner, grad)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, log_sum: Tensor, inner: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _scores(q, k, hidden).sub_(log_sum.unsqueeze(-1)).exp2_()
    weights, grad_rows, q_rows = weights.flatten(1, 2), grad.flatten(1, 2), q.flatten(1, 2)
    dv = torch.bmm(weights.mT, grad_rows)
    grad_scores = torch.bmm(grad_rows, v.mT).sub_(inner.flatten(1).unsqueeze(-1)).mul_(weights).mul_(LN2)
    return torch.bmm(grad_scores, k).view(q.shape), torch.bmm(grad_scores.mT, q_rows), dv


def _scores(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """[N, L, G, C], −∞ where hidden."""
    scores = torch.bmm(q.flatten(1, 2), k.to(q.dtype).mT).view(*q.shape[:3], k.shape[1])
    scores[:, : hidden.shape[1]].masked_fill_(hidden.unsqueeze(2), -torch.inf)
    return scores
