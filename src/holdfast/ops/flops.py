"""What `torch.utils.flop_counter.FlopCounterMode` counts for operators that it cannot look into.

As in PyTorch's own formulas, a multiplication with its addition is two operations, only matrix products count, and
gradients are counted as if all were wanted. Of attention only the pairs that are seen count, as in
`holdfast.info.flops_per_token`, and its backward pass computes the scores once more: five products, as in PyTorch's
formula for its fused attention (which counts what is masked too). Values are read where there are any: on a device that
waits for it, and of fake tensors, which have none, every pair that order allows counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula

__all__ = ["attention_flops", "compressed_pairs", "count_with", "retained_pairs", "selected_pairs"]


def count_with(formula: Callable[..., int], operator: CustomOpDef) -> None:
    """Let `formula`, called with the arguments of the operator, say how many operations a call makes."""

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    namespace, name = operator._qualname.split("::")
    register_flop_formula(getattr(getattr(torch.ops, namespace), name), get_raw=True)(count)


def attention_flops(pairs: int, dim: int, value_dim: int, *, backward: bool = False) -> int:
    """Operations on so many pairs of a query and a key that it sees."""
    return 2 * pairs * (3 * dim + 2 * value_dim if backward else dim + value_dim)


def retained_pairs(visible_until: Tensor | None, rows: int, queries: int, keys: int, window: int | None) -> int:
    """Pairs of `retained_attention`, for one query head of each of `rows` key/value heads.

    Args:
        visible_until: as there, with keys in the dimension 1; None: the window decides.
    """
    first = keys - queries
    if visible_until is None or not _has_values(visible_until):
        reach = keys if window is None or visible_until is not None else min(window + 1, keys)
        return rows * sum(min(query + 1, reach) for query in range(first, keys))
    key = torch.arange(keys, device=visible_until.device)
    key = key if visible_until.dim() == 2 else key[:, None]
    seen = (visible_until.clamp(max=keys - 1) - key.clamp(min=first) + 1).clamp(min=0)
    return int(seen.sum())


def selected_pairs(positions: Tensor, blocks: Tensor, block_size: int, keys: int) -> int:
    """Pairs of queries at `positions` [..., Tq] with the keys of their blocks [..., Tq, n], −1 for none."""
    if not (_has_values(positions) and _has_values(blocks)):
        return blocks.numel() * min(block_size, keys)
    seen = (positions.unsqueeze(-1) + 1 - blocks * block_size).clamp(0, block_size)
    return int(seen.masked_fill(blocks < 0, 0).sum())


def compressed_pairs(positions: Tensor, begins: Tensor | None, block_size: int, count: int) -> int:
    """Pairs of queries at `positions` [..., Tq], negative where they see nothing, with the `count` complete blocks.

    Args:
        begins: the first block of the sequence of each block; None: block 0.
    """
    if not _has_values(positions) or (begins is not None and not _has_values(begins)):
        return positions.numel() * count
    seen = (positions + 1) // block_size
    if begins is not None and len(begins):
        seen = seen - begins[(positions // block_size).clamp(0, len(begins) - 1)]
    return int(seen.clamp(0, count).sum())


def _has_values(x: Tensor) -> bool:
    return not x.is_meta and not isinstance(x, FakeTensor)
