"""Native Sparse Attention (Yuan et al., arXiv 2502.11089): block means, a few blocks in full, a sliding window."""

from collections.abc import Callable

import torch
from torch import Tensor

from holdfast.ops.native_sparse_attention.blocked import native_sparse_attention_blocked
from holdfast.ops.native_sparse_attention.packing import Packing
from holdfast.ops.native_sparse_attention.reference import native_sparse_attention_reference
from holdfast.ops.native_sparse_attention.triton import native_sparse_attention_triton, supports
from holdfast.ops.precision import without_autocast

__all__ = ["BACKENDS", "native_sparse_attention"]

Compressed = tuple[Tensor, Tensor]
Backend = Callable[
    [Tensor, Tensor, Tensor, Tensor, int, int, int, Tensor | None, Tensor | None, Compressed | None, float],
    tuple[Tensor, Tensor],
]

BACKENDS: dict[str, Backend] = {
    "reference": native_sparse_attention_reference,
    "blocked": native_sparse_attention_blocked,
    "triton": native_sparse_attention_triton,
}


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    block_size: int,
    num_blocks: int,
    window: int,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    compressed: Compressed | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal grouped-query attention in three branches, and their gated sum (arXiv 2502.11089; specification §3.7).

    Keys are cut into blocks of S = `block_size`, counted from the first of a sequence. A query at the index i reads

    - *compressed*: the means of the keys and values of every complete block, (m + 1)·S − 1 <= i; 0 while there is none;
    - *selected*: the keys up to i of the n = `num_blocks` most important blocks, the importance of a block being its
      weight in the compressed branch, averaged over the G query heads of the group. The block in which i lies, the
      one before it and block 0 come first, in this order; among equally important others any may be chosen;
    - *sliding*: the last `window` keys, its own included.

    Each branch has a softmax of its own. The queries are the last Tq of the Tk keys, i = Tk − Tq + t: a sequence, a
    chunk behind cached keys and a token are one operation. A query with i < 0 sees nothing and returns 0.

    Args:
        q: [B, Tq, H, D], floating.
        k, v: [B, Tk, Hkv, D] and [B, Tk, Hkv, Dv], Tk ≥ Tq, H = G·Hkv; dtype and device of q; finite, if unseen too.
        gates: [B, Tq, H, 3], the weights of the compressed, the selected and the sliding branch; floating.
        block_size: at least 1. num_blocks: at least 1, more than exist are allowed. window: at least 1.
        lengths: int64 [B], 0 to Tk: each row holds so many keys, from its first on, and i = lengths − Tq + t. None: Tk.
        cu_seqlens: int64 [N + 1], where packed sequences, perhaps empty, begin and end in one row (B = 1, Tq = Tk);
            rising from 0 to T, which is checked on a CPU only; without `lengths` and `compressed`.
        compressed: means of the blocks, where known: [B, M, Hkv, D] and [B, M, Hkv, Dv], M ≥ Tk // S, floating, finite.
        scale: factor on the scores before the softmax; D^-½ if None.
        backend: "reference", "blocked" (PyTorch, any device) or "triton" (CUDA and ROCm). None takes triton on a GPU
            where it is installed and has kernels (16 or 32 bits; D ≤ 256; n ≤ 128), else blocked.

    Returns:
        The output [B, Tq, H, Dv] in the dtype of q, and the selected blocks, int64 [B, Tq, Hkv, n]: their numbers in
        the sequence in rising order, then −1 where fewer exist. Sums and products are in fp32, in fp64 for fp64, under
        autocast too, but "triton" rounds means and weights to the dtype of q. Gradients reach all floating inputs, not
        through the selection. But for "reference", O(Tq·(Tk/S + n·S + window)) time and O(Tk + Tq·n) memory for both
        passes. "triton" is deterministic and never waits for the device.

    Raises:
        TypeError, ValueError: a dtype, shape, device, number or backend does not fit. ImportError: Triton is missing.
    """
    _check_rows(q, k, v, gates)
    _check_blocks(q, k, v, block_size, num_blocks, window, compressed)
    _check_sequences(q, k, lengths, cu_seqlens, compressed)
    run, scale = _backend(backend, q, v, num_blocks), q.shape[-1] ** -0.5 if scale is None else scale
    sizes = (block_size, num_blocks, window)
    with without_autocast(q):
        if cu_seqlens is None or len(cu_seqlens) == 2:
            return run(q, k, v, gates, *sizes, lengths, None, compressed, scale)
        return _packed(run, q, k, v, gates, sizes, Packing.of(cu_seqlens, q.shape[1], block_size), scale)


def _packed(
    run: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    sizes: tuple[int, int, int],
    packing: Packing,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Sequences whose tokens stand as `packing` says while they are attended to."""
    q, k, v, gates = (packing.spread(x) for x in (q, k, v, gates))
    return packing.gather(*run(q, k, v, gates, *sizes, None, packing.begins, None, scale))


def _backend(name: str | None, q: Tensor, v: Tensor, num_blocks: int) -> Backend:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend {name!r} does not exist: choose one of {', '.join(map(repr, BACKENDS))}.")
    return BACKENDS[name or ("triton" if q.is_cuda and supports(q, v, num_blocks) else "blocked")]


def _check_rows(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> None:
    """Refuse queries, keys, values and gates that do not fit together."""
    for name, tensor in (("q", q), ("k", k), ("v", v), ("gates", gates)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have four dimensions, not the shape {list(tensor.shape)}.")
        if not tensor.is_floating_point() or (name != "gates" and tensor.dtype != q.dtype):
            raise TypeError(f"q, k and v must share one floating dtype, but {name} is {tensor.dtype} and q {q.dtype}.")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and q on {q.device}: move them to one device.")
    (batch, queries, heads, dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != dim or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit: "
            "expected [B, Tq, H, D], [B, Tk, Hkv, D] and [B, Tk, Hkv, Dv]."
        )
    if gates.shape != (batch, queries, heads, 3):
        raise ValueError(f"gates must have the shape {[batch, queries, heads, 3]}, not {list(gates.shape)}.")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key/value heads.")
    if queries > keys:
        raise ValueError(
            f"{queries} queries need at least as many keys, but there are {keys}: put cached keys in front."
        )


def _check_blocks(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, num_blocks: int, window: int, compressed: Compressed | None
) -> None:
    """Refuse sizes below 1, and means that are not those of the blocks of k and v."""
    for name, number in (("block_size", block_size), ("num_blocks", num_blocks), ("window", window)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, but is {number}.")
    if compressed is None:
        return
    complete = k.shape[1] // block_size
    for name, means, rows in (("keys", compressed[0], k), ("values", compressed[1], v)):
        fits = means.dim() == 4 and means.shape[0] == rows.shape[0] and means.shape[2:] == rows.shape[2:]
        if not fits or means.shape[1] < complete:
            expected = f"[{rows.shape[0]}, {complete} or more, {rows.shape[2]}, {rows.shape[3]}]"
            raise ValueError(f"the compressed {name} must have the shape {expected}, not {list(means.shape)}.")
        if not means.is_floating_point():
            raise TypeError(f"the compressed {name} must be floating, not {means.dtype}.")
        if means.device != q.device:
            raise ValueError(f"the compressed {name} are on {means.device} and q on {q.device}.")


def _check_sequences(
    q: Tensor, k: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, compressed: Compressed | None
) -> None:
    """Refuse lengths and offsets of the wrong kind; their values are looked at only where that is free."""
    for name, tensor in (("lengths", lengths), ("cu_seqlens", cu_seqlens)):
        if tensor is not None and tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, not {tensor.dtype}.")
    if lengths is not None and (lengths.shape != q.shape[:1] or lengths.device != q.device):
        found = f"{list(lengths.shape)} on {lengths.device}"
        raise ValueError(f"lengths must have the shape {[q.shape[0]]} on {q.device}, not {found}.")
    can_look = q.device.type == "cpu" and not torch.compiler.is_compiling()
    for length in lengths.tolist() if can_look and lengths is not None else ():
        if not 0 <= length <= k.shape[1]:
            raise ValueError(f"lengths must lie between 0 and the {k.shape[1]} keys, but one is {length}.")
    if cu_seqlens is not None:
        if lengths is not None or compressed is not None:
            raise ValueError("cu_seqlens packs whole sequences and excludes lengths and compressed.")
        if q.shape[0] != 1 or q.shape[1] != k.shape[1] or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ValueError(
                f"cu_seqlens must be [N + 1] offsets into one row of as many queries as keys, but its shape is "
                f"{list(cu_seqlens.shape)}, q {list(q.shape)} and k {list(k.shape)}."
            )
        if cu_seqlens.device != q.device:
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and q on {q.device}: move them to one device.")
        ends = cu_seqlens.tolist() if can_look else None
        if ends is not None and (ends[0] != 0 or ends[-1] != q.shape[1] or ends != sorted(ends)):
            raise ValueError(f"cu_seqlens must rise from 0 to the length {q.shape[1]}, not {ends}.")
