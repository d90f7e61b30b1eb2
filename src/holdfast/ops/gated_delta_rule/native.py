"""The gated delta rule on a CPU in C++ (native.cpp): what `chunked` does, one chunk at a time, within the cache."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.ops.flops import count_with
from holdfast.ops.native import GRIDS, VECTORS, Functions
from holdfast.ops.precision import compute_dtype
from holdfast.ops.second_derivatives import refuse_in
from holdfast.ops.threads import in_threads

from .flops import native_backward_flops, native_flops

_SOURCE, _CHUNK = (Path(__file__).with_name(name) for name in ("native.cpp", "chunk.h"))
_SIGNATURE = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
_functions = Functions(
    {"holdfast_forward": _SIGNATURE, "holdfast_backward": _SIGNATURE}, _SOURCE, _CHUNK, GRIDS, VECTORS
)


def is_available() -> bool:
    """Whether there is a compiled library; the first call compiles it."""
    return _functions.are_there()


def supports(k: Tensor, v: Tensor) -> bool:
    """Whether C++ serves these dtypes on this device, and with as many threads is faster than `chunked`.

    It takes about half of the time of one thread, but divides only batch × key heads among them.
    """
    if v.device.type != "cpu" or compute_dtype(v) != torch.float32:
        return False
    return 0 < _num_threads() <= 2 * k.shape[0] * k.shape[2]


@torch.compiler.assume_constant_result
def _num_threads() -> int:
    """Threads that C++ would have; 0 without a compiler for it."""
    return torch.get_num_threads() if is_available() else 0


def gated_delta_rule_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as in `holdfast.ops.gated_delta_rule.gated_delta_rule`; T ≥ 1, state in float32.

    With cu_seqlens the initial state is not read, and the final one is that of the last sequence.
    Time O(T·(C·(K + V) + K·V)) per head for chunks of C tokens. Inputs of lower precision are copied to float32; beyond
    that and the output, memory O(1), and for a backward pass O(T·V) plus one state per chunk.

    Raises:
        RuntimeError: there is no C++ compiler, or v is neither on the CPU nor float32, bfloat16 or float16.
    """
    inputs = (q, k, v, g, beta, state)
    if v.device.type != "cpu" or compute_dtype(v) != torch.float32 or _num_threads() == 0:
        raise RuntimeError("backend 'native' needs a C++ compiler, and tensors on the CPU of at most float32.")
    # An exported program may be trained later.
    keep = torch.compiler.is_exporting() or (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))
    out, final_state, *_ = _forward(*(x.float() for x in inputs), cu_seqlens, scale, keep)
    return out.to(v.dtype), final_state


class _Sizes(ctypes.Structure):
    """`Sizes` of native.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "key_heads", "groups", "dim", "value_dim", "chunk")),
        ("sequences", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


class _Tensors(ctypes.Structure):
    """`Tensors` of native.cpp."""

    _inputs = "q", "k", "v", "g", "beta", "offsets", "initial"
    _outputs = "out", "final_state", "errors", "states"
    _gradients = "d_out", "d_final", "dq", "dk", "dv", "dg", "dbeta", "d_initial"
    _fields_ = [(name, ctypes.c_void_p) for name in (*_inputs, *_outputs, *_gradients)]


def _run(name: str, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, **tensors: Tensor | None) -> None:
    """Call the function for all rows and key heads, in as many threads as PyTorch has."""
    offsets = None if cu_seqlens is None else cu_seqlens.long()
    given = {"k": k, "v": v, "offsets": offsets, **tensors}
    given = {key: x if x is None else x.contiguous() for key, x in given.items()}
    (B, T, Hk, K), (Hv, V) = k.shape, v.shape[2:]
    sequences = 1
    if offsets is not None:  # the caller has not looked at its values where a compiler traced it
        sequences = offsets.shape[0] - 1
        if B != 1 or offsets[0] != 0 or offsets[-1] != T or bool((offsets.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {T}, but is {offsets.tolist()}.")
    sizes = _Sizes(B, T, Hk, Hv // Hk, K, V, _chunk_length(K, V), sequences, _slots(v, K, cu_seqlens), scale)
    pointers = _Tensors(**{key: x if x is None else x.data_ptr() for key, x in given.items()})
    arguments = ctypes.byref(sizes), ctypes.byref(pointers)
    in_threads(lambda first, end: _functions.call(name, *arguments, first, end), B * Hk, torch.get_num_threads())


def _chunk_length(K: int, V: int) -> int:
    """The fastest where measured (K = V of 16, 32, 64, 128); 16 to 64 tokens differ by a tenth."""
    return 48 if max(K, V) > 64 else 32


def _slots(v: Tensor, K: int, cu_seqlens: Tensor | None) -> int:
    """Chunks there can be: the last of each sequence may be short."""
    T, C = v.shape[1], _chunk_length(K, v.shape[3])
    return (T + C - 1) // C if cu_seqlens is None else T // C + cu_seqlens.shape[0] - 1


@torch.library.custom_op("holdfast::gated_delta_native", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output and the final state; and if `keep`, for the backward pass, the errors v − kᵀS [B, T, Hv, V] and the
    states at the chunks' entries [B, Hv, N, K, V], else two empty tensors."""
    out, final_state, errors, states = outputs = _empty_outputs(v, state, cu_seqlens, keep)
    kept = {"errors": errors, "states": states} if keep else {}
    inputs = {"q": q, "g": g, "beta": beta, "initial": state}
    _run("holdfast_forward", k, v, cu_seqlens, scale, **inputs, out=out, final_state=final_state, **kept)
    return outputs


@_forward.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, v, _, _, state, cu_seqlens, _, keep = given
    return _empty_outputs(v, state, cu_seqlens, keep)


def _empty_outputs(
    v: Tensor, state: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, final_state = v.new_empty(v.shape), state.new_empty(state.shape)
    if not keep:
        return out, final_state, v.new_empty(0), v.new_empty(0)
    B, Hv, K, V = state.shape
    return out, final_state, v.new_empty(v.shape), v.new_empty(B, Hv, _slots(v, K, cu_seqlens), K, V)


@torch.library.custom_op("holdfast::gated_delta_native_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    errors: Tensor,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `_forward` for its first six inputs, in their order."""
    gradients = _empty_gradients(q, k, v, g, beta, states)
    inputs = {"q": q, "g": g, "beta": beta, "errors": errors, "states": states, "d_out": d_out, "d_final": d_final}
    outputs = dict(zip(("dq", "dk", "dv", "dg", "dbeta", "d_initial"), gradients, strict=True))
    _run("holdfast_backward", k, v, cu_seqlens, scale, **inputs, **outputs)
    return gradients


@_backward.register_fake
def _(d_out: Tensor, d_final: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
    q, k, v, g, beta, _, states, _, _ = given
    return _empty_gradients(q, k, v, g, beta, states)


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg, dbeta, d_state = (x.new_empty(x.shape) for x in (q, k, v, g, beta, states[:, :, 0]))
    return dq, dk, dv, dg, dbeta, d_state


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, beta, _, cu_seqlens, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, g, beta, *output[2:], cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    d_out = torch.zeros_like(tensors[2]) if d_out is None else d_out
    return *_backward(d_out, d_final, *tensors, cu_seqlens, ctx.scale), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
refuse_in("gated_delta_rule", "native", _backward)
count_with(native_flops, _forward)
count_with(native_backward_flops, _backward)
