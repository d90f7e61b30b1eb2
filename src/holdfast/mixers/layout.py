"""Where the tokens of a batch stand: positions, pads, packed documents.

Every mixer of a forward pass reads the same `TokenLayout`, so that what a position is, which columns are padding and
where a document ends is decided once. Positions count the real tokens of a sequence and never the rows a cache holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from holdfast.ops.rotary import rotary_tables


@dataclass(frozen=True)
class TokenLayout:
    """The columns of one forward pass.

    Pads stand in front of the real tokens of their row (`left_aligned_order` brings them there). Packed documents
    have no pads: `real` and `cu_seqlens` exclude each other.

    Attributes:
        seen: [B] int64, real tokens of each row that earlier calls have put into the cache (0 without a cache).
        positions: [B, T] int64, index of each token among the real tokens of its own sequence. Pads hold any
            value ≥ 0.
        real: [B, T] bool, False at pads; None where every column is a token.
        cu_seqlens: [N + 1] int64, where packed documents begin and end; None where a row is one sequence.
        fresh: no token came before this call.
    """

    seen: Tensor
    positions: Tensor
    real: Tensor | None = None
    cu_seqlens: Tensor | None = None
    fresh: bool = True
    _tables: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def batch_size(self) -> int:
        return self.positions.shape[0]

    @property
    def length(self) -> int:
        return self.positions.shape[1]

    def rotary(self, dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, dim // 2] of the columns, computed once per forward pass."""
        if (dim, theta) not in self._tables:
            self._tables[dim, theta] = rotary_tables(self.positions, dim, theta)
        return self._tables[dim, theta]

    @cached_property
    def num_pads(self) -> Tensor | None:
        """[B] int64, pads in front of each row; None where there are none."""
        if self.real is None:
            return None
        return self.length - self.real.sum(dim=1)

    @cached_property
    def num_real(self) -> Tensor:
        """[B] int64, real tokens of each row in this call."""
        if self.real is None:
            return torch.full_like(self.seen, self.length)
        return self.real.sum(dim=1)

    @cached_property
    def starts(self) -> Tensor | None:
        """[B, T] bool, True at the first column of each packed document; None without packing."""
        if self.cu_seqlens is None:
            return None
        starts = self.positions.new_zeros(self.length + 1, dtype=torch.bool)
        starts[self.cu_seqlens] = True  # the end, and empty documents there, point one past the last column
        return starts[: self.length].unsqueeze(0)

    @cached_property
    def last_columns(self) -> Tensor | None:
        """[B, T] int64, the last column of the packed document a column belongs to; None without packing."""
        if self.cu_seqlens is None:
            return None
        document = document_of_column(self.cu_seqlens, self.length)
        return (self.cu_seqlens[1:][document] - 1).unsqueeze(0)

    def followed_by(self, count: int) -> Tensor:
        """[B, T] bool: real tokens after which at least `count` more real tokens of the same sequence come here."""
        real = self.real if self.real is not None else torch.ones_like(self.positions, dtype=torch.bool)
        total = real.flip(1).cumsum(1).flip(1)  # real tokens from this column on, itself included
        if self.last_columns is not None:
            padded = torch.nn.functional.pad(total, (0, 1))
            total = total - padded.gather(1, self.last_columns + 1)
        return real & (total > count)


def plain_layout(batch_size: int, length: int, device: torch.device | str = "cpu") -> TokenLayout:
    """Layout of whole sequences without pads, cache or packing."""
    seen = torch.zeros(batch_size, dtype=torch.long, device=device)
    return TokenLayout(seen, torch.arange(length, device=device).expand(batch_size, length))


def pads_first(rows: Tensor, num_past: int, num_pads: Tensor | None) -> Tensor:
    """Rows [B, num_past + T, ...] = past rows, then a chunk that begins with pads → the pads, the past, the tokens.

    Afterwards neighbouring rows are neighbouring tokens again. `num_pads` [B]; None returns `rows` unchanged.
    """
    if num_pads is None or num_past == 0:
        return rows
    index = torch.arange(rows.shape[1], device=rows.device).unsqueeze(0)
    pads = num_pads.unsqueeze(1)
    order = torch.where(index < pads, index + num_past, torch.where(index < pads + num_past, index - pads, index))
    return rows.gather(1, order.view(*order.shape, *[1] * (rows.dim() - 2)).expand_as(rows))


def left_aligned_order(mask: Tensor) -> Tensor:
    """Column order [B, T] that moves the pads (False in `mask` [B, T]) of every row in front of its tokens."""
    return mask.to(torch.uint8).argsort(dim=1, stable=True)


def document_of_column(cu_seqlens: Tensor, length: int) -> Tensor:
    """[length] int64: which of the packed documents each column belongs to."""
    columns = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), columns, right=True)


def gapped_columns(cu_seqlens: Tensor, length: int, gap: int) -> tuple[Tensor, int]:
    """Where packed tokens go, [length] int64, so that `gap` columns stay free between documents; and the new length.

    A convolution over the wider row then reads the free columns, not the neighbour, at a document's edge.
    """
    return torch.arange(length, device=cu_seqlens.device) + gap * document_of_column(cu_seqlens, length), (
        length + gap * (len(cu_seqlens) - 1)
    )
