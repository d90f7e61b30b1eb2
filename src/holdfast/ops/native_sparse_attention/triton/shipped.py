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

_TABLES = dict.fromkeys(("blocks", "lengths", "begins", "order", "starts", "first", "owner", "ends"), "*i64")
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

    def shipped(
        name: str, kernel: Any, tile: Tile, types: dict[str, str], *, packed: bool = False, **constants: Any
    ) -> ShippedKernel:
        of = replace(shape, has_lengths=not packed, packed=packed)
        fixed = of.constants(tile, single=constants.get("LISTED", False)) | constants
        absent = dict.fromkeys(["lengths"] if packed else ["begins", "ends"])
        if constants.get("LISTED") is False:
            absent |= dict.fromkeys(("blocks", "order", "starts", "first", "owner"))
        return _shipped(f"{name}/{DTYPES[dtype]}/{dim}", kernel, tile, DTYPES[dtype], types, fixed | absent, targets)

    attend, choose = forward.attend_kernel, forward.choose_kernel
    step_types = _FP32_MEANS | {"out": "*fp32"}
    choice: dict[str, Any] = {"CHOICE_BLOCK": padded(shape.num_blocks, 2)}
    yield shipped("step_means", attend, single, step_types, LISTED=False, HAS_WINDOW=False)
    yield shipped("step_blocks", attend, single, {"out": "*fp32"}, LISTED=True, HAS_WINDOW=True)
    few = shape.single(replace(sizes.choice, queries=sizes.listed.queries))
    yield shipped("step_choose", choose, few, _FP32_MEANS, **choice)
    of_queries, of_keys = backward.query_gradient_kernel, backward.key_gradient_kernel
    yield shipped("key_gradient_blocks", of_keys, shape.within_block(sizes.of_keys), _FP32_PARTS, LISTED=True)
    for suffix, packed in (("", False), ("_packed", True)):
        of = sizes_for(kind, dtype, dim, packed=packed)
        means = of.means
        yield shipped(f"attend_means{suffix}", attend, means.forward, {}, packed=packed, LISTED=False, HAS_WINDOW=False)
        yield shipped(f"attend_blocks{suffix}", attend, single, {}, packed=packed, LISTED=True, HAS_WINDOW=False)
        yield shipped(f"choose{suffix}", choose, of.choice, {}, packed=packed, **choice)
        yield shipped(f"query_gradient_means{suffix}", of_queries, means.of_queries, {}, packed=packed, LISTED=False)
        yield shipped(f"query_gradient_blocks{suffix}", of_queries, single, {}, packed=packed, LISTED=True)
        yield shipped(f"key_gradient_means{suffix}", of_keys, means.of_keys, _FP32_PARTS, packed=packed, LISTED=False)


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
