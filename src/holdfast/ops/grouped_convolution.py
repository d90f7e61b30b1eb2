"""The scorer's convolution over time, in which every group of channels is an entry of its own."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.ops.native import GRIDS, VECTORS, Functions, is_plain, is_watched
from holdfast.ops.threads import TEAM, must_go_alone, team_for

__all__ = ["grouped_convolution", "serves"]

_SOURCE = Path(__file__).with_name("grouped_convolution.cpp")
# Dropout in C++ takes 16 random bits per number: p is rounded to a multiple of 2⁻¹⁶.
_LEVELS = 1 << 16
# Columns of a task for one thread.
_SEGMENT = 768

_P = ctypes.c_void_p
_SIGNATURES = {
    "holdfast_convolve": [_P, _P, _P, ctypes.c_int64],
    "holdfast_convolve_backward": [_P, _P, _P, ctypes.c_int64],
    "holdfast_dropout_factors": [_P, _P],
}
_functions = Functions(_SIGNATURES, _SOURCE, TEAM, GRIDS, VECTORS)


def grouped_convolution(
    x: Tensor, valid: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1, p: float = 0.0
) -> Tensor:
    """SiLU of the convolution over time, without padding, of x with zeros where `valid` is False and after dropout.

    On a CPU in fp32 this is one pass of C++ (grouped_convolution.cpp), forward and backward, elsewhere a batched
    product of the taps side by side.

    Args:
        x: [G, B, T, C], with any strides.
        valid: [B or 1, T] bool.
        weight: [G·C', C, 1, kernel], as of a grouped `nn.Conv2d`.
        bias: [G·C'].
        dilation: of the kernel.
        p: probability of dropout, in [0, 1]. Random numbers come from PyTorch's default generator, or are made from one
            number of it.

    Returns:
        [G, B, T', C'] with T' = T − (kernel − 1) · dilation ≥ 1. Differentiable. O(G·B·T·C·C'·kernel) time. For the
        backward pass C++ keeps the input and as much as the output, PyTorch the taps too.
    """
    if p < 1 and serves(x, weight, bias):
        return _Convolution.apply(x, valid, weight, bias, dilation, p)
    x = _masked(x, valid)
    return _by_pytorch(F.dropout(x, p) if p else x, weight, bias, dilation)


def serves(x: Tensor, *parameters: Tensor) -> bool:
    """Whether C++ computes with tensors like these; the first call that could compiles it."""
    if is_watched() or x.numel() == 0 or must_go_alone(x.numel()):
        return False
    return all(is_plain(y) for y in (x, *parameters)) and _functions.are_there()


def _masked(x: Tensor, valid: Tensor) -> Tensor:
    return x.masked_fill(~valid[None, :, :, None], 0)


def _by_pytorch(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """SiLU of the convolution of all columns, as one batched product."""
    groups, batch, length, channels = x.shape
    kernel = weight.shape[3]
    out_length = length - (kernel - 1) * dilation
    columns = [x[:, :, tap * dilation : tap * dilation + out_length] for tap in range(kernel)]
    weight = weight.view(groups, -1, channels, kernel)
    if batch * out_length < channels:  # bring the smaller operand into the order of the other: here, a decoded token
        rows, weight = torch.stack(columns, dim=-1), weight.flatten(2).mT
    else:
        rows, weight = torch.cat(columns, dim=-1), weight.permute(0, 3, 2, 1).flatten(1, 2)
    rows = rows.view(groups, batch * out_length, kernel * channels)
    return F.silu(torch.baddbmm(bias.view(groups, 1, -1), rows, weight)).view(groups, batch, out_length, -1)


class _Sizes(ctypes.Structure):
    """`Sizes` of grouped_convolution.cpp."""

    _sizes = "groups", "batch", "length", "channels", "outputs", "kernel", "dilation"
    _task = ("segment",)
    _strides = "group_stride", "batch_stride", "time_stride", "valid_stride"
    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_sizes, *_task, *_strides)),
        ("seed", ctypes.c_uint64),
        ("dropped", ctypes.c_int64),
        ("factor", ctypes.c_float),
    ]


class _Tensors(ctypes.Structure):
    """`Tensors` of grouped_convolution.cpp."""

    _names = "x", "valid", "weight", "bias", "sums", "out", "d_out", "dx", "d_weight", "d_bias"
    _fields_ = [(name, ctypes.c_void_p) for name in _names]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor, weight: Tensor, bias: Tensor, dilation: int, p: float) -> Tensor:
        x = x if x.stride(3) == 1 else x.contiguous()
        valid, weight, bias = (y.contiguous() for y in (valid, weight, bias))
        groups, batch, length, _ = x.shape
        outputs, kernel = weight.shape[0] // groups, weight.shape[3]
        dropped = min(round(p * _LEVELS), _LEVELS - 1)
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_(-(2**63), None)) if dropped else 0
        strides = (*x.stride()[:3], 0 if valid.shape[0] == 1 else length)
        factor = _LEVELS / (_LEVELS - dropped)
        sizes = (*x.shape, outputs, kernel, dilation, _SEGMENT, *strides)
        ctx.sizes = _Sizes(*sizes, seed % 2**64, dropped, factor)
        out = x.new_empty(groups, batch, length - (kernel - 1) * dilation, outputs)
        sums = torch.empty_like(out) if any(ctx.needs_input_grad) else None
        ctx.save_for_backward(x, valid, weight, bias, sums)
        given = {"x": x, "valid": valid, "weight": weight, "bias": bias, "sums": sums, "out": out}
        _call("holdfast_convolve", ctx.sizes, _team(x), given)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, valid, weight, bias, sums = ctx.saved_tensors
        batched = torch._C._functorch.is_legacy_batchedtensor(grad)  # of `is_grads_batched`
        if torch.is_grad_enabled() or is_watched() or batched or not is_plain(grad):
            return *_gradients_by_pytorch(ctx.sizes, x, valid, weight, bias, grad), None, None
        team = _team(x)
        dx = x.new_empty(x.shape)
        d_weight, d_bias = (y.new_zeros(team[1], *y.shape) for y in (weight, bias))
        given = {"x": x, "valid": valid, "weight": weight, "sums": sums, "d_out": grad.contiguous()}
        outputs = {"dx": dx, "d_weight": d_weight, "d_bias": d_bias}
        _call("holdfast_convolve_backward", ctx.sizes, team, {**given, **outputs})
        return dx, None, d_weight.sum(0), d_bias.sum(0), None, None


def _gradients_by_pytorch(
    sizes: _Sizes, x: Tensor, valid: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """For x, none for valid, and for weight and bias, made of PyTorch's operations, which can be derived again."""
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: an input may have been computed from another, and that way is not for this backward pass to go.
        aliases = [y.view_as(y) if y.requires_grad else y for y in (x, weight, bias)]
        wanted = [y for y in aliases if y.requires_grad]
        kept = _masked(aliases[0] * _factors(sizes, x), valid)
        out = _by_pytorch(kept, aliases[1], aliases[2], sizes.dilation)
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=further))
    dx, d_weight, d_bias = (next(found) if y.requires_grad else None for y in aliases)
    return dx, None, d_weight, d_bias


def _factors(sizes: _Sizes, x: Tensor) -> Tensor:
    """What dropout multiplied x with."""
    factors = torch.ones_like(x, memory_format=torch.contiguous_format)
    if sizes.dropped:
        _functions.call("holdfast_dropout_factors", ctypes.byref(sizes), factors)
    return factors


def _team(x: Tensor) -> tuple[int | None, int]:
    groups, batch, length, _ = x.shape
    return team_for(x.numel(), groups * batch * (1 + (length - 1) // _SEGMENT))


def _call(name: str, sizes: _Sizes, team: tuple[int | None, int], tensors: dict[str, Tensor | None]) -> None:
    pointers = _Tensors(**{key: y if y is None else y.data_ptr() for key, y in tensors.items()})
    _functions.call(name, ctypes.byref(sizes), ctypes.byref(pointers), *team)
