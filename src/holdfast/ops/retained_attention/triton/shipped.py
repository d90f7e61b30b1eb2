"""The kernels in the forms in which they are launched for published models, for compiling without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from holdfast.ops.kernels import ShippedKernel
from holdfast.ops.retained_attention.triton import backward, forward, plan, sizes
from holdfast.ops.retained_attention.triton.launch import Shape, precision

DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# float16 takes the tiles and the instructions of bfloat16. Exact float32 with larger heads works, but spills.
HEADS = {torch.bfloat16: (64, 128, 256), torch.float32: (64, 128)}
TARGETS = {"large": ("sm_90", "sm_100"), "medium": ("sm_80",), "small": ("gfx942",)}
# By label: query heads per key/value head (they share a tile, so that other numbers than 1 change no more than
# indices), whether keys are lost before the end, and whether any outlives the window.
FORMS = {"": (4, True, True), "/one-head": (1, True, True), "/window": (4, False, False), "/near": (4, True, False)}

_INDICES = dict.fromkeys(("until", "order", "offsets", "starts"), "*i32")
_NUMBERS = dict.fromkeys(("queries", "keys", "kv_heads", "window"), "i32")


def shipped_kernels() -> Iterator[ShippedKernel]:
    """The forms in which these kernels are launched for published sizes, for `holdfast kernels`."""
    yield from _plan_kernels()
    for kind, targets in TARGETS.items():
        for dtype, heads in HEADS.items():
            for dim in heads:
                for form in FORMS:
                    yield from _attention_kernels(kind, targets, dtype, dim, form)


def _plan_kernels() -> Iterator[ShippedKernel]:
    tables = dict.fromkeys(("until", "counts", "latest"), "*i32")
    strides = dict.fromkeys(("stride_b", "stride_t", "stride_h"), "i32")
    yield ShippedKernel(
        "retained_attention/plan/count",
        plan.count_kernel,
        {"visible_until": "*i64", **strides, **tables, **_NUMBERS},
        {},
        num_warps=plan.NUM_WARPS,
        num_stages=3,
    )
    tables = dict.fromkeys(("until", "offsets", "order"), "*i32")
    numbers = {name: _NUMBERS[name] for name in ("queries", "keys", "window")}
    yield ShippedKernel(
        "retained_attention/plan/sort",
        plan.sort_kernel,
        {**tables, **numbers},
        {},
        num_warps=plan.NUM_WARPS,
        num_stages=3,
    )


def _attention_kernels(
    kind: str, targets: tuple[str, ...], dtype: torch.dtype, dim: int, form: str
) -> Iterator[ShippedKernel]:
    tiles = sizes.tiles_for(kind, dtype, dim)
    groups, has_until, has_far = FORMS[form]
    shape = Shape(1, 4096, 4096, 4, groups, dim, dim, has_until, has_far, precision(dtype))

    def shipped(name: str, kernel: Any, tile: sizes.Tile, scalars: tuple[str, ...], **constants: Any) -> ShippedKernel:
        constexprs = shape.constants(tile) | constants
        pointers = dict.fromkeys(("log_sum", "inner"), "*fp32") | _INDICES
        numbers = dict.fromkeys(scalars, "fp32") | _NUMBERS
        signature = {
            argument: numbers.get(argument) or pointers.get(argument) or f"*{DTYPES[dtype]}"
            for argument in kernel.arg_names
            if argument not in constexprs
        }
        label = f"retained_attention/{name}/{DTYPES[dtype]}/{dim}{form}"
        return ShippedKernel(label, kernel, signature, constexprs, tile.num_warps, tile.num_stages, targets)

    scalars = ("scale", "scale_2")
    yield shipped("forward", forward.forward_kernel, tiles.forward, scalars)
    yield shipped("query_gradient", backward.query_gradient_kernel, tiles.of_queries, scalars)
    for name, far in (("far", True), ("near", False))[0 if has_far else 1 :]:
        yield shipped(f"key_gradient_{name}", backward.key_gradient_kernel, tiles.of_keys, scalars, FAR=far)
