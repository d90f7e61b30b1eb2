"""Softmax attention in which every key has a last query: sliding windows, learned eviction, full attention."""

from collections.abc import Callable

import torch
from torch import Tensor

from holdfast.ops.precision import without_autocast
from holdfast.ops.retained_attention.blocked import retained_attention_blocked
from holdfast.ops.retained_attention.reference import retained_attention_reference
from holdfast.ops.retained_attention.triton import is_available, retained_attention_triton, supports
from holdfast.ops.retention import FOREVER

__all__ = ["BACKENDS", "FOREVER", "retained_attention"]

Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None, int | None, float], Tensor]

BACKENDS: dict[str, Backend] = {
    "reference": retained_attention_reference,
    "blocked": retained_attention_blocked,
    "triton": retained_attention_triton,
}

# For so few, fused attention over all keys is quicker than finding out which of them are visible.
_FEW_QUERIES = 16


def retained_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor | None,
    window: int | None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal grouped-query attention in which key j is seen by the queries j … visible_until[j] (specification §3.4).

    The queries are the last Tq of the Tk positions: query t has the index i = Tk − Tq + t. It sees key j where
    `j <= i <= visible_until[b, j, h]`. One operation thus serves a whole sequence, a chunk behind cached keys, and
    a single decoded token. A query that sees nothing returns 0, and no gradient passes through it.

    `window` says how the work is divided and never changes the result: keys at most `window` steps behind a query are
    read as slices, and only keys with `visible_until[j] > j + window` are gathered for later queries. With None,
    nothing is gathered.

    | visible_until | window | is |
    | --- | --- | --- |
    | None | None | full causal attention |
    | None | w | sliding-window attention: w keys behind the query, and its own |
    | given | None | full attention with pads or packed sequences |
    | given | w | a window and the keys that outlive it |

    Args:
        q: [B, Tq, H, D], floating.
        k: [B, Tk, Hkv, D], Tk ≥ Tq, H a multiple of Hkv; dtype and device of q.
        v: [B, Tk, Hkv, Dv]; dtype and device of q. Keys and values that no query sees get the weight 0, and 0·NaN is
            NaN: they must be finite, in pads and empty slots too.
        visible_until: int64 [B, Tk, Hkv], or [B, Tk, 1] for all heads alike: the index of the last query that sees
            the key. `FOREVER` for one that is never lost, −1 for one that is never seen.
        window: at least 0.
        scale: factor on the scores before the softmax; D^-½ if None.
        backend: "reference", "blocked" (PyTorch, any device) or "triton" (CUDA and ROCm). None takes triton on a GPU
            where Triton is installed and has kernels for these dtypes and sizes (bfloat16, float16, float32; D ≤ 256),
            but for plain causal attention and up to 16 queries, which PyTorch's fused attention serves; else blocked.

    Returns:
        [B, Tq, H, Dv] in the dtype of q. Softmax and sums are in fp32, or in fp64 for fp64; under autocast too. So are
        products, except that "triton", and PyTorch's fused attention (plainly causal attention, up to 16 queries),
        multiply 16-bit numbers as such, the weights rounded to 16 bits among them.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device, window or backend does not fit.
        ImportError: backend "triton" without Triton.

    But for "reference", O(Tq·(window + kept)) time and O(Tk) memory for both passes, where kept is the largest number,
    over sequences and heads, of keys alive at once outside the window. Gradients of "triton" are deterministic, and it
    never waits for the device; `torch.set_float32_matmul_precision` decides whether it may multiply float32 in TF32.
    """
    visible_until = _check(q, k, v, visible_until, window)
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} does not exist: choose one of {', '.join(map(repr, BACKENDS))}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Autocast would lower the scores to 16 bits.
    with without_autocast(q):
        return BACKENDS[backend or _fastest(q, k, v, visible_until, window)](q, k, v, visible_until, window, scale)


def _fastest(q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor | None, window: int | None) -> str:
    """The backend for these inputs."""
    plain = visible_until is None and q.shape[1] == k.shape[1] and (window is None or window >= k.shape[1] - 1)
    if not q.is_cuda or plain or q.shape[1] <= _FEW_QUERIES:
        return "blocked"
    return "triton" if is_available() and supports(q, k, v) else "blocked"


def _refuse(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Name the first tensor whose dimensions, dtype or device do not fit."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have the shape [B, T, heads, D], not {list(tensor.shape)}.")
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise TypeError(f"q, k and v must share one floating dtype, but {name} is {tensor.dtype} and q {q.dtype}.")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and q on {q.device}: move them to one device.")


def _check(q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor | None, window: int | None) -> Tensor | None:
    """Refuse what does not fit; return `visible_until` with all its heads."""
    if not (
        q.dim() == k.dim() == v.dim() == 4
        and q.dtype == k.dtype == v.dtype
        and q.is_floating_point()
        and q.device == k.device == v.device
    ):
        _refuse(q, k, v)  # which of them it is; beside the attention of one token, a loop over them is not cheap
    batch, queries, heads, dim = q.shape
    key_batch, keys, kv_heads, key_dim = k.shape
    if key_batch != batch or key_dim != dim or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit: "
            "expected [B, Tq, H, D], [B, Tk, Hkv, D] and [B, Tk, Hkv, Dv]."
        )
    if not (dim and heads and kv_heads) or heads % kv_heads:
        if dim == 0:
            raise ValueError(f"q {list(q.shape)} has no channels.")
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key/value heads.")
    if queries > keys:
        raise ValueError(
            f"{queries} queries need at least as many keys, but there are {keys}: put cached keys in front."
        )
    if window is not None and window < 0:
        raise ValueError(f"window must not be negative, but is {window}; None means no window.")
    if visible_until is None:
        return None
    if visible_until.dtype != torch.int64:
        raise TypeError(f"visible_until must be int64, not {visible_until.dtype}.")
    if visible_until.device != q.device:
        raise ValueError(f"visible_until is on {visible_until.device} and q on {q.device}: move them to one device.")
    if visible_until.shape == (batch, keys, kv_heads):
        return visible_until
    if visible_until.shape != (batch, keys, 1):
        raise ValueError(
            f"visible_until must have the shape {[batch, keys, kv_heads]} or {[batch, keys, 1]}, "
            f"not {list(visible_until.shape)}."
        )
    return visible_until.expand(batch, keys, kv_heads)
