"""The step's kernels in the forms in which they are launched for published models; imports Triton."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from holdfast.ops.kernels import ShippedKernel
from holdfast.ops.window_step import kernels
from holdfast.ops.window_step.kernels import step

__all__ = ["shipped_kernels", "step"]


def shipped_kernels() -> Iterator[ShippedKernel]:
    """Both kernels with and without a store, at the sizes of published models: alone and in a large batch."""
    for budget, ring, delay in ((512, 769, 6), (0, 1024, 0)):
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            for dim in (64, 128, 256):
                for rows in (8, 512):
                    yield from _shipped(budget, ring, delay, dtype, name, dim, rows)


def _shipped(
    budget: int, ring: int, delay: int, dtype: torch.dtype, name: str, dim: int, rows: int
) -> Iterator[ShippedKernel]:
    tile = kernels.tile_size(dtype, dim, 4)
    tiles, splits = kernels.split(budget + ring, tile, rows, kernels.PROGRAMS * 132)
    constants = kernels.constants(budget, ring, delay, 4, dim, True, dtype == torch.float32)
    attends = constants | {
        "BLOCK_N": tile,
        "TILES": tiles,
        "EXACT": dtype == torch.float32,
        "BUDGET_BLOCK": kernels.padded(budget, 1),
    }
    writes = constants | {"SPLITS": splits, "SPLIT_BLOCK": kernels.padded(splits, 1)}
    absent = {} if budget else dict.fromkeys(("score", "scores", "positions"))
    types = dict.fromkeys(("score", "scores", "parts", "log_sums"), "*fp32")
    types |= {"real": "*i1", "seen": "*i64", "plan": "*i64", "positions": "*i32"}
    types |= {"kv_heads": "i32", "sinks": "i32", "scale": "fp32"}
    for kernel, fixed, options in (
        (kernels.attend_kernel, attends | absent, kernels.ATTEND_OPTIONS),
        (kernels.write_kernel, writes | absent, kernels.WRITE_OPTIONS),
    ):
        signature = {
            argument: types.get(argument, f"*{name}") for argument in kernel.arg_names if argument not in fixed
        }
        kind = "attend" if kernel is kernels.attend_kernel else "write"
        label = f"window_step/{kind}/{name}/{dim}/budget {budget}/splits {splits}"
        yield ShippedKernel(label, kernel, signature, fixed, options["num_warps"], options["num_stages"])
