"""What a decoded token costs, in C++ (one_token.cpp).

A model of 12 layers makes some 2,500 calls into PyTorch for one token, most of them on a few hundred numbers. Ops ask
`serves` and take these functions instead, which give the same numbers up to rounding. They know float32 on a CPU, no
gradients, and no `torch.compile`, which fuses such operations itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from holdfast.ops.native import VECTORS, Functions, is_plain, is_watched
from holdfast.ops.threads import TEAM, team_for

__all__ = ["are_there", "convolve", "delta", "linear", "score", "serves", "step"]

_SOURCE = Path(__file__).with_name("one_token.cpp")
# What fills vectors of many rows is a task for PyTorch, which has threads for it.
_LARGEST = 1 << 16

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "holdfast_convolve": [_P] * 5 + [_I] * 4,
    "holdfast_delta": [_P] * 8 + [_I] * 5 + [_F],
    "holdfast_linear": [_P] * 4 + [_I] * 2 + [_P, _I],
    "holdfast_score": [_P] * 7 + [_I] * 8 + [_F, _P],
    "holdfast_step": [_P] * 11 + [_I] * 7 + [_F, _I, _P, _I],
}
_functions = Functions(_SIGNATURES, _SOURCE, TEAM, VECTORS)
_call = _functions.call


def serves(*tensors: Tensor | None) -> bool:
    """Whether these functions can compute with float tensors like these; the first call that could compiles them.

    The first tensor is the one whose size says how much there is to do.
    """
    if is_watched() or (tensors[0] is not None and tensors[0].numel() > _LARGEST):
        return False
    gradient = torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if not is_plain(x) or not x.is_contiguous():
            return False
        if gradient and x.requires_grad:
            return False
    return _functions.are_there()


@torch.compiler.assume_constant_result  # it looks for a compiler, where torch.compile cannot follow
def are_there() -> bool:
    """Whether this machine has these functions; the first call compiles them."""
    return _functions.are_there()


def convolve(x: Tensor, weight: Tensor, state: Tensor, activation: bool) -> tuple[Tensor, Tensor]:
    """`short_convolution` of x [B, 1, C] behind state [B, C, W − 1] with weight [C, 1, W]."""
    out, new_state = torch.empty_like(x), torch.empty_like(state)
    batch, _, channels = x.shape
    _call("holdfast_convolve", x, weight, state, out, new_state, batch, channels, weight.shape[-1], activation)
    return out, new_state


def delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`gated_delta_step`."""
    out, new_state = torch.empty_like(v), torch.empty_like(state)
    sizes = (v.shape[0], k.shape[2], v.shape[2], k.shape[3], v.shape[3])
    _call("holdfast_delta", q, k, v, g, beta, state, out, new_state, *sizes, scale)
    return out, new_state


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of a single row x [..., in] with weight [out, in]."""
    rows, size = weight.shape
    out = x.new_empty(*x.shape[:-1], rows)
    _call("holdfast_linear", x, weight, bias, out, rows, size, *team_for(weight.numel(), rows))
    return out


def score(
    features: Tensor, valid: Tensor, convolutions: Sequence[nn.Conv2d], shared: bool, causal: bool, threshold: float
) -> Tensor:
    """Scores [B, Hkv] of the middle tokens of features [B, R, Hkv, 2D] by grouped convolutions, the last to a logit.

    With `causal` of the last tokens: all taps lie in the past.

    valid: bool [B or 1, R]; elsewhere every convolution reads zeros.
    """
    batch, length, heads, channels = features.shape
    out = features.new_empty(batch, heads)
    count = len(convolutions)
    weights = (_P * count)(*(conv.weight.data_ptr() for conv in convolutions))
    biases = (_P * count)(*(conv.bias.data_ptr() for conv in convolutions if conv.bias is not None))
    kernels = (_I * count)(*(conv.kernel_size[1] for conv in convolutions))
    dilations = (_I * count)(*(conv.dilation[1] for conv in convolutions))
    outputs = (_I * count)(*(conv.out_channels // conv.groups for conv in convolutions))
    stride = length if valid.shape[0] == batch else 0
    sizes = (count, stride, batch, length, heads, channels, shared, causal)
    _call("holdfast_score", features, valid, weights, biases, kernels, dilations, outputs, *sizes, threshold, out)
    return out


def step(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor | None,
    real: Tensor | None,
    state: Sequence[Tensor | None],
    sinks: int,
    delay: int,
    scale: float,
) -> Tensor:
    """`window_step`; state: keys, values, seen, scores and positions of the slots."""
    keys, seen, positions = state[0], state[2], state[4]
    assert keys is not None
    assert seen is not None
    batch, kv_heads, slots, dim = keys.shape
    budget = 0 if positions is None else positions.shape[2]
    out = torch.empty_like(q)
    groups = q.shape[1] // kv_heads

    rows = batch * kv_heads
    sizes = (kv_heads, groups, budget, slots - budget, dim, sinks, delay)
    team = team_for(2 * keys.numel(), rows)
    _call("holdfast_step", q, key, value, score, real, *state, out, *sizes, scale, rows, *team)
    seen.add_(1 if real is None else real)
    return out
