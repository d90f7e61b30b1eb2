"""The short causal convolution in front of a linear-attention layer (specification §3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.ops import fused, one_token
from holdfast.ops.precision import compute_dtype, without_autocast


def short_convolution(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None = None,
    *,
    activation: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over time: y_t = Σ_l weight[W-1-l] · x_{t-l}, then SiLU.

    Any number of calls, each given the state that the one before returned, equals one call on the whole sequence.
    Zeros in x (pads in front of a sequence) act as the start of the sequence does. Time O(T·C·W).

    Args:
        x: [B, T, C], any floating dtype, T ≥ 1.
        weight: [C, 1, W], the layout of published checkpoints; weight[:, :, W-1] meets the current token.
        state: [B, C, W-1], the last inputs of the sequence so far, oldest first; None stands for zeros. Not modified.
        activation: apply SiLU to the result.
        cu_seqlens: integer [N+1], offsets 0 … T of N sequences packed into the one row of x (B = 1), some perhaps
            empty; none then sees another. Excludes state.

    Returns:
        (y, new_state): y [B, T, C] and new_state [B, C, W-1], both in x's dtype. Sums are taken in float32 (float64 for
        float64), under autocast too. With cu_seqlens, new_state holds the last inputs of the row, whatever their
        sequence.

    Raises:
        ValueError: a shape does not fit, or state and cu_seqlens are given together.
    """
    _check(x, weight, state, cu_seqlens)
    B, T, C = x.shape
    if T == 1 and state is not None and one_token.serves(x, weight, state):
        return one_token.convolve(x, weight, state, activation)
    past = x.new_zeros(B, weight.shape[-1] - 1, C) if state is None else state.transpose(1, 2).to(x.dtype)
    if activation and cu_seqlens is None and not past.requires_grad and fused.serves(x, past, weight):
        keep = past.shape[1]
        latest = torch.cat((past, x[:, max(T - keep, 0) :]), dim=1)
        return fused.convolution(x, past, weight), latest[:, latest.shape[1] - keep :].transpose(1, 2).contiguous()
    rows = torch.cat((past, x), dim=1)
    if T == 1:
        y = (rows.to(compute_dtype(x)) * weight[:, 0].t()).sum(1, keepdim=True)
    elif cu_seqlens is None:
        y = _convolve(rows, weight)
    else:
        y = _convolve_packed(x, weight, cu_seqlens)
    return (F.silu(y) if activation else y).to(x.dtype), rows[:, T:].transpose(1, 2).contiguous()


def _convolve(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows [B, T+W-1, C] → [B, T, C], no padding, in the compute dtype."""
    dtype = compute_dtype(rows)
    rows, weight = rows.to(dtype), weight.to(dtype)
    with without_autocast(rows):
        if rows.device.type != "cpu":
            return F.conv1d(rows.transpose(1, 2), weight, groups=len(weight)).transpose(1, 2)
        # On a CPU, convolving images one pixel high with channels last, as rows have them, is twice as fast.
        image = rows.transpose(1, 2).unsqueeze(2)
        return F.conv2d(image, weight.unsqueeze(2), groups=len(weight)).squeeze(2).transpose(1, 2)


def _convolve_packed(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The same for sequences packed in x [1, T, C]: W-1 rows of zeros go in front of each."""
    (_, T, C), gap = x.shape, weight.shape[-1] - 1
    token = torch.arange(T, device=x.device, dtype=cu_seqlens.dtype)
    # The count of sequences begun so far is the number of gaps in front of a token.
    place = token + gap * torch.searchsorted(cu_seqlens[:-1], token, right=True)
    rows = x.new_zeros(1, T + gap * (len(cu_seqlens) - 1), C).index_copy(1, place.long(), x)
    return _convolve(rows, weight).index_select(1, place - gap)


def _check(x: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {list(x.shape)}: give [B, T, C] with at least one token.")
    B, _, C = x.shape
    if weight.ndim != 3 or weight.shape[:2] != (C, 1):
        raise ValueError(f"weight has shape {list(weight.shape)}: x has {C} channels, so give [{C}, 1, W].")
    W = weight.shape[-1]
    if state is not None and state.shape != (B, C, W - 1):
        raise ValueError(f"state has shape {list(state.shape)}: give [{B}, {C}, {W - 1}], the last inputs.")
    if cu_seqlens is not None and state is not None:
        raise ValueError("state and cu_seqlens exclude each other: packed sequences all start from nothing.")
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1 but x has {B} rows: pack all sequences into one row.")
