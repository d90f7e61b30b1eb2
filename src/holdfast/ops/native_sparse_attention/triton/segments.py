"""Who chose which block: the users of every block side by side, cut into segments; found without a host stall."""

from typing import NamedTuple

import torch
from torch import Tensor

from holdfast.ops.native_sparse_attention.triton.launch import Shape

# Users of a segment, at least: fewer are not worth a program.
SHORTEST = 128


class Segments(NamedTuple):
    """A block's users are `order[starts[b] : starts[b + 1]] // n`; b numbers the blocks of all rows."""

    order: Tensor  # int64 [B·Tq·Hkv·n], places in the table of chosen blocks, by block and then by user
    starts: Tensor  # int64 [blocks + 1]
    first: Tensor  # int64 [blocks + 1], the first segment of each block
    owner: Tensor  # int64 [most], the block of each segment; `blocks` and more for segments that do not exist
    size: int
    """Users of a segment, the last of a block excepted."""

    @property
    def most(self) -> int:
        """Segments that there can be."""
        return self.owner.shape[0]


def find_segments(blocks: Tensor, shape: Shape) -> Segments:
    """Invert chosen blocks int64 [B, Tq, Hkv, n], −1 where fewer exist. O(B·Tq·Hkv·n) memory, and time of a sort."""
    device, count = blocks.device, shape.rows * shape.blocks
    row = torch.arange(shape.rows, device=device, dtype=torch.int32).view(shape.batch, 1, shape.kv_heads, 1)
    number = torch.where(blocks < 0, count, blocks + row * shape.blocks).flatten().to(torch.int32)
    number, order = number.sort(stable=True)
    starts = torch.searchsorted(number, torch.arange(count + 1, device=device, dtype=torch.int32))
    # As many users as choose a block on average, so that there are not many more segments than blocks.
    size = max(shape.block_size * shape.num_blocks, SHORTEST)
    first = torch.zeros(count + 1, dtype=torch.int64, device=device)
    first[1:] = ((starts.diff() + (size - 1)) // size).cumsum(0)
    most = order.numel() // size + count
    owner = torch.searchsorted(first[1:], torch.arange(most, device=device), right=True)
    return Segments(order, starts, first, owner, size)
