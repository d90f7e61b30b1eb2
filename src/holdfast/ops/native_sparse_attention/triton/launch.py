"""What every launch needs: the sizes of a call, compile-time constants, strides, and how keys are divided."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from holdfast.ops.retained_attention.triton.sizes import Tile, padded

NUMBERS = (
    *(
        "queries",
        "keys",
        "kv_heads",
        "size",
        "each",
        "listed",
        "window",
        "splits",
        "segment_size",
        "rows",
    ),
    *("compressed_splits", "sliding_splits"),
    *("k_stride_b", "k_stride_t", "k_stride_h", "v_stride_b", "v_stride_t", "v_stride_h"),
)
"""Arguments whose values do not change the code, so that a new length compiles nothing."""


@dataclass(frozen=True)
class Shape:
    """The sizes of one call."""

    batch: int
    queries: int
    keys: int
    kv_heads: int
    groups: int
    dim: int
    value_dim: int
    block_size: int
    num_blocks: int
    has_lengths: bool
    packed: bool = False

    @classmethod
    def of(
        cls,
        q: Tensor,
        v: Tensor,
        keys: int,
        block_size: int,
        num_blocks: int,
        lengths: Tensor | None,
        begins: Tensor | None = None,
    ) -> Shape:
        """Of q [B, Tq, H, D] and values or their means [B, any, Hkv, Dv]."""
        batch, queries, heads, dim = q.shape
        kv_heads, value_dim = v.shape[2:]
        groups = heads // kv_heads
        sizes = (batch, queries, keys, kv_heads, groups, dim, value_dim, block_size, num_blocks)
        return cls(*sizes, has_lengths=lengths is not None, packed=begins is not None)

    @property
    def rows(self) -> int:
        return self.batch * self.kv_heads

    @property
    def users(self) -> int:
        return self.rows * self.queries

    @property
    def numbers(self) -> tuple[int, int, int]:
        """The sizes that every kernel takes."""
        return self.queries, self.keys, self.kv_heads

    @property
    def complete(self) -> int:
        """Blocks of keys that are complete."""
        return self.keys // self.block_size

    @property
    def blocks(self) -> int:
        """Blocks of keys, the last of which may be incomplete."""
        return -(-self.keys // self.block_size)

    def group_block(self, tile: Tile) -> int:
        return min(padded(self.groups, 1), tile.queries)

    def programs(self, tile: Tile, *, single: bool = False) -> int:
        """Programs that have all queries and heads; `single`: a tile is the heads of one query."""
        group_block = tile.queries if single else self.group_block(tile)
        return self.rows * -(-self.groups // group_block) * -(-self.queries // (tile.queries // group_block))

    def single(self, tile: Tile) -> Tile:
        """The tile for programs of one query each: its heads, as many as a matrix product takes or more."""
        return replace(tile, queries=min(padded(self.groups), tile.queries))

    def within_block(self, tile: Tile) -> Tile:
        """The tile with no more keys than a block has."""
        return replace(tile, keys=min(tile.keys, padded(self.block_size)))

    def constants(self, tile: Tile, *, single: bool = False) -> dict[str, Any]:
        """The compile-time arguments that all attention kernels share; `single`: a tile is the heads of one query."""
        group_block = tile.queries if single else self.group_block(tile)
        return {
            "NUM_BLOCKS": self.num_blocks,
            "BLOCK_SIZE": self.block_size,
            "GROUPS": self.groups,
            "GROUP_BLOCK": group_block,
            "CHUNKS": -(-self.groups // group_block),
            "DIM": self.dim,
            "BLOCK_DIM": padded(self.dim),
            "VALUE_DIM": self.value_dim,
            "BLOCK_VALUE": padded(self.value_dim),
            "BLOCK_M": tile.queries,
            "BLOCK_N": tile.keys,
            "HAS_LENGTHS": self.has_lengths,
            "PACKED": self.packed,
        }


def options(tile: Tile) -> dict[str, int]:
    """What Triton is told of a tile besides the kernel's constants."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def by_rows(x: Tensor) -> Tensor:
    """x [B, T, heads, D], copied only if its rows of D elements do not lie whole at multiples of D."""
    whole = x.stride(3) == 1 and not any(stride % x.shape[3] for stride in x.stride()[:3])
    return x if whole else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of a tensor as `by_rows` returns it, in rows."""
    b, t, h = (stride // x.shape[3] for stride in x.stride()[:3])
    return b, t, h
