"""Linear layers, of which a decoded token is little else."""

import torch
from torch import Tensor, nn

from holdfast.ops import one_token

__all__ = ["apply_linear"]


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`; for a single token, in C++ that reads the weights with all threads.

    A library's product of a matrix and a vector keeps to one thread, or gains nothing by more; one core alone cannot
    read as fast as memory gives. What has taken the place of an nn.Linear (quantised, low-rank adapted, distributed
    layers), and layers with hooks, are called as they are.

    Args:
        layer: an nn.Linear, or what replaced it.
        x: [..., in_features].

    Returns:
        [..., out_features]. O(in · out) time for each row.
    """
    if x.numel() != x.shape[-1] or type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return layer(x)
    if not one_token.serves(x, layer.weight, layer.bias) or torch.is_autocast_enabled("cpu"):
        return layer(x)
    return one_token.linear(x, layer.weight, layer.bias)
