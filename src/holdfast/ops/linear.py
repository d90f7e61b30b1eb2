"""Linear layers, of which a decoded token is little else."""

import torch
from torch import Tensor, nn

from holdfast.ops import one_token

__all__ = ["apply_linear"]


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`; for a single token, in C++ that reads the weights with all threads.

    A library's product of a matrix and a vector keeps to one thread, or gains nothing by more; one core alone cannot
    read as fast as memory gives. What has taken the place of an nn.Linear (quantised, low-rank adapted, distributed
    layers), and layers with hooks or a `forward` of their own, are called as they are.

    Args:
        layer: an nn.Linear, or what replaced it.
        x: [..., in_features].

    Returns:
        [..., out_features]. O(in · out) time for each row.
    """
    if x.shape[:-1].numel() != 1 or type(layer) is not nn.Linear or _is_hooked(layer):
        return layer(x)
    weight, bias = layer.weight, layer.bias
    if not one_token.serves(x, weight, bias) or torch.is_autocast_enabled("cpu"):
        return layer(x)
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        return layer(x)  # which says what is wrong
    return one_token.linear(x, weight, bias)


def _is_hooked(layer: nn.Module) -> bool:
    every = nn.modules.module
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        every._global_forward_hooks,
        every._global_forward_pre_hooks,
    )
    return any(hooks) or "forward" in layer.__dict__  # as accelerate's hooks leave one
