"""The network that decides which key/value pairs are worth keeping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.mixers.base import require
from holdfast.ops import one_token
from holdfast.ops.grouped_convolution import grouped_convolution, serves
from holdfast.ops.native import is_plain

# From so many tokens on, on a CPU without gradients and without C++, the framework's grouped convolutions are faster
# than batched products of taps laid side by side (docs/performance.md).
_LONG = 512


class ConvScorer(nn.Module):
    """A small convolutional network per KV head that reads pairs with their neighbours, past and future.

    Kernels of size 1 make it a network without context (an MLP), smaller kernels or dilations shorten its reach, and a
    causal one reads the past only.

    Input is concat(key before RoPE, value); each convolution is `dropout → grouped convolution (channels halve) →
    SiLU`, the last map is 1×1 to one logit; the score is σ(logit) − threshold, so that a pair is worth keeping where
    it is positive; ½ is the published threshold (He & Garner, arXiv 2510.20787; specification §3.3). The parameters
    bear the published names and shapes; the heads are the groups of the convolutions.

    Args:
        num_heads: KV heads, each with a network of its own; with `shared`, one network serves them all.
        channels: size of one head's input, 2D.
        kernel_sizes, dilations: of the convolutions, first to last.
        dropout: probability before each convolution, in training.
        threshold: in [0, 1).
        causal: read no token after a pair, and as many more before it: R stays the same, and scores are final at once.
    """

    def __init__(
        self,
        num_heads: int,
        channels: int,
        kernel_sizes: tuple[int, ...] = (3, 3, 3),
        dilations: tuple[int, ...] = (2, 2, 2),
        dropout: float = 0.1,
        shared: bool = False,
        threshold: float = 0.5,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.shared, self.threshold = num_heads, dropout, shared, threshold
        self.causal = causal
        self.conv_stack = _ConvStack(1 if shared else num_heads, channels, kernel_sizes, dilations)
        self.receptive_field = receptive_field(kernel_sizes, dilations)

    @property
    def reach(self) -> int:
        """How many tokens after a pair its score depends on: R // 2, or 0. So many steps later the score is final."""
        return 0 if self.causal else self.receptive_field // 2

    @property
    def lookback(self) -> int:
        """How many tokens before a pair its score depends on: R // 2, or R − 1."""
        return self.receptive_field - 1 - self.reach

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """Scores of the tokens that have all their neighbours in the input.

        Args:
            features: [B, T + R − 1, Hkv, 2D], `lookback` columns before the T tokens and `reach` after them.
            valid: [B or 1, T + R − 1] bool; elsewhere (before the sequence, after it, pads) every convolution
                reads zeros.

        Returns:
            [B, T, Hkv] fp32 scores σ(logit) − threshold. O(T · R · D²) time, O(T · D) memory.
        """
        batch, length, heads, channels = features.shape
        if length == self.receptive_field and not (self.training and self.dropout) and valid.is_contiguous():
            layers = [*self.conv_stack.convs, self.conv_stack.proj]
            if one_token.serves(features, *self.conv_stack.parameters()):
                scores = one_token.score(features, valid, layers, self.shared, self.causal, self.threshold)
                return scores.unsqueeze(1)
        if self._is_long_and_plain(features):
            return by_convolutions(self, features, valid)
        x = features.permute(2, 0, 1, 3)  # [Hkv, B, time, channels]
        if self.shared:
            x = x.reshape(1, heads * batch, length, channels)
            valid = valid.expand(batch, -1).repeat(heads, 1)
        for conv in self.conv_stack.convs:
            x = conv(x, valid, self.dropout if self.training else 0.0)
            valid = self._inner(valid, x.shape[2])
        logits = self.conv_stack.proj(x).view(heads, batch, -1).permute(1, 2, 0)
        return torch.sigmoid(logits.float()) - self.threshold

    def _is_long_and_plain(self, features: Tensor) -> bool:
        if not features.is_cpu or features.dtype != torch.float32 or features.shape[0] * features.shape[1] < _LONG:
            return False
        parameters = list(self.parameters())
        if serves(features, *parameters) or not all(is_plain(y) for y in parameters):
            return False  # C++ is faster, and parameters that a hook brings are not there yet
        learns = features.requires_grad or any(weight.requires_grad for weight in parameters)
        return not (self.training and self.dropout) and not (torch.is_grad_enabled() and learns)

    def _inner(self, valid: Tensor, length: int) -> Tensor:
        """The columns of `valid` [B, time] for which a convolution has given outputs, `length` of them."""
        lost = valid.shape[1] - length
        before = lost if self.causal else lost // 2
        return valid[:, before : before + length]


def by_convolutions(scorer: ConvScorer, features: Tensor, valid: Tensor) -> Tensor:
    """What `scorer` computes without dropout, by the framework's grouped convolutions; arguments and result alike."""
    batch, _, heads, _ = features.shape
    if scorer.shared:
        rows = features.transpose(1, 2).flatten(0, 1)  # heads are further sequences
        valid = valid.expand(batch, -1).repeat_interleave(heads, dim=0)
    else:
        rows = features.flatten(2)
    for index, conv in enumerate(scorer.conv_stack.convs):
        pads = ~valid.unsqueeze(2)
        rows = rows.masked_fill_(pads, 0) if index else rows.masked_fill(pads, 0)  # the input is the caller's
        rows = F.silu(_convolved(conv, rows), inplace=True)
        valid = scorer._inner(valid, rows.shape[1])
    logits = _convolved(scorer.conv_stack.proj, rows).transpose(1, 2).reshape(batch, heads, -1).transpose(1, 2)
    return torch.sigmoid(logits.float()) - scorer.threshold


def _convolved(conv: nn.Module, rows: Tensor) -> Tensor:
    """[B, T, C] → [B, T', C']: channels stay last in memory, as the convolutions of a CPU like them."""
    return nn.Conv2d.forward(conv, rows.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)  # type: ignore[arg-type]


class _ConvStack(nn.Module):
    """Holds the parameters under their published names; `ConvScorer` computes with them."""

    def __init__(self, groups: int, channels: int, kernel_sizes: tuple[int, ...], dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        for kernel, dilation in zip(kernel_sizes, dilations, strict=True):
            self.convs.append(_ScorerConv(groups, channels, channels // 2, kernel, dilation))
            channels //= 2
        self.proj = _ScorerConv(groups, channels, 1)
        self.proj.initial_bias = 0.5  # training starts by keeping everything


class _ScorerConv(nn.Conv2d):
    """A grouped convolution over time that knows its initial values: Kaiming-normal (fan-in), and a constant bias."""

    initial_bias: float = 0.0
    bias: nn.Parameter

    def __init__(self, groups: int, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__(groups * inputs, groups * outputs, (1, kernel), dilation=(1, dilation), groups=groups)

    def forward(self, x: Tensor, valid: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        """[groups, B, T, C] → [groups, B, T', C']: a `grouped_convolution` of the columns where `valid` [B or 1, T] is
        True; without it, of a kernel of size 1, the plain product.
        """
        if valid is not None:
            return grouped_convolution(x, valid, self.weight, self.bias, self.dilation[1], dropout)
        groups, batch, length, channels = x.shape
        weight = self.weight.view(groups, -1, channels).mT
        rows = x.reshape(groups, batch * length, channels)
        return torch.baddbmm(self.bias.view(groups, 1, -1), rows, weight).view(groups, batch, length, -1)

    def init_weights(self, init: Any) -> None:
        init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")
        init.constant_(self.bias, self.initial_bias)


def receptive_field(kernel_sizes: tuple[int, ...], dilations: tuple[int, ...]) -> int:
    """R: how many neighbouring tokens one score depends on, the token included."""
    require(len(kernel_sizes) == len(dilations), "the scorer needs one dilation for each convolution")
    require(
        all(kernel > 0 and kernel % 2 == 1 for kernel in kernel_sizes),
        f"the scorer's kernel sizes must be odd and positive, got {kernel_sizes}",
    )
    require(all(step >= 1 for step in dilations), f"the scorer's dilations must be at least 1, got {dilations}")
    return 1 + sum((kernel - 1) * dilation for kernel, dilation in zip(kernel_sizes, dilations, strict=True))
