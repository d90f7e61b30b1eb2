"""Native Sparse Attention: compressed blocks of the whole past, a few blocks in full, and a sliding window.

Yuan et al., "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention", arXiv 2502.11089;
between layers of Gated DeltaNet (laNSA) in He & Garner, arXiv 2510.20787; specification §3.7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.mixers.base import MixerOutput, linear, require
from holdfast.mixers.layout import TokenLayout
from holdfast.mixers.softmax_attention import AttentionOptions, SoftmaxAttention
from holdfast.mixers.state import MixerState, TensorSpec
from holdfast.ops.linear import apply_linear
from holdfast.ops.native_sparse_attention import native_sparse_attention


@dataclass(frozen=True)
class NativeSparseOptions(AttentionOptions):
    """Settings of Native Sparse Attention: those of full attention, and

    Attributes:
        block_size: tokens of a block, S.
        num_blocks: blocks that a query reads in full, n.
        window: of the sliding branch; counts the token itself.
    """

    block_size: int = 64
    num_blocks: int = 16
    window: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block_size", "num_blocks", "window"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")


class NativeSparseAttention(SoftmaxAttention):
    """Attention of each query over the means of all blocks, the blocks that matter most, and a window.

    Its cache grows with every token, as that of full attention; a step reads O(T / S + n·S + window) of it.
    """

    Options = NativeSparseOptions

    def __init__(self, hidden_size: int, norm_eps: float, options: NativeSparseOptions) -> None:
        super().__init__(hidden_size, norm_eps, options)
        self.g_proj = linear(hidden_size, 3 * options.num_heads)

    @classmethod
    def make_state(cls, options: NativeSparseOptions) -> NativeSparseState:
        return NativeSparseState(options.kv_heads, options.dim, options.block_size)

    def flops_per_token(self, context: int) -> int:
        options = self.options
        selected = min(context, options.num_blocks * options.block_size)
        return self._attention_flops(context // options.block_size + selected + min(context, options.window))

    def forward(self, hidden: Tensor, layout: TokenLayout, state: MixerState | None = None) -> MixerOutput:
        q, k, v = self.project(hidden)
        q, k = self.rotate(q, layout), self.rotate(k, layout)
        k, v = tokens_first(k, layout), tokens_first(v, layout)
        lengths, compressed = None if layout.real is None else layout.num_real, None
        if isinstance(state, NativeSparseState):
            state.append(k, v, layout)
            if not layout.fresh:
                keys, values, compressed = state.pairs(layout.length)
                k, v = keys.to(k.dtype), values.to(v.dtype)
                lengths = layout.seen + layout.num_real
        out, blocks = native_sparse_attention(
            q,
            k,
            v,
            apply_linear(self.g_proj, hidden).sigmoid().unflatten(2, (-1, 3)),
            block_size=self.options.block_size,
            num_blocks=self.options.num_blocks,
            window=self.options.window,
            lengths=lengths,
            cu_seqlens=layout.cu_seqlens,
            compressed=compressed,
        )
        return MixerOutput(self.output(out), blocks=blocks)


def tokens_first(rows: Tensor, layout: TokenLayout) -> Tensor:
    """Rows [B, T, ...] with the pads, which stand in front, moved behind the tokens: blocks are counted from there."""
    if layout.num_pads is None:
        return rows
    order = (torch.arange(rows.shape[1], device=rows.device) + layout.num_pads.unsqueeze(1)) % rows.shape[1]
    return rows.gather(1, order.view(*order.shape, *[1] * (rows.dim() - 2)).expand_as(rows))


class NativeSparseState(MixerState):
    """All keys and values, and the means of their blocks. The pair of position p stands in row p; pads are not stored.

    Tensors: keys, values [B, Hkv, capacity, D] in the model's dtype; mean_keys, mean_values [B, Hkv, capacity / S, D]
    in fp32 (fp64 for fp64), to which each token adds its share. The capacity is a whole number of blocks, at most
    an eighth or a block more than needed, so that growing costs O(1) copies per token.
    """

    growing = True

    def __init__(self, num_kv_heads: int, head_dim: int, block_size: int) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim, self.block_size = num_kv_heads, head_dim, block_size

    def spec(self, batch_size: int, dtype: torch.dtype, tokens: int = 0) -> dict[str, TensorSpec]:
        needed = -(-tokens // self.block_size)
        step = 1 << max(0, needed.bit_length() - 4)
        blocks = -(-needed // step) * step
        rows = (batch_size, self.num_kv_heads, blocks * self.block_size, self.head_dim)
        means = (batch_size, self.num_kv_heads, blocks, self.head_dim)
        exact = torch.promote_types(dtype, torch.float32)
        return {
            "keys": TensorSpec(rows, dtype),
            "values": TensorSpec(rows, dtype),
            "mean_keys": TensorSpec(means, exact),
            "mean_values": TensorSpec(means, exact),
        }

    def append(self, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
        """Add the tokens of a call; k, v [B, T, Hkv, D], each row's tokens before its pads. O(T) time."""
        self.allocate(k.shape[0], k.dtype, k.device)
        self._reserve(self.columns + k.shape[1])
        # Pads fall behind the tokens, into rows that later tokens overwrite and nothing reads before.
        column = torch.arange(k.shape[1], device=k.device)
        batch = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
        row = layout.seen.unsqueeze(1) + column  # [B, T]
        real = column < layout.num_real.unsqueeze(1)
        for name, new in (("keys", k), ("values", v)):
            rows, means = (self.tensors[of].transpose(1, 2) for of in (name, f"mean_{name}"))
            rows[batch, row] = new.to(self.dtype)
            share = new.to(means.dtype) * (real / self.block_size).to(means.dtype)[:, :, None, None]
            means.index_put_((batch, row // self.block_size), share, accumulate=True)

    def pairs(self, columns: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Keys and values [B, Tk, Hkv, D] up to the `columns` just added, and their means [B, Tk / S, Hkv, D]; views.

        Tk is a whole number of blocks; rows that hold no token yet are finite.
        """
        blocks = -(-(self.columns + columns) // self.block_size)
        rows = slice(0, blocks * self.block_size)
        keys, values = (x[:, :, rows].transpose(1, 2) for x in (self.keys, self.values))
        mean_keys, mean_values = (x[:, :, :blocks].transpose(1, 2) for x in (self.mean_keys, self.mean_values))
        return keys, values, (mean_keys, mean_values)

    def _reserve(self, tokens: int) -> None:
        batch_size, _, held = self.keys.shape[:3]
        if tokens <= held:
            return
        for name, entry in self.spec(batch_size, self.dtype, tokens).items():
            old = self.tensors[name]
            grown = torch.full(entry.shape, entry.fill, dtype=entry.dtype, device=self.device)
            grown[:, :, : old.shape[2]] = old
            self.tensors[name] = grown
