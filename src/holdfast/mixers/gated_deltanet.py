"""Gated DeltaNet: linear attention whose state forgets by a gate and writes by the delta rule (specification §3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.mixers.base import MixerOptions, MixerOutput, TokenMixer, count_weights, linear, require
from holdfast.mixers.layout import TokenLayout, join_past
from holdfast.mixers.state import MixerState, TensorSpec
from holdfast.ops.gated_delta_rule import gated_delta_rule
from holdfast.ops.linear import apply_linear
from holdfast.ops.norms import gated_rms_norm, l2_norm
from holdfast.ops.short_convolution import short_convolution


@dataclass(frozen=True)
class GatedDeltaNetOptions(MixerOptions):
    """Settings of Gated DeltaNet.

    Attributes:
        num_heads: key heads. num_v_heads: value heads, a multiple of num_heads; None = num_heads.
        head_dim: size K of a key. expand_v: size of a value over size of a key.
        conv_size: width of the short convolutions.
        allow_neg_eigval: double β, so that the state may also flip directions.
    """

    num_heads: int
    head_dim: int
    num_v_heads: int | None = None
    expand_v: float = 1.0
    conv_size: int = 4
    allow_neg_eigval: bool = False

    def __post_init__(self) -> None:
        require(self.num_heads > 0 and self.head_dim > 0, "num_heads and head_dim must be positive")
        require(
            self.value_heads % self.num_heads == 0,
            f"num_v_heads ({self.value_heads}) must be a multiple of num_heads ({self.num_heads})",
        )
        require(
            math.isclose(self.head_dim * self.expand_v, self.value_dim) and self.value_dim > 0,
            f"head_dim × expand_v must be a whole number, got {self.head_dim} × {self.expand_v}",
        )
        require(self.conv_size >= 2, f"conv_size must be at least 2, got {self.conv_size}")

    @property
    def value_heads(self) -> int:
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def value_dim(self) -> int:
        return round(self.head_dim * self.expand_v)


class GatedDeltaNet(TokenMixer):
    """The linear layer of every hybrid. Time per token and memory do not depend on the context."""

    Options = GatedDeltaNetOptions
    options: GatedDeltaNetOptions

    def __init__(self, hidden_size: int, norm_eps: float, options: GatedDeltaNetOptions) -> None:
        super().__init__(hidden_size, norm_eps, options)
        keys, values = options.num_heads * options.head_dim, options.value_heads * options.value_dim
        self.q_proj = linear(hidden_size, keys)
        self.k_proj = linear(hidden_size, keys)
        self.v_proj = linear(hidden_size, values)
        self.a_proj = linear(hidden_size, options.value_heads)
        self.b_proj = linear(hidden_size, options.value_heads)
        self.g_proj = linear(hidden_size, values)
        self.o_proj = linear(values, hidden_size)
        self.A_log = nn.Parameter(torch.empty(options.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(options.value_heads))
        self.q_conv1d = _ShortConvolution(keys, options.conv_size)
        self.k_conv1d = _ShortConvolution(keys, options.conv_size)
        self.v_conv1d = _ShortConvolution(values, options.conv_size)
        self.o_norm = _HeadNorm(options.value_dim)

    @classmethod
    def make_state(cls, options: GatedDeltaNetOptions) -> GatedDeltaNetState:
        return GatedDeltaNetState(options)

    def init_weights(self, init: Any) -> None:
        """Decay rates A uniform in (0, 16); time steps log-uniform in (0.001, 0.1), as in Mamba 2."""
        init.uniform_(self.A_log, 1e-3, 16)
        init.copy_(self.A_log, self.A_log.log())
        init.uniform_(self.dt_bias, math.log(1e-3), math.log(1e-1))
        step = self.dt_bias.exp().clamp(min=1e-4)
        init.copy_(self.dt_bias, step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def flops_per_token(self, context: int) -> int:
        state = self.options.value_heads * self.options.head_dim * self.options.value_dim
        return 2 * count_weights(self) + 8 * state  # decay, kᵀS, the rank-one write and qᵀS

    def forward(self, hidden: Tensor, layout: TokenLayout, state: MixerState | None = None) -> MixerOutput:
        past = state if isinstance(state, GatedDeltaNetState) else None
        if layout.real is not None:
            hidden = hidden.masked_fill(~layout.real.unsqueeze(2), 0)
        q, k, v, decay, beta = self.recurrence(hidden, layout, past)
        out, recurrent = gated_delta_rule(
            q,
            k,
            v,
            decay,
            beta,
            initial_state=None if past is None else _kept_for_backward(past.recurrent, q),
            output_final_state=past is not None,
            cu_seqlens=layout.cu_seqlens,
        )
        if past is not None:
            assert recurrent is not None
            past.recurrent.copy_(recurrent)
        gate = apply_linear(self.g_proj, hidden).view_as(out)
        return MixerOutput(apply_linear(self.o_proj, self.o_norm(out, gate, self.norm_eps).flatten(2)))

    def recurrence(
        self, hidden: Tensor, layout: TokenLayout, past: GatedDeltaNetState | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What enters the delta rule: q, k [B, T, Hk, K] of length 1, v [B, T, Hv, V], log-decay and β [B, T, Hv] fp32.

        `hidden` must be zero at pads. With `past` the convolutions read on from it and are written back.
        """
        q, k, v = (
            self._convolve(name, apply_linear(layer, hidden), layout, past)
            for name, layer in (("q", self.q_proj), ("k", self.k_proj), ("v", self.v_proj))
        )
        q, k = (x.unflatten(2, (-1, self.options.head_dim)) for x in (q, k))
        v = v.unflatten(2, (-1, self.options.value_dim))
        beta = torch.sigmoid(apply_linear(self.b_proj, hidden).float())
        if self.options.allow_neg_eigval:
            beta = beta * 2
        decay = -self.A_log.float().exp() * F.softplus(apply_linear(self.a_proj, hidden).float() + self.dt_bias.float())
        if layout.real is not None:  # a pad neither writes nor decays
            beta = beta.masked_fill(~layout.real.unsqueeze(2), 0)
            decay = decay.masked_fill(~layout.real.unsqueeze(2), 0)
        return l2_norm(q), l2_norm(k), v, decay, beta

    def _convolve(self, name: str, x: Tensor, layout: TokenLayout, past: GatedDeltaNetState | None) -> Tensor:
        """The short convolution of the query, key or value channels, x [B, T, C], with what came before."""
        convolution = getattr(self, f"{name}_conv1d")
        if past is None:
            return convolution(x, cu_seqlens=layout.cu_seqlens)[0]
        memory = past.tensors[f"conv_{name}"]
        if layout.num_pads is None or layout.fresh:
            out, latest = convolution(x, memory)
        else:
            width = memory.shape[2]
            joined = join_past(memory.transpose(1, 2), x, layout.num_pads)
            before, x = joined[:, :width].transpose(1, 2), joined[:, width:]
            out, latest = convolution(x, before)
        memory.copy_(latest)
        return out


class GatedDeltaNetState(MixerState):
    """One layer's memory: recurrent [B, Hv, K, V] fp32, and the last inputs conv_{q,k,v} [B, C, conv_size − 1]."""

    def __init__(self, options: GatedDeltaNetOptions) -> None:
        super().__init__()
        self.options = options

    def spec(self, batch_size: int, dtype: torch.dtype, tokens: int = 0) -> dict[str, TensorSpec]:
        options = self.options
        keys, values = options.num_heads * options.head_dim, options.value_heads * options.value_dim
        recurrent = (batch_size, options.value_heads, options.head_dim, options.value_dim)
        width = options.conv_size - 1
        return {
            "recurrent": TensorSpec(recurrent, torch.promote_types(torch.float32, dtype)),
            "conv_q": TensorSpec((batch_size, keys, width), dtype),
            "conv_k": TensorSpec((batch_size, keys, width), dtype),
            "conv_v": TensorSpec((batch_size, values, width), dtype),
        }


def _kept_for_backward(recurrent: Tensor, q: Tensor) -> Tensor:
    """The state as a call finds it; a copy where the backward pass reads it after the call has overwritten it."""
    return recurrent.clone() if torch.is_grad_enabled() and q.requires_grad else recurrent


class _ShortConvolution(nn.Module):
    """Weight [C, 1, width] of a causal depthwise convolution, under its published name and shape."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`short_convolution` of x [B, T, C] with this weight."""
        return short_convolution(x, self.weight, state, cu_seqlens=cu_seqlens)

    def init_weights(self, init: Any) -> None:
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))


class _HeadNorm(nn.Module):
    """Weight [V] of the norm over a head's values."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, gate: Tensor, eps: float) -> Tensor:
        """`gated_rms_norm` of x and gate [B, T, Hv, V] with this weight."""
        return gated_rms_norm(x, gate, self.weight, eps)

    def init_weights(self, init: Any) -> None:
        init.ones_(self.weight)
