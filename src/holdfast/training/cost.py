"""What training by a recipe costs, known before anything is allocated: tokens, operations, memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from holdfast.info import flops_per_token
from holdfast.modeling import HybridForCausalLM
from holdfast.training.recipe import NeedleData, Recipe

# Bytes that autograd keeps per token and output of a linear map of a block, in fp32 and under bf16 autocast. Measured
# on a CPU with the PyTorch operators; a test measures again. Fused kernels keep less.
_KEPT = {
    "gated_deltanet": (15.0, 14.0),
    "full_attention": (8.0, 6.0),
    "sliding_attention": (8.5, 6.0),
    "learned_eviction": (12.0, 8.0),
    "native_sparse_attention": (11.5, 9.5),
}
_KEPT_ELSEWHERE = (12.0, 10.0)  # by a mixer that is not in the table
_LOGIT_BYTES = 16  # logits, their fp32 copy, its logarithms, and the gradients of these
_STATE_BYTES = 16  # weight, gradient and AdamW's two moments, all fp32


@dataclass(frozen=True)
class TrainingCost:
    """Result of `describe_training`.

    Attributes:
        tokens_per_step: of one optimizer step, over all devices.
        tokens: of the whole run.
        flops: of the whole run, forward and backward, recomputation included.
        state_bytes: weights, gradients and optimizer; sharding (FSDP2) divides them by the number of devices.
        activation_bytes: what one micro-batch keeps for the backward pass, an estimate (see `describe_training`).
    """

    tokens_per_step: int
    tokens: int
    flops: int
    state_bytes: int
    activation_bytes: int

    def to_dict(self) -> dict[str, int]:
        """A plain dictionary, ready for JSON."""
        return dataclasses.asdict(self)


def describe_training(recipe: Recipe) -> TrainingCost:
    """What training by this recipe costs. Nothing is allocated, however large the model is.

    The activations are an estimate: for every kind of mixer a measured number of bytes per token and output of a
    linear map, and the logits. They hold for this library's PyTorch operators within about a quarter; fused kernels
    and torch.compile need less. The operators' own working memory is not counted.
    """
    config, training = recipe.build_config(), recipe.training
    length = recipe.data.task.length if isinstance(recipe.data, NeedleData) else recipe.data.length
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    tokens_per_step = training.batch_size * training.accumulation * length
    tokens = tokens_per_step * training.max_steps
    passes = 4 if training.gradient_checkpointing else 3  # a backward pass is two forward ones
    assert config.mixers is not None
    blocks = [
        _bytes_per_token(block, name, training.bf16)
        for block, name in zip(model.model.layers, config.mixers, strict=True)
    ]
    if training.gradient_checkpointing:  # the inputs of all blocks, and everything of one
        blocks = [4 * config.hidden_size * len(blocks), max(blocks)]
    return TrainingCost(
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        flops=passes * flops_per_token(model, max(1, length // 2)) * tokens,
        state_bytes=_STATE_BYTES * sum(parameter.numel() for parameter in model.parameters()),
        activation_bytes=training.batch_size * length * round(sum(blocks) + _LOGIT_BYTES * config.vocab_size),
    )


def _bytes_per_token(block: nn.Module, mixer: str, bf16: bool) -> float:
    outputs = sum(module.out_features for module in block.modules() if isinstance(module, nn.Linear))
    return outputs * _KEPT.get(mixer, _KEPT_ELSEWHERE)[bf16]
