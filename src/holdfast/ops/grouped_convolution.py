"""The scorer's convolution over time, in which every group of channels is an entry of its own."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.ops.native import GRIDS, VECTORS, Functions, is_plain, is_watched
from holdfast.ops.precision import without_autocast
from holdfast.ops.threads import TEAM, must_go_alone, team_for

__all__ = ["grouped_convolution", "serves"]

_SOURCE = Path(__file__).with_name("grouped_convolution.cpp")
_LEVELS = 1 << 16
# Columns of a task for one thread.
_SEGMENT = 768

_P = ctypes.c_void_p
_SIGNATURES = {
    "holdfast_grouped_convolution": [_P, _P, _P, ctypes.c_int64],
    "holdfast_grouped_convolution_backward": [_P, _P, _P, ctypes.c_int64],
    "holdfast_dropout_factors": [_P, _P],
}
_functions = Functions(_SIGNATURES, _SOURCE, TEAM, GRIDS, VECTORS)


def grouped_convolution(
    x: Tensor, valid: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1, p: float = 0.0
) -> Tensor:
    """SiLU of the convolution over time, without padding, of x with zeros where `valid` is False and after dropout.

    On a CPU in fp32 this is one pass of C++ (grouped_convolution.cpp), forward and backward, elsewhere and under
    autocast a batched product of the taps side by side.

    Args:
        x: [G, B, T, C], with any strides.
        valid: [B or 1, T] bool.
        weight: [G·C', C, 1, kernel], as of a grouped `nn.Conv2d`.
        bias: [G·C'].
        dilation: of the kernel.
        p: probability of dropout, in [0, 1]; C++ rounds it to a multiple of 2⁻¹⁶. Random numbers come from PyTorch's
            default generator, or are made from one number of it.

    Returns:
        [G, B, T', C'] with T' = T − (kernel − 1) · dilation. Differentiable. O(G·B·T·C·C'·kernel) time. For the
        backward pass C++ keeps the input and as much as the output, PyTorch the taps too.

    Raises:
        ValueError: shapes do not fit together, the input is shorter than the kernel, or p is no probability.
        TypeError: valid is not bool.
    """
    _check(x, valid, weight, bias, dilation, p)
    if p == 1 or not serves(x, weight, bias) or torch.is_autocast_enabled("cpu"):
        x = _masked(x, valid)
        return _by_pytorch(F.dropout(x, p) if p else x, weight, bias, dilation)
    inputs = (x if x.stride(3) == 1 else x.contiguous(), valid.contiguous(), weight.contiguous(), bias.contiguous())
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_(-(2**63), None)) % 2**64 if dropped else 0
    if torch.is_grad_enabled() and any(y.requires_grad for y in (x, weight, bias)):
        return _Convolution.apply(*inputs, dilation, dropped, seed)
    return _forward(*inputs, None, dilation, dropped, seed)


def serves(x: Tensor, *parameters: Tensor) -> bool:
    """Whether C++ computes with tensors like these; the first call that could compiles it."""
    if is_watched() or x.numel() == 0 or must_go_alone(x.numel()):
        return False
    return all(is_plain(y) for y in (x, *parameters)) and _functions.are_there()


def _check(x: Tensor, valid: Tensor, weight: Tensor, bias: Tensor, dilation: int, p: float) -> None:
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} must have four dimensions.")
    groups, batch, length, channels = x.shape
    outputs, kernel = weight.shape[0], weight.shape[3]
    if groups == 0 or outputs % groups or weight.shape[1:3] != (channels, 1) or bias.shape != (outputs,):
        raise ValueError(
            f"x {list(x.shape)} asks for weights [{groups} · outputs, {channels}, 1, kernel] and as many biases, "
            f"got {list(weight.shape)} and {list(bias.shape)}."
        )
    if length <= (kernel - 1) * dilation or dilation < 1:
        raise ValueError(f"{length} columns are too few for a kernel of {kernel} with dilation {dilation}.")
    if valid.dtype != torch.bool:
        raise TypeError(f"valid has dtype {valid.dtype}: give bool.")
    if valid.ndim != 2 or valid.shape[0] not in (1, batch) or valid.shape[1] != length or valid.device != x.device:
        raise ValueError(f"valid {list(valid.shape)} on {valid.device} does not fit x {list(x.shape)} on {x.device}.")
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}: a probability lies in [0, 1].")


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


def _forward(
    x: Tensor,
    valid: Tensor,
    weight: Tensor,
    bias: Tensor,
    sums: Tensor | None,
    dilation: int,
    dropped: int,
    seed: int,
) -> Tensor:
    """The output; what SiLU was applied to goes into `sums`, which is like it, where given."""
    out = x.new_empty(_out_shape(x, weight, dilation))
    given = {"x": x, "valid": valid, "weight": weight, "bias": bias, "sums": sums, "out": out}
    _call("holdfast_grouped_convolution", _sizes(x, valid, weight, dilation, dropped, seed), _team(x), given)
    return out


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, valid: Tensor, weight: Tensor, bias: Tensor, dilation: int, dropped: int, seed: int
    ) -> Tensor:
        sums = x.new_empty(_out_shape(x, weight, dilation))
        out = _forward(x, valid, weight, bias, sums, dilation, dropped, seed)
        ctx.save_for_backward(x, valid, weight, bias, sums)
        ctx.settings = dilation, dropped, seed
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, valid, weight, bias, sums = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        batched = torch._C._functorch.is_legacy_batchedtensor(grad)  # of `is_grads_batched`
        if torch.is_grad_enabled() or is_watched() or batched or not is_plain(grad):
            return _gradients_by_pytorch(wanted, x, valid, weight, bias, grad, *ctx.settings)
        # Hooks of saved tensors may have changed their layout.
        x = x if x.stride(3) == 1 else x.contiguous()
        valid, weight, sums, grad = (y.contiguous() for y in (valid, weight, sums, grad))
        team = _team(x)
        dx = x.new_empty(x.shape) if wanted[0] else None
        learns = wanted[2] or wanted[3]
        d_weight, d_bias = (y.new_zeros(team[1], *y.shape) if learns else None for y in (weight, bias))
        given = {"x": x, "valid": valid, "weight": weight, "sums": sums, "d_out": grad}
        outputs = {"dx": dx, "d_weight": d_weight, "d_bias": d_bias}
        sizes = _sizes(x, valid, weight, *ctx.settings)
        _call("holdfast_grouped_convolution_backward", sizes, team, {**given, **outputs})
        sums_of_workers = (None if y is None else y.sum(0) for y in (d_weight, d_bias))
        return dx, None, *sums_of_workers, None, None, None


def _gradients_by_pytorch(
    wanted: Sequence[bool],
    x: Tensor,
    valid: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad: Tensor,
    dilation: int,
    dropped: int,
    seed: int,
) -> tuple[Tensor | None, ...]:
    """For all that `_Convolution` was given, made of PyTorch's operations, which can be derived again."""
    further = torch.is_grad_enabled()
    inputs = [x, valid, weight, bias]
    with torch.enable_grad(), without_autocast(x):
        # Aliases: an input may have been computed from another, and that way is not for this backward pass to go.
        inputs = [y.view_as(y) if want else y for y, want in zip(inputs, wanted[:4], strict=True)]
        kept = inputs[0]
        if dropped:
            factors = torch.empty(x.shape)
            sizes = _sizes(x, valid, weight, dilation, dropped, seed)
            _functions.call("holdfast_dropout_factors", ctypes.byref(sizes), factors)
            kept = kept * factors
        out = _by_pytorch(_masked(kept, valid), inputs[2], inputs[3], dilation)
        leaves = [y for y, want in zip(inputs, wanted[:4], strict=True) if want]
        found = iter(torch.autograd.grad(out, leaves, grad, create_graph=further))
    return *(next(found) if want else None for want in wanted[:4]), None, None, None


def _out_shape(x: Tensor, weight: Tensor, dilation: int) -> tuple[int, int, int, int]:
    groups, batch, length, _ = x.shape
    return groups, batch, length - (weight.shape[3] - 1) * dilation, weight.shape[0] // groups


def _sizes(x: Tensor, valid: Tensor, weight: Tensor, dilation: int, dropped: int, seed: int) -> _Sizes:
    outputs, kernel = weight.shape[0] // x.shape[0], weight.shape[3]
    strides = (*x.stride()[:3], 0 if valid.shape[0] == 1 else x.shape[2])
    factor = _LEVELS / (_LEVELS - dropped)
    return _Sizes(*x.shape, outputs, kernel, dilation, _SEGMENT, *strides, seed, dropped, factor)


def _team(x: Tensor) -> tuple[int | None, int]:
    groups, batch, length, _ = x.shape
    return team_for(x.numel(), groups * batch * (1 + (length - 1) // _SEGMENT))


def _call(name: str, sizes: _Sizes, team: tuple[int | None, int], tensors: dict[str, Tensor | None]) -> None:
    pointers = _Tensors(**{key: y if y is None else y.data_ptr() for key, y in tensors.items()})
    _functions.call(name, ctypes.byref(sizes), ctypes.byref(pointers), *team)
