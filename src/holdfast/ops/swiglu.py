"""The gated activation of the feed-forward layers."""

import torch.nn.functional as F
from torch import Tensor

from holdfast.ops import fused


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up (Shazeer, arXiv 2002.05202).

    Args:
        gate, up: one shape, any floating dtype.

    Returns:
        Same shape and dtype, element by element.
    """
    if gate.shape == up.shape and fused.serves(gate, up):
        return fused.swiglu(gate, up)
    return F.silu(gate) * up
