"""Norms, SwiGLU, rotations and short convolutions in C++ (fused.cpp), forward and backward, in one pass over memory.

PyTorch's own operations are the reference, and what runs elsewhere: with other dtypes and devices, and under
`torch.compile`, which fuses them itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.ops.native import VECTORS, Functions, is_plain, is_watched
from holdfast.ops.threads import TEAM, must_go_alone, team_for

__all__ = ["convolution", "rotated", "scaled", "serves", "swiglu"]

_SOURCE = Path(__file__).with_name("fused.cpp")
# Numbers below which PyTorch's few calls cost less than a function of autograd in Python.
_SMALLEST = 1 << 12

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "holdfast_swiglu": [_P] * 3 + [_I, _P, _I],
    "holdfast_swiglu_backward": [_P] * 5 + [_I, _P, _I],
    "holdfast_convolution": [_P] * 5 + [_I] * 4 + [_P, _I],
    "holdfast_convolution_backward": [_P] * 8 + [_I] * 4 + [_P, _I],
    "holdfast_rotate": [_P] * 4 + [_I] * 4 + [_F, _P, _I],
    "holdfast_scaled": [_P] * 5 + [_I] * 2 + [_F] * 2 + [_P, _I],
    "holdfast_scaled_backward": [_P] * 8 + [_I] * 2 + [_F, _P, _I],
}
_functions = Functions(_SIGNATURES, _SOURCE, TEAM, VECTORS)
_call = _functions.call


def serves(*tensors: Tensor) -> bool:
    """Whether these functions can compute with tensors like these; the first call that could compiles them.

    The first tensor is the one whose size says how much there is to do.
    """
    numbers = tensors[0].numel()
    if is_watched() or numbers == 0 or must_go_alone(numbers) or (numbers < _SMALLEST and _differentiated(*tensors)):
        return False
    return all(is_plain(x) for x in tensors) and _functions.are_there()


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up, of one shape."""
    gate, up = gate.contiguous(), up.contiguous()
    return _SwiGLU.apply(gate, up) if _differentiated(gate, up) else _gate(gate, up)


def scaled(x: Tensor, weight: Tensor | None, gate: Tensor | None, divisor: float, eps: float) -> Tensor:
    """x [..., D] · (Σx² / divisor + eps)^-½, times weight [D] and SiLU(gate [..., D]) where given."""
    x = x.contiguous()
    weight, gate = (None if y is None else y.contiguous() for y in (weight, gate))
    if _differentiated(x, weight, gate):
        return _Scaled.apply(x, weight, gate, divisor, eps)
    return _scale(x, weight, gate, None, divisor, eps)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (x[c], x[c + D/2]) of x [B, T, heads, D] rotated by the angles of cos and sin [B or 1, T, D/2].

    The tables must not require gradients.
    """
    x, cos, sin = (y.contiguous() for y in (x, cos, sin))
    return _Rotated.apply(x, cos, sin) if _differentiated(x) else _rotate(x, cos, sin, 1)


def convolution(x: Tensor, past: Tensor, weight: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution of x [B, T, C] behind past [B, W − 1, C], weight [C, 1, W].

    No gradient reaches `past`.
    """
    taps = weight.squeeze(1).t().contiguous()
    # A copy of the past, which a cache overwrites in place and which may come from inference mode.
    return _Convolution.apply(x.contiguous(), past.detach().clone(memory_format=torch.contiguous_format), taps)


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    out, count = torch.empty_like(gate), gate.numel()
    _call("holdfast_swiglu", gate, up, out, count, *team_for(count, count))
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, turn: int) -> Tensor:
    out, (batch, length, heads, dim) = torch.empty_like(x), x.shape
    tokens = batch * length
    team = team_for(x.numel(), tokens)
    _call("holdfast_rotate", x, cos, sin, out, tokens, heads, dim // 2, cos.shape[0] * length, turn, *team)
    return out


def _scale(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, scales: Tensor | None, divisor: float, eps: float
) -> Tensor:
    """`scaled`; into scales [rows], where given, go the factors on rows of x."""
    out, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width
    team = team_for(x.numel(), rows)
    _call("holdfast_scaled", x, weight, gate, out, scales, rows, width, divisor, eps, *team)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gate(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = _saved(ctx)
        if _needs_pytorch(grad):
            return _by_pytorch(lambda gate, up: F.silu(gate) * up, (gate, up), grad)
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        count = gate.numel()
        team = team_for(count, count)
        _call("holdfast_swiglu_backward", gate, up, grad.contiguous(), d_gate, d_up, count, *team)
        return d_gate, d_up


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = _saved(ctx)
        if _needs_pytorch(grad):
            first, second = grad.chunk(2, dim=-1)
            cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
            return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1), None, None
        return _rotate(grad.contiguous(), cos, sin, -1), None, None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, gate: Tensor | None, divisor: float, eps: float) -> Tensor:
        scales = x.new_empty(x.numel() // x.shape[-1])
        ctx.save_for_backward(x, weight, gate, scales)
        ctx.settings = divisor, eps
        return _scale(x, weight, gate, scales, divisor, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, scales = _saved(ctx)
        divisor, eps = ctx.settings
        if _needs_pytorch(grad):

            def function(x: Tensor, weight: Tensor | None, gate: Tensor | None) -> Tensor:
                out = x * (x.square().sum(-1, keepdim=True) / divisor + eps).rsqrt()
                out = out if weight is None else out * weight
                return out if gate is None else out * F.silu(gate)

            return *_by_pytorch(function, (x, weight, gate), grad), None, None
        width = x.shape[-1]
        rows = x.numel() // width
        team, workers = team_for(x.numel(), rows)
        dx, d_gate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
        d_weights = weight.new_zeros(workers, width) if ctx.needs_input_grad[1] else None
        given = (x, weight, gate, scales, grad.contiguous())
        _call("holdfast_scaled_backward", *given, dx, d_weights, d_gate, rows, width, divisor, team, workers)
        return dx, None if d_weights is None else d_weights.sum(0), d_gate, None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, past: Tensor, weight: Tensor) -> Tensor:
        out, sums = torch.empty_like(x), torch.empty_like(x) if any(ctx.needs_input_grad) else None
        sizes = (*x.shape, len(weight))
        team = team_for(x.numel(), x.shape[0] * x.shape[1])
        _call("holdfast_convolution", x, past, weight, sums, out, *sizes, *team)
        ctx.save_for_backward(x, past, weight, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, past, weight, sums = _saved(ctx)
        if _needs_pytorch(grad):

            def function(x: Tensor, weight: Tensor) -> Tensor:
                rows = torch.cat((past, x), dim=1)
                return F.silu(sum(rows[:, i : i + x.shape[1]] * tap for i, tap in enumerate(weight)))

            dx, d_weight = _by_pytorch(function, (x, weight), grad)
            return dx, None, d_weight
        d_sums, dx = torch.empty_like(x), torch.empty_like(x)
        team, workers = team_for(x.numel(), x.shape[0] * x.shape[1])
        d_weights = weight.new_zeros(workers, *weight.shape) if ctx.needs_input_grad[2] else None
        given = (x, past, weight, sums, grad.contiguous())
        sizes = (*x.shape, len(weight))
        _call("holdfast_convolution_backward", *given, d_sums, dx, d_weights, *sizes, team, workers)
        return dx, None, None if d_weights is None else d_weights.sum(0)


def _saved(ctx: Any) -> tuple[Any, ...]:
    """Saved tensors as C++ reads them: hooks (offloading, quantising) may have changed their layout."""
    return tuple(x if x is None else x.contiguous() for x in ctx.saved_tensors)


def _needs_pytorch(grad: Tensor) -> bool:
    """Whether a backward pass is to be derived once more (`create_graph`), or C++ cannot read its gradient."""
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)  # of `is_grads_batched`
    return torch.is_grad_enabled() or is_watched() or batched or not is_plain(grad)


def _by_pytorch(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of `function`, made of PyTorch's operations; None for those that need none."""
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: an input may have been computed from another, and that way is not for this backward pass to go.
        aliases = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        wanted = [x for x in aliases if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(function(*aliases), wanted, grad, create_graph=further))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)
