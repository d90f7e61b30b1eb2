"""Native Sparse Attention in PyTorch, on any device: three branches, each in tiles.

The compressed branch chooses the blocks, so it comes first. It and the selected branch have a backward pass of their
own, which computes the weights anew from the log-sum-exp; sliding windows are those of `retained_attention`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.ops.native_sparse_attention.compressed import compressed_attention
from holdfast.ops.native_sparse_attention.packing import last_in_window
from holdfast.ops.native_sparse_attention.selected import selected_attention
from holdfast.ops.precision import compute_dtype
from holdfast.ops.retained_attention import retained_attention


def native_sparse_attention_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    block_size: int,
    num_blocks: int,
    window: int,
    lengths: Tensor | None,
    begins: Tensor | None,
    compressed: tuple[Tensor, Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The contract of `native_sparse_attention` in O(Tq·(Tk/S + n·S + window)) time and O(Tk + Tq·n) memory."""
    queries, (keys, kv_heads) = q.shape[1], k.shape[1:3]
    exact = compute_dtype(q)
    rows = (q.to(exact) * (scale / math.log(2))).unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(0, 1)
    positions = torch.arange(keys - queries, keys, device=q.device)[None]
    if lengths is not None:
        positions = (positions + (lengths - keys)[:, None]).repeat_interleave(kv_heads, dim=0)
    complete = keys // block_size
    if compressed is None:
        compressed = block_means(k, complete, block_size), block_means(v, complete, block_size)
    means_k, means_v = (_key_rows(means[:, :complete]) for means in compressed)
    out_compressed, _, blocks = compressed_attention(
        rows, means_k, means_v, positions, begins, keys, block_size, num_blocks
    )
    whole_k, whole_v = (_key_rows(_whole_blocks(x, block_size)) for x in (k, v))
    out_selected, _ = selected_attention(rows, whole_k, whole_v, positions, blocks, block_size)
    until = None if begins is None else last_in_window(begins, window, block_size)
    out_sliding = sliding_attention(q, k, v, window, lengths, until, scale, exact)
    gates = gates.to(exact)
    out = gates[..., :1] * _by_query(out_compressed, kv_heads).flatten(2, 3)
    out = out + gates[..., 1:2] * _by_query(out_selected, kv_heads).flatten(2, 3)
    out = out + gates[..., 2:] * out_sliding
    return out.to(q.dtype), _by_query(blocks, kv_heads)


def block_means(x: Tensor, complete: int, block_size: int) -> Tensor:
    """Means of the complete blocks, [B, M, heads, D] in fp32 or fp64, from [B, Tk, heads, D]."""
    return x[:, : complete * block_size].unflatten(1, (complete, block_size)).mean(2, dtype=compute_dtype(x))


def _whole_blocks(x: Tensor, block_size: int) -> Tensor:
    """x [B, Tk, heads, D], filled up with zeros to a whole number of blocks; without a copy where it is one."""
    lacking = -x.shape[1] % block_size
    return F.pad(x, (0, 0, 0, 0, 0, lacking)) if lacking else x


def _key_rows(x: Tensor) -> Tensor:
    """[B, Tk, Hkv, D] → [B·Hkv, Tk, D]."""
    return x.transpose(1, 2).flatten(0, 1)


def _by_query(rows: Tensor, kv_heads: int) -> Tensor:
    """[B·Hkv, Tq, ...] → [B, Tq, Hkv, ...]."""
    return rows.unflatten(0, (rows.shape[0] // kv_heads, kv_heads)).transpose(1, 2)


def sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    lengths: Tensor | None,
    visible_until: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Attention over the last `window` keys, [B, Tq, H, Dv], of inputs in `dtype`.

    `visible_until` [1, Tk, 1], without lengths: that of packed sequences, `last_in_window`.
    """
    needed = min(q.shape[1] + window - 1, k.shape[1])
    end = _common_length(k, lengths)
    if end is not None and end >= needed:
        k, v = (x[:, end - needed : end] for x in (k, v))
    elif lengths is not None:
        row = (lengths - needed)[:, None] + torch.arange(needed, device=q.device)  # [B, needed]
        until = torch.arange(window - 1, window - 1 + needed, device=q.device)
        visible_until = torch.where(row >= 0, until, -1).unsqueeze(2)
        index = row.clamp(min=0)[:, :, None, None]
        k, v = (x.gather(1, index.expand(-1, -1, *x.shape[2:])) for x in (k, v))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return retained_attention(q, k, v, visible_until, window - 1, scale=scale)


def _common_length(k: Tensor, lengths: Tensor | None) -> int | None:
    """How many keys every row holds; None where they differ, or where looking would stall a device."""
    if lengths is None:
        return k.shape[1]
    if lengths.device.type != "cpu" or torch.compiler.is_compiling() or len(lengths) == 0:
        return None
    first, *others = lengths.tolist()
    return first if all(other == first for other in others) else None
