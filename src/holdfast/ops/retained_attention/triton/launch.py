"""What every launch of the attention kernels needs: sizes, compile-time constants, the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.ops.precision import allows_tf32
from holdfast.ops.retained_attention.triton import sizes

Plan = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""until, order, offsets and starts of `make_plan`; four times None where keys are lost with their window."""

NUMBERS = ("queries", "keys", "kv_heads", "window", "stride_b", "stride_t", "stride_h")
"""Arguments whose values do not change the code, so that a new length compiles nothing."""


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


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
    has_until: bool
    has_far: bool
    precision: str

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Shape:
        order = plan[1]
        return cls(
            batch=q.shape[0],
            queries=q.shape[1],
            keys=k.shape[1],
            kv_heads=k.shape[2],
            groups=q.shape[2] // k.shape[2],
            dim=q.shape[3],
            value_dim=v.shape[3],
            has_until=order is not None,
            has_far=order is not None and order.shape[1] > 0,
            precision=precision(q.dtype),
        )

    @property
    def rows(self) -> int:
        return self.batch * self.kv_heads

    @property
    def numbers(self) -> tuple[int, int, int]:
        """The sizes that every kernel takes."""
        return self.queries, self.keys, self.kv_heads

    def query_tiles(self, tile: sizes.Tile) -> int:
        return -(-self.queries // (tile.queries // sizes.padded(self.groups, 1)))

    def key_tiles(self, tile: sizes.Tile) -> int:
        return -(-self.keys // tile.keys)

    def constants(self, tile: sizes.Tile) -> dict[str, Any]:
        """The compile-time arguments that all attention kernels share."""
        return {
            "GROUPS": self.groups,
            "GROUP_BLOCK": sizes.padded(self.groups, 1),
            "DIM": self.dim,
            "BLOCK_DIM": sizes.padded(self.dim),
            "VALUE_DIM": self.value_dim,
            "BLOCK_VALUE": sizes.padded(self.value_dim),
            "BLOCK_M": tile.queries,
            "BLOCK_N": tile.keys,
            "HAS_UNTIL": self.has_until,
            "HAS_FAR": self.has_far,
            "PRECISION": self.precision,
        }


def precision(dtype: torch.dtype) -> str:
    """Exact products of float32, unless PyTorch's settings allow TF32 (`allows_tf32`)."""
    fast = dtype == torch.float32 and torch.version.hip is None and allows_tf32()
    return "tf32" if fast else "ieee"


def launch_options(shape: Shape, tile: sizes.Tile) -> dict[str, Any]:
    """The kernels' constants, and what else Triton is told of a tile."""
    return {**shape.constants(tile), "num_warps": tile.num_warps, "num_stages": tile.num_stages}
