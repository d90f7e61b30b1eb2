"""Dropout whose random numbers do not take longer than what they are for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.ops.native import is_watched

_BITS = 16


def dropout(x: Tensor, p: float) -> Tensor:
    """Set elements of x to zero with probability p, and divide the rest by the probability that they stay.

    On a CPU, PyTorch draws one number after the other for as many elements, in one thread (9 ns each; a quarter of a
    layer's scorer). Here a 64-bit number serves four elements, so p is rounded to a multiple of 2⁻¹⁶.

    Args:
        x: any shape and floating dtype.
        p: in [0, 1].

    Returns:
        Same shape and dtype as x; x itself for p = 0. Random numbers are those of PyTorch's default generator.
    """
    if p == 0:
        return x
    if x.device.type != "cpu" or type(x) is not Tensor or is_watched() or p >= 1:
        return F.dropout(x, p)
    levels = 1 << _BITS
    dropped = min(round(p * levels), levels - 1)
    words = torch.empty(-(-x.numel() * _BITS // 64), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    stays = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - levels // 2
    return x * (stays * (levels / (levels - dropped))).to(x.dtype)
