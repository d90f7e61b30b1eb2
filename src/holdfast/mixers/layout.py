"""Where the tokens of a batch stand: positions, pads, packed documents.

Every mixer of a forward pass reads the same `TokenLayout`, so that what a position is, which columns are padding and
where a document ends is decided once. Positions count the real tokens of a sequence and never the rows a cache holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from holdfast.ops.rotary import rotary_tables

T = TypeVar("T")


class _once(Generic[T]):  # noqa: N801
    """`functools.cached_property` without the lock of Python 3.11, which torch.compile cannot enter."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __get__(self, layout: Any, owner: type | None = None) -> T:
        value = self.compute(layout)
        layout.__dict__[self.compute.__name__] = value  # found before this descriptor from now on
        return value


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
    _latest: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _elsewhere: dict[torch.device, TokenLayout] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def whole(cls, batch_size: int, length: int, device: torch.device | str | None = None) -> TokenLayout:
        """The layout of B rows of T tokens, each a sequence from its start: no cache, no pads, no packing."""
        positions = torch.arange(length, device=device).expand(batch_size, -1)
        return cls(torch.zeros(batch_size, dtype=torch.long, device=device), positions)

    def to(self, device: torch.device | str | int) -> TokenLayout:
        """This layout on the device of a layer; moved once per forward pass and device."""
        device = torch.device(device)
        if device == self.positions.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = TokenLayout(
                self.seen.to(device),
                self.positions.to(device),
                None if self.real is None else self.real.to(device),
                None if self.cu_seqlens is None else self.cu_seqlens.to(device),
                self.fresh,
            )
        return self._elsewhere[device]

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

    def latest_exist(self, count: int) -> Tensor:
        """[B, count] bool: which of the last `count` tokens, the past's and this call's, there are; once per pass."""
        if count not in self._latest:
            age = torch.arange(1 - count, 1, device=self.seen.device)
            self._latest[count] = (self.seen + self.num_real - 1).unsqueeze(1) + age >= 0
        return self._latest[count]

    @_once
    def num_pads(self) -> Tensor | None:
        """[B] int64, pads in front of each row; None where there are none."""
        if self.real is None:
            return None
        return self.length - self.real.sum(dim=1)

    @_once
    def num_real(self) -> Tensor:
        """[B] int64, real tokens of each row in this call."""
        if self.real is None:
            return torch.full_like(self.seen, self.length)
        return self.real.sum(dim=1)

    @_once
    def num_sequences(self) -> int | Tensor:
        """Rows, or packed documents that hold a token (a scalar int64 tensor)."""
        return self.batch_size if self.cu_seqlens is None else count_documents(self.cu_seqlens)

    @_once
    def token_positions(self) -> Tensor:
        """[B, T] int64: `positions`, with −1 at pads."""
        return self.positions if self.real is None else self.positions.masked_fill(~self.real, -1)

    @_once
    def starts(self) -> Tensor | None:
        """[B, T] bool, True at the first column of each packed document; None without packing."""
        if self.cu_seqlens is None:
            return None
        starts = self.positions.new_zeros(self.length + 1, dtype=torch.bool)
        starts[self.cu_seqlens] = True  # the end, and empty documents there, point one past the last column
        return starts[: self.length].unsqueeze(0)

    @_once
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


def real_columns(mask: Tensor | None, batch_size: int, length: int) -> Tensor | None:
    """[B, T] bool from an attention mask over these columns, or over the past and these; None: all real.

    Raises:
        ValueError: the mask is not [B, T] or [B, past + T].
    """
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != batch_size or mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must be [B, T] with 0 at pads, got {tuple(mask.shape)} for {batch_size} × {length}"
        )
    real = mask[:, -length:].bool()
    # Cheap to look where looking does not stall a device nor break a graph; everything is simpler without pads.
    cheap = real.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if cheap and bool(real.all()) else real


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


def join_past(past: Tensor, rows: Tensor, num_pads: Tensor | None) -> Tensor:
    """The rows [B, P, ...] of a state, cast to the dtype of a call's rows [B, T, ...], in front of its tokens.

    The call's pads, `num_pads` [B] of them, come first (`pads_first`).
    """
    return pads_first(torch.cat([past.to(rows.dtype), rows], dim=1), past.shape[1], num_pads)


def left_aligned_order(mask: Tensor) -> Tensor:
    """Column order [B, T] that moves the pads (False in `mask` [B, T]) of every row in front of its tokens."""
    return mask.to(torch.uint8).argsort(dim=1, stable=True)


def restore_order(columns: Tensor, order: Tensor | None) -> Tensor:
    """Undo a column order [B, T] on columns [B, T, ...]; None returns them unchanged."""
    if order is None:
        return columns
    inverse = order.to(columns.device).argsort(dim=1)
    return columns.gather(1, inverse.view(*inverse.shape, *[1] * (columns.dim() - 2)).expand_as(columns))


def checked_cu_seqlens(cu_seqlens: Tensor, batch_size: int, length: int) -> Tensor:
    """`cu_seqlens`, if it can be the offsets of documents packed into one row.

    Values are looked at only on a CPU and outside torch.compile.

    Raises:
        ValueError: there are several rows, or the offsets do not rise from 0 to `length`.
    """
    if batch_size != 1:
        raise ValueError(f"cu_seqlens needs a batch of one row, got {batch_size}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError("cu_seqlens must be a 1-D tensor of integer offsets [0, end of document 1, …, T]")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
            raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, got {ends}")
    return cu_seqlens


def count_documents(cu_seqlens: Tensor) -> Tensor:
    """Packed documents that hold a token, a scalar int64 tensor; packing may leave empty ones."""
    return (cu_seqlens.diff() > 0).sum()


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
