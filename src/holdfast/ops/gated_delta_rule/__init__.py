"""The gated delta rule, the recurrence of Gated DeltaNet (Yang et al., arXiv 2412.06464; specification §3.1)."""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from holdfast.ops import one_token
from holdfast.ops.precision import compute_dtype, without_autocast

from . import fla, native
from .chunked import gated_delta_rule_chunked
from .reference import gated_delta_rule_reference

__all__ = ["gated_delta_rule", "gated_delta_step"]

_BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": gated_delta_rule_reference,
    "chunked": gated_delta_rule_chunked,
    "native": native.gated_delta_rule_native,
    "fla": fla.gated_delta_rule_fla,
}


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run S ← e^g·S, then S ← S + k ⊗ β(v − kᵀS), and read scale·qᵀS, at every token.

    A token with β = 0 and g = 0 (a pad) leaves the state as it is, to the bit. g may be −inf: the state is forgotten.

    Args:
        q, k: [B, T, Hk, K], L2-normalised (`holdfast.ops.norms.l2_norm`).
        v: [B, T, Hv, V]; Hv is a multiple of Hk, and value head h uses key head h // (Hv/Hk).
        g: [B, T, Hv], natural logarithm of the decay, ≤ 0.
        beta: [B, T, Hv], write strength, in [0, 1] (or [0, 2] for negative eigenvalues).
        scale: factor on q; K^-½ when None.
        initial_state: [B, Hv, K, V]; zeros when None.
        output_final_state: return the state after the last token as well.
        cu_seqlens: integer [N+1], offsets 0 … T of N sequences packed into one row (B = 1); each starts from a zero
            state, and some may be empty. Its values are checked only on the CPU and outside torch.compile, to spare
            a device synchronisation. Excludes initial_state and output_final_state.
        backend: "reference" (token by token), "chunked" (PyTorch, any device), "native" (C++, CPU, no float64) or "fla"
            (fla-core, CUDA). None takes native where there are a compiler and work for half of the threads; fla where
            it keeps the precision of v (not float32, unless `torch.set_float32_matmul_precision` allows TF32);
            otherwise chunked. One token takes `gated_delta_step`.

    Returns:
        (out, final_state): out [B, T, Hv, V] in v's dtype; final_state [B, Hv, K, V] in float32 (float64 for
        float64) or None. Arithmetic is float32 (float64 for float64) inside, under autocast too. Differentiable once
        in q, k, v, g, beta and initial_state. Time O(T), memory O(T), per head K·V operations a token.

    Raises:
        ValueError: shapes do not fit together, the backend is unknown, or cu_seqlens comes with a state.
        TypeError: cu_seqlens is not integer, a tensor is not floating, or scale is a tensor.
        ImportError, RuntimeError: "fla" without fla-core, "native" without a compiler, off the CPU or for float64.
    """
    _check(q, k, v, g, beta, initial_state)
    if cu_seqlens is not None:
        _check_packing(v, initial_state, output_final_state, cu_seqlens)
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: take one of {', '.join(_BACKENDS)}, or None.")
    scale = _number(scale, k)
    (B, T, Hv, V), dtype = v.shape, compute_dtype(v)
    state = v.new_zeros(B, Hv, k.shape[-1], V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if B * T == 0:
        out, final_state = torch.empty_like(v), state
    elif T == 1 and backend is None and cu_seqlens is None:
        out, final_state = gated_delta_step(q, k, v, g, beta, state, scale=scale)
    else:
        run = _BACKENDS[backend or _best_backend(k, v)]
        with without_autocast(v):
            out, final_state = run(q, k, v, g, beta, scale, state, cu_seqlens)
    return out, final_state if output_final_state else None


def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of the gated delta rule, for decoding.

    Args:
        q, k, v, g, beta, scale: as in `gated_delta_rule`, with T = 1.
        state: [B, Hv, K, V]; not modified.

    Returns:
        (out, new_state): out [B, 1, Hv, V] in v's dtype, new_state [B, Hv, K, V] in float32 (float64 for float64).
        Differentiable. Time O(K·V) per head.

    Raises:
        ValueError: shapes do not fit together, or T is not 1.
        TypeError: a tensor is not floating.
    """
    _check(q, k, v, g, beta, state)
    (B, T, Hv, V), (Hk, K) = v.shape, k.shape[2:]
    if T != 1:
        raise ValueError(f"gated_delta_step takes one token but got {T}: call gated_delta_rule.")
    scale = _number(scale, k)
    if one_token.serves(q, k, v, g, beta, state):
        return one_token.delta(q, k, v, g, beta, state, scale)
    dtype = compute_dtype(v)
    with without_autocast(v):
        # The value heads of a key head share its query and key: [B, Hk, 1, 1, K] against [B, Hk, Hv/Hk, K, V].
        q_row, k_row = (x.to(dtype).reshape(B, Hk, 1, 1, K) for x in (q, k))
        v_row = v.to(dtype).reshape(B, Hk, -1, 1, V)
        decay, strength = (x.to(dtype).reshape(B, Hk, -1, 1, 1) for x in (g, beta))
        kept = state.to(dtype).reshape(B, Hk, -1, K, V) * decay.exp()
        correction = strength * (v_row - k_row @ kept)
        new_state = torch.addcmul(kept, k_row.mT, correction)
        out = (q_row * scale) @ new_state
    return out.reshape(B, 1, Hv, V).to(v.dtype), new_state.view(B, Hv, K, V)


def _number(scale: float | None, k: Tensor) -> float:
    if isinstance(scale, Tensor):
        raise TypeError("scale is a tensor: give a number, or scale q.")
    return k.shape[-1] ** -0.5 if scale is None else scale


def _best_backend(k: Tensor, v: Tensor) -> str:
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return "reference"  # the others have no derivative forwards
    if native.supports(k, v):
        return "native"
    if v.device.type != "cuda" or not fla.supports(v.dtype):
        return "chunked"
    if fla.is_available():
        return "fla"
    _warn_slow()
    return "chunked"


@functools.cache
def _warn_slow() -> None:
    warnings.warn(
        "fla-core is not installed, so Gated DeltaNet runs on slower PyTorch code: pip install 'holdfast[cuda]'.",
        stacklevel=4,
    )


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> None:
    named = {"q": q, "k": k, "v": v, "g": g, "beta": beta} | ({} if state is None else {"the state": state})
    for name, x in named.items():
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}: give a floating dtype.")
        if x.device != v.device:
            raise ValueError(f"{name} is on {x.device} but v is on {v.device}: move all to one device.")
    if k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} must be [B, T, heads, dimension].")
    (B, T, Hk, K), (Hv, V) = k.shape, v.shape[2:]
    if Hk == 0 or Hv % Hk:
        raise ValueError(f"v has {Hv} heads and k has {Hk}: the first must be a multiple of the second.")
    expected = {
        "q": (q, (B, T, Hk, K)),
        "v": (v, (B, T, Hv, V)),
        "g": (g, (B, T, Hv)),
        "beta": (beta, (B, T, Hv)),
    } | ({} if state is None else {"the state": (state, (B, Hv, K, V))})
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name} has shape {list(x.shape)}: k and v ask for {list(shape)}.")


def _check_packing(v: Tensor, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor) -> None:
    B, T = v.shape[:2]
    if initial_state is not None or output_final_state:
        raise ValueError("cu_seqlens excludes initial_state and output_final_state: packed sequences start from zero.")
    if B != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1 but v has {B} rows: pack all sequences into one row.")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}: give int32 or int64.")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}: give [N+1] offsets, from 0 to T.")
    if cu_seqlens.device != v.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} but v is on {v.device}: move it there.")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        steps_back = bool((cu_seqlens.diff() < 0).any())
        if steps_back or cu_seqlens[0] != 0 or cu_seqlens[-1] != T:
            raise ValueError(f"cu_seqlens must rise from 0 to T = {T}, but is {cu_seqlens.tolist()}.")
