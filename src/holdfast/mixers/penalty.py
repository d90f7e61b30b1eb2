"""What keeps the number of kept pairs down: the penalty on retention scores, and the count that steers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.mixers.layout import TokenLayout
from holdfast.mixers.learned_eviction import LearnedEviction


def count_kept(scores: Sequence[Tensor], penalised: Tensor, sequences: int | Tensor) -> Tensor:
    """Pairs with a positive score per sequence, [L, Hkv] fp32 without gradient.

    Args:
        scores: one [B, T, Hkv] per layer.
        penalised: [B, T] bool, the positions that count.
        sequences: in the batch; packed rows hold several.
    """
    return ((torch.stack(list(scores)).detach() > 0) & penalised.unsqueeze(2)).sum((1, 2)) / sequences


def retention_penalty(scores: Sequence[Tensor], l1_lambda: Tensor, penalised: Tensor) -> Tensor:
    """Mean over positions, layers and KV heads of λ·ReLU(s), a scalar (specification §3.6).

    Where λ is negative it is |λ|·ReLU(−s), which raises scores (`ControllerConfig.two_sided`).

    Args:
        scores: one [B, T, Hkv] per layer.
        l1_lambda: [L, Hkv] λ.
        penalised: [B, T] bool, the positions that count.
    """
    count = penalised.sum().clamp(min=1)
    per_layer = [
        (F.relu(torch.where(lam < 0, -s, s)) * lam.abs()).masked_fill(~penalised.unsqueeze(2), 0).sum()
        / (count * s.shape[2])
        for s, lam in zip(scores, l1_lambda, strict=True)
    ]
    return torch.stack(per_layer).mean()


class Float32Buffers(nn.Module):
    """A module whose own buffers keep their dtype under .half() and .to(dtype): λ begins at 1e-9, which fp16 lacks."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class RetentionPenalty(Float32Buffers):
    """λ, counts and penalty of learned eviction in a model of your own (`HybridForCausalLM` has its own).

    As a submodule of the model, it saves λ and the average counts with the weights. In a training step:

        loss = cross_entropy + penalty(scores, layout)
        loss.backward()
        optimizer.step()
        controller.step(penalty.kept)  # a holdfast.training.BudgetController(penalty, budget=...)

    Args:
        model: the model, or any module that holds its `LearnedEviction` layers; all have equally many KV heads.

    Attributes:
        l1_lambda, num_kept: [L, Hkv] fp32 buffers, λ and the average counts, in the order of `model.modules()`.
        kept: [L, Hkv] fp32, the counts of the last call.

    Raises:
        ValueError: if the model has no such layers, or their numbers of KV heads differ.
    """

    l1_lambda: Tensor
    num_kept: Tensor
    kept: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layers = [module for module in model.modules() if isinstance(module, LearnedEviction)]
        heads = {layer.options.kv_heads for layer in layers}
        if len(heads) != 1:
            raise ValueError(f"LearnedEviction layers must have one number of KV heads, got {sorted(heads)}")
        shape = (len(layers), heads.pop())
        self._reach = max(layer.router.reach for layer in layers)
        self.register_buffer("l1_lambda", torch.zeros(shape))
        self.register_buffer("num_kept", torch.zeros(shape))

    def forward(self, scores: Sequence[Tensor], layout: TokenLayout) -> Tensor:
        """The penalty, a scalar to be added to the loss; counts what is kept.

        Args:
            scores: `MixerOutput.scores` of every `LearnedEviction` layer, [B, T, Hkv] each, in order.
            layout: that the layers were given.
        """
        penalised = layout.followed_by(self._reach)
        self.kept = count_kept(scores, penalised, layout.num_sequences)
        return retention_penalty(scores, self.l1_lambda, penalised)
