"""Packed sequences in one row: each is moved to the beginning of a block, so that no block has tokens of two.

Which sequence a block belongs to is then a table of a number per block, `begins`: the first block of its sequence. It
rises, and all else follows from it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the T tokens of packed sequences stand in a row of M blocks."""

    place: Tensor  # int64 [T], rising
    first: Tensor  # int64 [T], the first block of each token's sequence
    begins: Tensor  # int64 [M]
    block_size: int

    @classmethod
    def of(cls, cu_seqlens: Tensor, length: int, block_size: int) -> Packing:
        """For sequences that begin and end at cu_seqlens [N + 1] in a row of `length` tokens. Never waits for a device.

        M is as small as it may be where looking is free, else as large as it could have to be.
        """
        cu_seqlens = cu_seqlens.contiguous()
        sizes = cu_seqlens.diff()
        blocks = (sizes + block_size - 1) // block_size
        ends = blocks.cumsum(0)
        begins = ends - blocks
        token = torch.arange(length, device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens[1:], token, right=True)
        first = begins[sequence]
        place = first * block_size + token - cu_seqlens[sequence]
        if _can_look(cu_seqlens):
            count = int(ends[-1])
        else:  # every block that is used has a token, and every sequence at most S − 1 gaps
            count = min(length, (length + len(sizes) * (block_size - 1)) // block_size)
        number = torch.arange(count, device=cu_seqlens.device)
        owner = torch.searchsorted(ends, number, right=True).clamp(max=len(sizes) - 1)
        # A block behind the last sequence is one of its own, so that nothing is computed for it but itself.
        return cls(place, first, torch.where(number < ends[-1], begins[owner], number), block_size)

    @property
    def rows(self) -> int:
        """Tokens and gaps."""
        return len(self.begins) * self.block_size

    def spread(self, x: Tensor) -> Tensor:
        """[1, T, ...] → [1, M·S, ...], with zeros in the gaps."""
        if self.rows == x.shape[1]:
            return x
        return x.new_zeros(1, self.rows, *x.shape[2:]).index_copy_(1, self.place, x)

    def gather(self, out: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [1, M·S, ...] → [1, T, ...], and the chosen blocks by their numbers in the sequence; −1 stays."""
        if self.rows != len(self.place):
            out, blocks = (x.index_select(1, self.place) for x in (out, blocks))
        return out, torch.where(blocks < 0, blocks, blocks - self.first.view(1, -1, 1, 1))


def _can_look(cu_seqlens: Tensor) -> bool:
    """Whether values can be read without stalling a device or breaking a compiler's graph."""
    return cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()


def ends_of(begins: Tensor) -> Tensor:
    """The first block after the sequence of each block, [M]."""
    return torch.searchsorted(begins, begins, right=True)


def last_in_window(begins: Tensor, window: int, block_size: int) -> Tensor:
    """The index of the last query that sees each key in its window, int64 [1, M·S, 1]."""
    last = (ends_of(begins) * block_size - 1).repeat_interleave(block_size)
    return torch.minimum(torch.arange(len(last), device=last.device) + window - 1, last).view(1, -1, 1)
