"""Rotary position embedding, the two halves of each head rotated (the GPT-NeoX and Llama layout)."""

import torch
from torch import Tensor

from holdfast.ops import fused
from holdfast.ops.precision import compute_dtype


def rotary_tables(positions: Tensor, dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position × frequency, frequency c being theta^(-2c/dim).

    Frequencies are rounded to float32 as published models have them; the product with the position and its
    reduction to one turn are in float64 (float32 on devices without it), so that positions of 10⁶ and beyond,
    where a float32 angle would be wrong by a tenth of a radian, still rotate by exact differences.

    Args:
        positions: [B, T] absolute positions, integer.
        dim: the head dimension that is rotated, even.
        theta: the base of the frequencies.

    Returns:
        (cos, sin), both float32 [B, T, dim/2], on the device of positions.

    Raises:
        ValueError: dim is not a positive even number.
        TypeError: positions are not integers.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"dim is {dim}: rotary embedding needs a positive even head dimension.")
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise TypeError(f"positions have dtype {positions.dtype}: give integers.")
    device = positions.device
    angle_dtype = torch.float32 if device.type == "mps" else torch.float64
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    angles = positions.to(angle_dtype).unsqueeze(-1) * frequencies.to(angle_dtype)
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[c], x[c + D/2]) by the angle of its position and frequency.

    Args:
        x: [B, T, heads, D], any floating dtype, D even.
        cos, sin: [B, T, D/2] (or [1, T, D/2], shared by the batch), from `rotary_tables`.

    Returns:
        Same shape and dtype as x; computed in float32 (float64 for float64).

    Raises:
        ValueError: the tables do not fit x.
    """
    B, T, _, D = x.shape
    if cos.shape != sin.shape or cos.shape[0] not in (1, B) or cos.shape[1:] != (T, D // 2) or D % 2:
        raise ValueError(
            f"cos {list(cos.shape)} and sin {list(sin.shape)} do not fit x {list(x.shape)}: "
            "make them with rotary_tables(positions, D) for the positions of x."
        )
    if not (cos.requires_grad or sin.requires_grad) and fused.serves(x, cos, sin):
        return fused.rotated(x, cos, sin)
    dtype = compute_dtype(x)
    cos, sin = cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
