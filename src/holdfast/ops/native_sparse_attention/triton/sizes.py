"""What the kernels take, and how large their tiles are. Nothing here imports Triton."""

from dataclasses import replace
from typing import NamedTuple

import torch

from holdfast.ops.retained_attention.triton.sizes import Tile, Tiles, padded, tiles_for

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

LARGEST_CHOICE = 128
"""Chosen blocks of a query: a program holds the best of them in registers."""

FEW_QUERIES = 16
"""Up to so many per row, and where no gradient is wanted, the keys of a query are divided among programs."""


class Sizes(NamedTuple):
    """The tiles for one head size, dtype and device."""

    means: Tiles
    """For means: walks as regular as those of `retained_attention`."""
    of_keys: Tile
    """For the gradients of the keys of a block, over its users."""
    listed: Tile
    """For the keys of one query: its heads (at most so many) and its keys; also for means, where queries are few."""
    choice: Tile
    """For the choice of blocks: queries and blocks."""


# By bytes of the dtype and by padded head size.
_LISTED = {
    2: {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(32, 32, 4, 2)},
    4: {64: Tile(32, 32, 4, 2), 128: Tile(16, 16, 8, 2), 256: Tile(16, 16, 8, 1)},
}
_CHOICE = {
    2: {64: Tile(64, 128, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(32, 64, 4, 2)},
    4: {64: Tile(16, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
}
# By device, bytes of the dtype and padded head size, where those for means would spill, as a list of users takes
# registers too, or would be longer than a block.
_OF_KEYS = {
    ("large", 2, 128): Tile(64, 64, 8, 2),
    ("large", 4, 128): Tile(16, 32, 8, 2),
    ("medium", 2, 64): Tile(64, 32, 8, 2),
    ("medium", 4, 128): Tile(16, 32, 8, 2),
}


# Where these tiles would spill for packed sequences, because the first block of every query takes registers too.
_PACKED_FORWARD = {("medium", 4, 64): Tile(32, 32, 8, 1)}
_PACKED_OF_KEYS = {("medium", 4, 128): Tile(16, 32, 8, 2)}
_PACKED_CHOICE = {("large", 2, 64): Tile(64, 64, 4, 2)}


def sizes_for(kind: str, dtype: torch.dtype, dim: int, *, packed: bool = False) -> Sizes:
    """For heads of `dim` channels, the larger of those of keys and values, on a device of `kind` (`device_kind`)."""
    # Exact float32 needs the smaller tiles of the A100 on later devices too, lest it spill.
    found = tiles_for("medium" if kind == "large" and dtype.itemsize == 4 else kind, dtype, dim)
    listed, choice = (
        next(table[dtype.itemsize][size] for size in sorted(table[dtype.itemsize]) if dim <= size)
        for table in (_LISTED, _CHOICE)
    )
    if kind == "small":
        listed, choice = (replace(tile, num_stages=1) for tile in (listed, choice))
    case = (kind, dtype.itemsize, padded(dim, 64))
    of_keys = _OF_KEYS.get(case, found.of_keys)
    if packed:
        forward, of_means = _PACKED_FORWARD.get(case, found.forward), _PACKED_OF_KEYS.get(case, found.of_keys)
        found, choice = replace(found, forward=forward, of_keys=of_means), _PACKED_CHOICE.get(case, choice)
    return Sizes(found, of_keys, listed, choice)
