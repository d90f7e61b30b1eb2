"""Softmax attention over all past tokens, or over a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.mixers.base import MixerOptions, MixerOutput, TokenMixer, count_weights, linear, require
from holdfast.mixers.layout import TokenLayout, join_past
from holdfast.mixers.state import MixerState, TensorSpec
from holdfast.mixers.window_state import PastRows, WindowState
from holdfast.ops.linear import apply_linear
from holdfast.ops.retained_attention import retained_attention
from holdfast.ops.retention import FOREVER
from holdfast.ops.rotary import apply_rotary
from holdfast.ops.window_step import EMPTY


@dataclass(frozen=True)
class AttentionOptions(MixerOptions):
    """Settings of full attention.

    Attributes:
        num_heads: query heads H.
        num_kv_heads: key/value heads Hkv, a divisor of H (grouped-query attention); None = H.
        head_dim: D; None = hidden_size // num_heads.
        rope_theta: base of the rotary frequencies.
        qkv_bias: biases in the query, key and value maps.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        require(self.num_heads > 0, f"num_heads must be positive, got {self.num_heads}")
        require(
            self.kv_heads > 0 and self.num_heads % self.kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        require(
            self.head_dim is None or (self.head_dim > 0 and self.head_dim % 2 == 0),
            f"head_dim must be even and positive (rotary embeddings turn pairs of channels), got {self.head_dim}",
        )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def dim(self) -> int:
        """head_dim, once a model has resolved it."""
        require(self.head_dim is not None, "head_dim is not set: make the options through HybridConfig")
        return self.head_dim  # type: ignore[return-value]


@dataclass(frozen=True)
class SlidingAttentionOptions(AttentionOptions):
    """Settings of sliding-window attention: those of full attention, and `window`, which counts the token itself."""

    window: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window >= 1, f"window counts the token itself and must be at least 1, got {self.window}")


class SoftmaxAttention(TokenMixer):
    """Projections, rotary embedding and output map that all softmax mixers share (specification §3, §3.2)."""

    options: Any

    def __init__(self, hidden_size: int, norm_eps: float, options: AttentionOptions) -> None:
        super().__init__(hidden_size, norm_eps, options)
        self.head_dim = options.dim
        queries, pairs = options.num_heads * self.head_dim, options.kv_heads * self.head_dim
        self.q_proj = linear(hidden_size, queries, options.qkv_bias)
        self.k_proj = linear(hidden_size, pairs, options.qkv_bias)
        self.v_proj = linear(hidden_size, pairs, options.qkv_bias)
        self.o_proj = linear(queries, hidden_size)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, D]; k, v [B, T, Hkv, D], before the rotary embedding."""
        shape = (*hidden.shape[:2], -1, self.head_dim)
        return (
            apply_linear(self.q_proj, hidden).view(shape),
            apply_linear(self.k_proj, hidden).view(shape),
            apply_linear(self.v_proj, hidden).view(shape),
        )

    def rotate(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Rotary embedding of x [B, T, heads, D] at the positions of `layout`."""
        return apply_rotary(x, *layout.rotary(self.head_dim, self.options.rope_theta))

    def output(self, out: Tensor) -> Tensor:
        """Heads [B, T, H, D] → hidden [B, T, hidden_size]."""
        return apply_linear(self.o_proj, out.reshape(*out.shape[:2], -1))

    def _attention_flops(self, pairs: int) -> int:
        maps = sum(count_weights(layer) for layer in self.children() if isinstance(layer, nn.Linear))
        return 2 * maps + 4 * pairs * self.options.num_heads * self.head_dim


class FullAttention(SoftmaxAttention):
    """Causal attention over everything. Its cache grows with every token."""

    Options = AttentionOptions

    @classmethod
    def make_state(cls, options: AttentionOptions) -> FullState:
        return FullState(options.kv_heads, options.dim)

    def flops_per_token(self, context: int) -> int:
        return self._attention_flops(context)

    def forward(self, hidden: Tensor, layout: TokenLayout, state: MixerState | None = None) -> MixerOutput:
        q, k, v = self.project(hidden)
        q, k = self.rotate(q, layout), self.rotate(k, layout)
        real = layout.real
        if isinstance(state, FullState):
            k, v, real = state.append(k, v, layout)
        visible_until = None
        if layout.last_columns is not None:
            visible_until = layout.last_columns.unsqueeze(2)
        elif real is not None:
            visible_until = q.new_full((*real.shape, 1), FOREVER, dtype=torch.long)
        if visible_until is not None and real is not None:
            visible_until = visible_until.masked_fill(~real.unsqueeze(2), EMPTY)
        return MixerOutput(self.output(retained_attention(q, k, v, visible_until, None)))


class SlidingAttention(SoftmaxAttention):
    """Causal attention over the last `window` tokens, the token itself included. Its cache has `window` slots."""

    Options = SlidingAttentionOptions

    @classmethod
    def make_state(cls, options: SlidingAttentionOptions) -> WindowState:
        return WindowState(options.kv_heads, options.dim, options.window - 1)

    def flops_per_token(self, context: int) -> int:
        return self._attention_flops(min(context, self.options.window))

    def forward(self, hidden: Tensor, layout: TokenLayout, state: MixerState | None = None) -> MixerOutput:
        q, k, v = self.project(hidden)
        q, k = self.rotate(q, layout), self.rotate(k, layout)
        window = self.options.window - 1
        if not isinstance(state, WindowState):
            visible_until = within_window(k.shape[1], window, layout)
            return MixerOutput(self.output(retained_attention(q, k, v, visible_until, window)))
        if state.is_short(q, layout):
            return MixerOutput(self.output(state.steps(q, k, v, None, 0, layout.real)))
        rows = gather_rows(k, v, None, layout, state)
        visible_until = None
        if not layout.fresh or layout.real is not None:
            until = torch.arange(rows.keys.shape[1], device=k.device)[:, None] + window
            visible_until = torch.where(rows.positions[:, :, :1] >= 0, until, EMPTY)
        out = retained_attention(q, rows.keys, rows.values, visible_until, window)
        state.write_rows(rows, None, layout)
        return MixerOutput(self.output(out))


def within_window(length: int, window: int, layout: TokenLayout) -> Tensor | None:
    """visible_until [B, T, 1] of a plain sliding window with pads and packed documents; None where it has neither."""
    if layout.real is None and layout.last_columns is None:
        return None
    until = torch.arange(length, device=layout.positions.device).expand(layout.batch_size, -1) + window
    return confine(until.unsqueeze(2), layout)


def confine(visible_until: Tensor, layout: TokenLayout) -> Tensor:
    """End what queries see at the end of their document, and hide pads. visible_until [B, T, heads]."""
    if layout.last_columns is not None:
        visible_until = torch.minimum(visible_until, layout.last_columns.unsqueeze(2))
    if layout.real is not None:
        visible_until = visible_until.masked_fill(~layout.real.unsqueeze(2), EMPTY)
    return visible_until


def gather_rows(k: Tensor, v: Tensor, scores: Tensor | None, layout: TokenLayout, state: WindowState) -> PastRows:
    """The pairs of the past and of this call in one sequence, oldest first.

    Args:
        k, v: [B, T, Hkv, D]. scores: [B, reach + T, Hkv], also of the tokens whose scores were not final before;
            None for a state without a store.
    """
    positions = layout.token_positions.unsqueeze(2).expand(-1, -1, k.shape[2])
    if layout.fresh:
        chunk = torch.zeros_like(positions, dtype=torch.float32) if scores is None else scores[:, -k.shape[1] :]
        return PastRows(k, v, chunk, positions)
    past, pads = state.past_rows(), layout.num_pads
    joined = join_past(past.scores, torch.zeros_like(positions, dtype=torch.float32), pads)
    if scores is not None:
        latest = joined[:, -scores.shape[1] :]
        if pads is not None:
            # As many of the rescored rows as there are pads are older tokens: their scores were final already.
            index = torch.arange(scores.shape[1], device=scores.device)
            scores = torch.where((index < pads.unsqueeze(1)).unsqueeze(2), latest, scores)
        joined = torch.cat([joined[:, : -scores.shape[1]], scores], dim=1)
    keys, values = join_past(past.keys, k, pads), join_past(past.values, v, pads)
    return PastRows(keys, values, joined, join_past(past.positions, positions, pads))


class FullState(MixerState):
    """All keys and values, [B, Hkv, capacity, D] each; the capacity grows by blocks of `block` columns.

    real [B, capacity] bool is False at pads.
    """

    growing = True
    block = 256

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim

    def spec(self, batch_size: int, dtype: torch.dtype, tokens: int = 0) -> dict[str, TensorSpec]:
        capacity = -(-tokens // self.block) * self.block
        rows = (batch_size, self.num_kv_heads, capacity, self.head_dim)
        return {
            "keys": TensorSpec(rows, dtype),
            "values": TensorSpec(rows, dtype),
            "real": TensorSpec((batch_size, capacity), torch.bool),
        }

    def append(self, k: Tensor, v: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
        """Add the columns of a call; k, v [B, T, Hkv, D] → all keys and values [B, total, Hkv, D], real [B, total]."""
        self.allocate(k.shape[0], k.dtype, k.device)
        start, total = self.columns, self.columns + k.shape[1]
        if total > self.keys.shape[2]:
            for name, entry in self.spec(k.shape[0], self.dtype, total).items():
                grown = torch.full(entry.shape, entry.fill, dtype=entry.dtype, device=self.device)
                time = 1 if name == "real" else 2
                grown.narrow(time, 0, start).copy_(self.tensors[name].narrow(time, 0, start))
                self.tensors[name] = grown
        self.keys[:, :, start:total] = k.transpose(1, 2)
        self.values[:, :, start:total] = v.transpose(1, 2)
        self.real[:, start:total] = True if layout.real is None else layout.real
        keys, values = self.keys[:, :, :total].transpose(1, 2), self.values[:, :, :total].transpose(1, 2)
        return keys.to(k.dtype), values.to(v.dtype), self.real[:, :total]
