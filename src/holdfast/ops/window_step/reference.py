"""The decoding step, row by row and head by head, in plain Python."""

import torch
from torch import Tensor

from holdfast.ops.precision import compute_dtype
from holdfast.ops.window_step.slots import EMPTY, Slots


def window_step_reference(
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
    out, exact = torch.zeros_like(q), q.to(compute_dtype(q))
    kv_heads, groups = key.shape[1], q.shape[1] // key.shape[1]
    for b in range(q.shape[0]):
        advances = real is None or bool(real[b])
        seen = int(slots.seen[b])
        for h in range(kv_heads):
            if advances:
                _push(slots, b, h, seen, None if score is None else float(score[b, h]), sinks, delay)
                slot = slots.budget + seen % slots.ring_size
                slots.keys[b, h, slot] = key[b, h]
                slots.values[b, h, slot] = value[b, h]
            held = [] if slots.positions is None else [p != EMPTY for p in slots.positions[b, h].tolist()]
            held += [slot < seen + advances for slot in range(slots.ring_size)]
            if not any(held):
                continue
            keys, values = slots.keys[b, h, held].to(exact.dtype), slots.values[b, h, held].to(exact.dtype)
            for head in range(h * groups, (h + 1) * groups):
                out[b, head] = torch.softmax(keys @ exact[b, head] * scale, dim=0) @ values
        slots.seen[b] += advances
    return out


def _push(slots: Slots, b: int, h: int, seen: int, score: float | None, sinks: int, delay: int) -> None:
    """Note the final score, and move the pair that leaves into the store, if it is worth it."""
    if slots.scores is None or slots.positions is None or score is None:
        return
    budget, size = slots.budget, slots.ring_size
    scores, positions = slots.scores[b, h], slots.positions[b, h]
    leaving = seen - size
    own = float(scores[budget + seen % size])
    if seen >= delay:
        scores[budget + (seen - delay) % size] = score
        own = score if delay == size else own
    if leaving < 0:
        return
    own = float("inf") if leaving < sinks else own
    stored = list(zip(scores[:budget].tolist(), positions.tolist(), strict=True))
    target = min(range(budget), key=lambda slot: (stored[slot][0], -stored[slot][1], slot))
    if own > 0 and own > stored[target][0]:
        slot = budget + seen % size
        scores[target], positions[target] = own, leaving
        slots.keys[b, h, target] = slots.keys[b, h, slot]
        slots.values[b, h, target] = slots.values[b, h, slot]
