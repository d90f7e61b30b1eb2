"""The kernels in the forms in which they are launched for published models, for compiling without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from holdfast.ops.kernels import ShippedKernel
from holdfast.ops.native_sparse_attention.triton import backward, forward, gates
from holdfast.ops.native_sparse_attention.triton.launch import NUMBERS, Shape
from holdfast.ops.native_sparse_attention.triton.sizes import Tile, sizes_for
from holdfast.ops.retained_attention.triton.shipped import DTYPES, HEADS, TARGETS
from holdfast.ops.retained_attention.triton.sizes import padded

_TABLES = dict.fromkeys(("blocks", "lengths", "order", "starts", "first", "owner"), "*i64")
_SUMS = dict.fromkeys(("log_sum", "log_sums", "inner"), "*fp32")
_SCALARS = dict.fromkeys(("scale", "scale_2"), "fp32") | dict.fromkeys(NUMBERS, "i32")
_FP32_PARTS = dict.fromkeys(("dk", "dv", "dk_parts", "dv_parts"), "*fp32")
_FP32_MEANS = {"k": "*fp32", "v": "*fp32"}


def shipped_kernels() -> Iterator[ShippedKernel]:
    """Every form in which these kernels are launched, for `holdfast kernels`."""
    for kind, targets in TARGETS.items():
        for dtype, heads in HEADS.items():
            for dim in heads:
                yield from _attention_kernels(kind, targets, dtype, dim)
    for dtype in DTYPES:
        for dim in HEADS[dtype]:
            yield from _sums(dtype, dim)


def _shape(dim: int) -> Shape:
    """Published sizes; other blocks and groups change no more than indices."""
    return Shape(1, 4096, 4096, 2, 16, dim, dim, block_size=64, num_blocks=16, has_lengths=True)


def _attention_kernels(kind: str, targets: tuple[str, ...], dtype: torch.dtype, dim: int) -> Iterator[ShippedKernel]:
    shape, sizes = _shape(dim), sizes_for(kind, dtype, dim)
    single = shape.single(sizes.listed)

    def shipped(name: str, kernel: Any, tile: Tile, types: dict[str, str], **constants: Any) -> ShippedKernel:
        fixed = shape.constants(tile, single=constants.get("LISTED", False)) | constants
        absent = {"blocks": None} if constants.get("LISTED") is False else {}
        if kernel is backward.key_gradient_kernel and not constants["LISTED"]:
            absent = dict.fromkeys(("order", "starts", "first", "owner"))
        return _shipped(f"{name}/{DTYPES[dtype]}/{dim}", kernel, tile, DTYPES[dtype], types, fixed | absent, targets)

    attend, choose = forward.attend_kernel, forward.choose_kernel
    step_types = _FP32_MEANS | {"out": "*fp32"}
    choice = {"CHOICE_BLOCK": padded(shape.num_blocks, 2)}
    yield shipped("attend_means", attend, sizes.means.forward, {}, LISTED=False, HAS_WINDOW=False)
    yield shipped("attend_blocks", attend, single, {}, LISTED=True, HAS_WINDOW=False)
    yield shipped("choose", choose, sizes.choice, {}, **choice)
    yield shipped("step_means", attend, single, step_types, LISTED=False, HAS_WINDOW=False)
    yield shipped("step_blocks", attend, single, {"out": "*fp32"}, LISTED=True, HAS_WINDOW=True)
    few = shape.single(replace(sizes.choice, queries=sizes.listed.queries))
    yield shipped("step_choose", choose, few, _FP32_MEANS, **choice)
    yield shipped("query_gradient_means", backward.query_gradient_kernel, sizes.means.of_queries, {}, LISTED=False)
    yield shipped("query_gradient_blocks", backward.query_gradient_kernel, single, {}, LISTED=True)
    for name, tile, listed in (
        ("means", sizes.means.of_keys, False),
        ("blocks", shape.within_block(sizes.of_keys), True),
    ):
        yield shipped(f"key_gradient_{name}", backward.key_gradient_kernel, tile, _FP32_PARTS, LISTED=listed)


def _sums(dtype: torch.dtype, dim: int) -> Iterator[ShippedKernel]:
    """The kernels that only add up, which are the same on all devices."""
    name = DTYPES[dtype]
    parts = dict.fromkeys(("dk_parts", "dv_parts"), "*fp32")
    fixed = backward.sum_constants(_shape(dim))
    yield _shipped(f"sum/{name}/{dim}", backward.sum_kernel, backward.SUM_TILE, name, parts, fixed)
    tile, fixed = gates.TILE, gates.constants(dim)
    yield _shipped(f"gated_sum_gradient/{name}/{dim}", gates.gated_sum_gradient_kernel, tile, name, {}, fixed)
    logs = dict.fromkeys(("compressed_logs", "selected_logs", "sliding_logs"))
    whole = fixed | logs | {"DIVIDED": False}
    yield _shipped(f"gated_sum/{name}/{dim}", gates.gated_sum_kernel, tile, name, {}, whole)
    divided = dict.fromkeys((*logs, "compressed", "selected", "sliding"), "*fp32")
    yield _shipped(
        f"gated_sum_divided/{name}/{dim}", gates.gated_sum_kernel, tile, name, divided, fixed | {"DIVIDED": True}
    )


def _shipped(
    name: str,
    kernel: Any,
    tile: Tile,
    dtype: str,
    types: dict[str, str],
    constants: dict[str, Any],
    targets: tuple[str, ...] | None = None,
) -> ShippedKernel:
    """Pointers are to `dtype` unless `types` or their names say otherwise."""
    known = _TABLES | _SUMS | _SCALARS | types
    fixed = {argument: constants[argument] for argument in kernel.arg_names if argument in constants}
    signature = {argument: known.get(argument, f"*{dtype}") for argument in kernel.arg_names if argument not in fixed}
    label = f"native_sparse_attention/{name}"
    chosen = {} if targets is None else {"targets": targets}
    return ShippedKernel(label, kernel, signature, fixed, tile.num_warps, tile.num_stages, **chosen)
