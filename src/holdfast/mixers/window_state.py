"""The fixed-size memory of sliding-window attention and of learned eviction: a ring of recent pairs and a store."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.mixers.layout import TokenLayout, join_past
from holdfast.mixers.state import MixerState, TensorSpec
from holdfast.ops.window_step import EMPTY, Slots, is_compiled, ring_positions, window_step

# So many tokens and fewer, with a cache in front, are read one after the other: that costs them the pairs that are
# held, in place, where a chunk brings all of these into order and copies them. Fewer where a step is many operations.
_FEW, _FEW_OPERATIONS = 16, 4


@dataclass(frozen=True)
class PastRows:
    """The pairs that a state holds, oldest first: P = budget + window + 1 rows, the last window + 1 of them recent.

    Attributes:
        keys, values: [B, P, Hkv, D]. scores: [B, P, Hkv] fp32. positions: [B, P, Hkv] int64, negative where the row
        is empty.
    """

    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor


class WindowState(MixerState):
    """Slots of one layer: `budget` for pairs that were kept, then `window` + 1 for the latest.

    The pair of position p sits in ring slot p mod (window + 1), so the slot that a new token needs is the one whose
    pair has just left the window. Old pairs are moved into the store or dropped in place: nothing is shifted and
    nothing grows. A row's pads are never stored.

    Tensors: keys, values [B, Hkv, budget + window + 1, D] in the model's dtype; with a budget also scores
    [B, Hkv, budget + window + 1] fp32, positions [B, Hkv, budget] int32 (−1: empty) and the scorer's latest inputs
    tail [B, R − 1, Hkv, 2D]. seen [B] int64 counts each row's tokens.
    """

    def __init__(
        self, num_kv_heads: int, head_dim: int, window: int, budget: int = 0, receptive_field: int = 1, delay: int = 0
    ) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.window, self.budget, self.receptive_field, self.delay = window, budget, receptive_field, delay

    @property
    def ring_size(self) -> int:
        return self.window + 1

    def spec(self, batch_size: int, dtype: torch.dtype, tokens: int = 0) -> dict[str, TensorSpec]:
        slots = (batch_size, self.num_kv_heads, self.budget + self.ring_size)
        entries = {
            "seen": TensorSpec((batch_size,), torch.int64),
            "keys": TensorSpec((*slots, self.head_dim), dtype),
            "values": TensorSpec((*slots, self.head_dim), dtype),
        }
        if self.budget:
            entries["scores"] = TensorSpec(slots, torch.float32, -torch.inf)
            entries["positions"] = TensorSpec((*slots[:2], self.budget), torch.int32, EMPTY)
            tail = (batch_size, self.receptive_field - 1, self.num_kv_heads, 2 * self.head_dim)
            entries["tail"] = TensorSpec(tail, dtype)
        return entries

    def ring_positions(self) -> Tensor:
        """[B, window + 1] int64: the position in each ring slot; negative where the slot is still empty."""
        return ring_positions(self.seen, self.ring_size)

    def past_rows(self) -> PastRows:
        """All slots in the order of their positions, empty ones first. O(budget + window) time, a copy."""
        age = torch.arange(self.ring_size, device=self.seen.device)
        positions = self.seen.unsqueeze(1) - self.ring_size + age  # [B, ring]
        slots = self.budget + positions % self.ring_size
        order = slots.unsqueeze(1).expand(-1, self.num_kv_heads, -1)
        ring_positions = positions.unsqueeze(1).expand_as(order)
        if self.budget:
            stored = self.positions.long()
            by_age = stored.argsort(dim=2)
            order = torch.cat([by_age, order], dim=2)
            all_positions = torch.cat([stored.gather(2, by_age), ring_positions], dim=2)
            scores = self.scores.gather(2, order)
        else:
            all_positions = ring_positions
            scores = torch.zeros_like(all_positions, dtype=torch.float32)
        rows = order.unsqueeze(-1).expand(-1, -1, -1, self.head_dim)
        return PastRows(
            self.keys.gather(2, rows).transpose(1, 2),
            self.values.gather(2, rows).transpose(1, 2),
            scores.transpose(1, 2),
            all_positions.transpose(1, 2),
        )

    def write_rows(self, rows: PastRows, visible_until: Tensor | None, layout: TokenLayout) -> None:
        """Replace the contents after a chunk.

        Args:
            rows: [B, N, ...] all pairs up to the last token, in order, the latest in the last row.
            visible_until: [B, N, Hkv] last row of a query that sees each pair; None if nothing outlives the window.
        """
        length = rows.keys.shape[1]
        self.seen.add_(layout.num_real)
        # Row of the pair that belongs into each ring slot; empty slots get any row, and are masked by `seen`.
        slot_rows = (length - self.seen.unsqueeze(1) + self.ring_positions()).clamp(min=0)
        ring = slice(self.budget, None)
        index = slot_rows[:, :, None].expand(-1, -1, self.num_kv_heads)
        wide = index[..., None].expand(-1, -1, -1, self.head_dim)
        self.keys[:, :, ring] = rows.keys.gather(1, wide).transpose(1, 2)
        self.values[:, :, ring] = rows.values.gather(1, wide).transpose(1, 2)
        if not self.budget:
            return
        self.scores[:, :, ring] = rows.scores.gather(1, index).transpose(1, 2)
        self._write_store(rows, visible_until)

    def _write_store(self, rows: PastRows, visible_until: Tensor | None) -> None:
        length = rows.keys.shape[1]
        left = max(0, length - self.ring_size)  # rows that have left the window of the last query
        if visible_until is None or left == 0:
            return
        alive = (visible_until[:, :left] >= length - 1) & (rows.positions[:, :left] >= 0)
        kept = alive.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.budget]
        alive = alive.gather(1, kept)
        wide = kept[..., None].expand(-1, -1, -1, self.head_dim)
        store = slice(0, kept.shape[1])
        self.positions.fill_(EMPTY)
        self.scores[:, :, : self.budget] = -torch.inf
        self.positions[:, :, store] = rows.positions.gather(1, kept).where(alive, EMPTY).transpose(1, 2).int()
        self.scores[:, :, store] = rows.scores.gather(1, kept).where(alive, -torch.inf).transpose(1, 2)
        self.keys[:, :, store] = rows.keys.gather(1, wide).transpose(1, 2)
        self.values[:, :, store] = rows.values.gather(1, wide).transpose(1, 2)

    def extended_tail(self, features: Tensor, layout: TokenLayout) -> Tensor:
        """The scorer's inputs [B, R − 1 + T, Hkv, 2D]: the latest of the past, then `features` of this call."""
        return join_past(self.tail, features, layout.num_pads)

    def is_short(self, q: Tensor, layout: TokenLayout) -> bool:
        """Whether a call on this cache, with queries [B, T, H, D], is better read by `steps` than as a chunk."""
        if layout.fresh or layout.length == 1:
            return not layout.fresh
        # What writes in place has no gradients; asked for, they may be those of keys, values or the scorer alone.
        if layout.length > _FEW or torch.is_grad_enabled():
            return False
        return layout.length <= (_FEW if is_compiled(q[:1, 0], self._slots) else _FEW_OPERATIONS)

    @property
    def _slots(self) -> Slots:
        if self.budget:
            return Slots(self.keys, self.values, self.seen, self.scores, self.positions)
        return Slots(self.keys, self.values, self.seen)

    def steps(
        self, q: Tensor, keys: Tensor, values: Tensor, scores: Tensor | None, sinks: int, real: Tensor | None
    ) -> Tensor:
        """Advance by a few tokens, one after the other, in place, and attend with each over what is then held.

        Args:
            q: [B, T, H, D]. keys, values: [B, T, Hkv, D] of the new tokens.
            scores: [B, T, Hkv] fp32, the scores that become final one by one: those of the tokens `delay` before.
            sinks: the first tokens of a sequence, never dropped.
            real: [B, T] bool, False at pads; None where there are none.

        Returns:
            [B, T, H, D].

        O(T·(budget + window)) time; no slot is copied, gathered or sorted but for those that change.
        """
        slots = self._slots
        q, keys, values = (x.transpose(0, 1).contiguous() for x in (q, keys, values))
        outputs = [
            window_step(
                q[t],
                keys[t],
                values[t],
                slots,
                score=None if scores is None else scores[:, t].contiguous(),
                real=None if real is None else real[:, t].contiguous(),
                sinks=sinks,
                delay=self.delay,
            )
            for t in range(len(q))
        ]
        return torch.stack(outputs, dim=1)
