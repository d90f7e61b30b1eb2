"""The decoding step in PyTorch, for any device, differentiable."""

import torch
from torch import Tensor
from torch.nn import functional as F

from holdfast.ops.second_derivatives import differentiable_once
from holdfast.ops.window_step.slots import EMPTY, Slots, ring_positions


def window_step_pytorch(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    score: Tensor | None,
    real: Tensor | None,
    sinks: int,
    delay: int,
    scale: float,
) -> Tensor:
    """The contract of `window_step`."""
    batch = torch.arange(q.shape[0], device=q.device)
    slot = slots.budget + slots.seen % slots.ring_size
    if slots.scores is not None and slots.positions is not None and slots.budget and score is not None:
        # The final score may be the leaving pair's, which is decided by it; but without delay it is the new token's,
        # and its slot is still the leaving pair's.
        if delay:
            _store_score(slots.scores, slots, score, batch, real, delay)
        _retire(slots.scores, slots.positions, slots, batch, slot, sinks, real)
        if not delay:
            _store_score(slots.scores, slots, score, batch, real, delay)
    for tensor, new in ((slots.keys, key), (slots.values, value)):
        if real is not None:
            new = torch.where(real[:, None, None], new, tensor[batch, :, slot])
        tensor[batch, :, slot] = new.to(tensor.dtype)
    slots.seen.add_(1 if real is None else real)
    return _attend(q, slots, scale)


def _store_score(scores: Tensor, slots: Slots, score: Tensor, batch: Tensor, real: Tensor | None, delay: int) -> None:
    position = slots.seen - delay
    slot = slots.budget + position % slots.ring_size
    exists = position >= 0 if real is None else (position >= 0) & real
    scores[batch, :, slot] = torch.where(exists[:, None], score, scores[batch, :, slot])


def _retire(
    scores: Tensor, positions: Tensor, slots: Slots, batch: Tensor, slot: Tensor, sinks: int, real: Tensor | None
) -> None:
    """Move the pair in ring slot `slot` [B], which leaves the window, into the store if it is worth it."""
    position = slots.seen - slots.ring_size  # [B] of the leaving pair
    leaving = position >= 0 if real is None else (position >= 0) & real
    score = torch.where((position < sinks)[:, None], torch.inf, scores[batch, :, slot])
    stored = scores[:, :, : slots.budget]
    lowest = stored.amin(dim=2)
    # Of several lowest the latest goes: at equal scores the earlier pair has the right to stay.
    age = torch.where(stored == lowest.unsqueeze(2), positions, EMPTY - 1)
    target = age.argmax(dim=2, keepdim=True)  # [B, Hkv, 1]
    enters = ((score > 0) & (score > lowest) & leaving[:, None]).unsqueeze(2)
    for tensor, new in ((scores, score), (positions, position[:, None].expand_as(score).int())):
        tensor.scatter_(2, target, torch.where(enters, new.unsqueeze(2), tensor.gather(2, target)))
    wide = target.unsqueeze(3).expand(-1, -1, -1, slots.keys.shape[3])
    for tensor in (slots.keys, slots.values):
        moved = torch.where(enters.unsqueeze(3), tensor[batch, :, slot].unsqueeze(2), tensor.gather(2, wide))
        tensor.scatter_(2, wide, moved)


def _attend(q: Tensor, slots: Slots, scale: float) -> Tensor:
    batch, heads, dim = q.shape
    kv_heads = slots.keys.shape[1]
    groups = q.reshape(batch, kv_heads, heads // kv_heads, dim)  # the group takes the place of time
    visible = (ring_positions(slots.seen, slots.ring_size) >= 0).unsqueeze(1)
    if slots.positions is not None:
        visible = torch.cat([slots.positions >= 0, visible.expand(-1, kv_heads, -1)], dim=2)
    keys, values = slots.keys.to(q.dtype), slots.values.to(q.dtype)
    groups, keys, values = differentiable_once("window_step", "pytorch", groups, keys, values)
    out = F.scaled_dot_product_attention(groups, keys, values, attn_mask=visible.unsqueeze(2), scale=scale)
    return out.reshape(batch, heads, dim)
