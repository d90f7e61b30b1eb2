"""Constants of the kernels, and how large their tiles are. Nothing here imports Triton."""

import functools
from dataclasses import dataclass

import torch

KEY_BLOCK = 64
"""Keys between two entries of the tables of a plan."""

CLASSES = 16
"""Classes of lifetimes: the last but one ends at KEY_BLOCK · (2^15 − 1), about two million tokens."""

LARGEST_HEAD = 256


@dataclass(frozen=True)
class Tile:
    """Rows of queries, keys, and the options of one kernel's launch."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of one head size, dtype and device: forward; gradient of queries; gradients of keys and values."""

    forward: Tile
    of_queries: Tile
    of_keys: Tile


_EXACT = {
    64: Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    128: Tiles(Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 1)),
    256: Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}

# By shared memory ("large" from 160 KiB a block; "small" from 64 KiB), by bytes of the dtype, by padded head size.
# They are the largest that compile without a spill. Exact float32 needs the registers of a whole row of the product.
TILES: dict[str, dict[int, dict[int, Tiles]]] = {
    "large": {
        2: {
            64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
            128: Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2)),
            256: Tiles(Tile(128, 16, 8, 2), Tile(128, 16, 8, 2), Tile(32, 32, 8, 2)),
        },
        4: _EXACT,
    },
    "small": {
        2: {
            64: Tiles(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
            128: Tiles(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
            256: Tiles(Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1)),
        },
        4: _EXACT,
    },
}


def tiles_for(kind: str, dtype: torch.dtype, dim: int) -> Tiles:
    """The tiles for heads of `dim` channels, the larger of those of keys and values."""
    by_head = TILES[kind][dtype.itemsize]
    return by_head[next(size for size in sorted(by_head) if dim <= size)]


@functools.cache
def device_kind(device: torch.device) -> str:
    """The key into `TILES` of a CUDA or ROCm device; "small" for the interpreter."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "small"
    available = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return "large" if available >= 160 << 10 else "small"


def padded(size: int, least: int = 16) -> int:
    """The next power of two, at least what a matrix product on the device takes."""
    return max(least, 1 << (size - 1).bit_length())
