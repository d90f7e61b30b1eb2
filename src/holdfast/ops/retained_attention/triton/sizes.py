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
    64: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    128: Tiles(Tile(16, 16, 4, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 1)),
    256: Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}

# By device: "large" has matrix units that read shared memory (Hopper, data-centre Blackwell), "medium" is the A100,
# "small" has 64 KiB of shared memory or more. Then by bytes of the dtype, and by padded head size. All compile without
# a spill but exact float32 with 256 channels: it holds whole rows of both factors in registers.
TILES: dict[str, dict[int, dict[int, Tiles]]] = {
    "large": {
        2: {
            64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
            128: Tiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2)),
            256: Tiles(Tile(64, 16, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)),
        },
        4: _EXACT,
    },
    "medium": {
        2: {
            64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
            128: Tiles(Tile(64, 32, 4, 3), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2)),
            256: Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)),
        },
        4: _EXACT
        | {
            64: Tiles(Tile(32, 16, 4, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
            128: Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(32, 16, 8, 1)),
        },
    },
    "small": {
        2: {
            64: Tiles(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
            128: Tiles(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
            256: Tiles(Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1)),
        },
        4: {
            64: Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
            128: Tiles(Tile(32, 32, 4, 1), Tile(16, 16, 4, 1), Tile(16, 32, 4, 1)),
            256: Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
        },
    },
}


def tiles_for(kind: str, dtype: torch.dtype, dim: int) -> Tiles:
    """The tiles for heads of `dim` channels, the larger of those of keys and values."""
    by_head = TILES[kind][dtype.itemsize]
    return by_head[next(size for size in sorted(by_head) if dim <= size)]


def most_groups(dtype: torch.dtype, dim: int) -> int:
    """How many query heads per key/value head the tiles of every device have room for."""
    found = (tiles_for(kind, dtype, dim) for kind in TILES)
    return min(min(t.forward.queries, t.of_queries.queries, t.of_keys.queries) for t in found)


@functools.cache
def device_kind(device: torch.device) -> str:
    """The key into `TILES` of a CUDA or ROCm device; "small" for the interpreter."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "small"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] in (9, 10, 11):
        return "large"
    return "medium" if capability in ((8, 0), (8, 7)) else "small"


def padded(size: int, least: int = 16) -> int:
    """The next power of two, at least what a matrix product on the device takes."""
    return max(least, 1 << (size - 1).bit_length())
