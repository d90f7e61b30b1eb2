"""Normalisations over the last dimension, all computed in at least float32."""

import torch.nn.functional as F
from torch import Tensor

from holdfast.ops import fused
from holdfast.ops.precision import compute_dtype


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale the vectors of the last dimension to unit length: x · (Σx² + eps)^-½.

    A zero vector (a pad) stays zero and has a finite gradient.

    Args:
        x: any shape [..., D], any floating dtype.
        eps: added to the sum of squares, not to the length.

    Returns:
        Same shape and dtype as x; computed in float32 (float64 for float64).
    """
    if fused.serves(x):
        return fused.scaled(x, None, None, 1.0, eps)
    y = x.to(compute_dtype(x))
    return (y * (y.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square normalisation: x · (mean(x²) + eps)^-½ · weight.

    Args:
        x: [..., D], any floating dtype.
        weight: [D].
        eps: added to the mean square.

    Returns:
        Same shape and dtype as x; normalised and weighted in float32 (float64 for float64) before the cast.

    Raises:
        ValueError: weight is not [D].
    """
    _check(x, weight)
    if fused.serves(x, weight):
        return fused.scaled(x, weight, None, x.shape[-1], eps)
    return _weighted_rms(x, weight, eps).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """rms_norm(x, weight) · SiLU(gate), the output norm of Gated DeltaNet (specification §3.1).

    Args:
        x: [..., D], any floating dtype.
        gate: same shape as x.
        weight: [D].
        eps: added to the mean square.

    Returns:
        Same shape and dtype as x; computed in float32 (float64 for float64) before the cast.

    Raises:
        ValueError: weight is not [D], or gate and x differ in shape.
    """
    if gate.shape != x.shape:
        raise ValueError(
            f"gate has shape {list(gate.shape)} but x has {list(x.shape)}: give one gate per element of x."
        )
    _check(x, weight)
    if fused.serves(x, weight, gate):
        return fused.scaled(x, weight, gate, x.shape[-1], eps)
    y = _weighted_rms(x, weight, eps)
    return (y * F.silu(gate.to(y.dtype))).to(x.dtype)


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight has shape {list(weight.shape)} but x ends in {x.shape[-1]}: give one weight per channel."
        )


def _weighted_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = compute_dtype(x)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps)
