"""The tensors that a decoding step reads and changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = -1
"""Position of an empty slot of the store."""


@dataclass(frozen=True)
class Slots:
    """A store of `budget` pairs, then a ring of `ring_size` for the latest, position p in ring slot p mod ring_size.

    Attributes:
        keys, values: [B, Hkv, budget + ring_size, D], one floating dtype.
        seen: int64 [B], tokens of each row so far. A ring slot that they have not reached is empty.
        scores: fp32 [B, Hkv, budget + ring_size], −inf in empty slots of the store; None without a store.
        positions: int32 [B, Hkv, budget], `EMPTY` in empty slots; None without a store.
    """

    keys: Tensor
    values: Tensor
    seen: Tensor
    scores: Tensor | None = None
    positions: Tensor | None = None

    @property
    def budget(self) -> int:
        return 0 if self.positions is None else self.positions.shape[2]

    @property
    def ring_size(self) -> int:
        return self.keys.shape[2] - self.budget


def ring_positions(seen: Tensor, ring_size: int) -> Tensor:
    """[B, ring_size] int64 from seen [B]: the position in each ring slot; negative where the slot is still empty."""
    slot = torch.arange(ring_size, device=seen.device)
    last = seen.unsqueeze(1) - 1
    return last - (last - slot) % ring_size
