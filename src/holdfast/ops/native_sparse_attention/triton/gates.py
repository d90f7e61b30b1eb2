"""The gated sum of the three branches, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.ops.native_sparse_attention.triton.launch import NUMBERS, options
from holdfast.ops.native_sparse_attention.triton.tiles import merged_level
from holdfast.ops.retained_attention.triton.launch import on_device
from holdfast.ops.retained_attention.triton.sizes import Tile, padded
from holdfast.ops.retained_attention.triton.tiles import load_rows, store_rows

TILE = Tile(16, 16, 4, 1)


def run_gated_sum(
    gates: Tensor, branches: tuple[Tensor, ...], log_sums: tuple[Tensor, ...] | None, dtype: torch.dtype
) -> Tensor:
    """The sum over the branches of gate times output, [..., H, Dv] in `dtype`.

    Args:
        gates: [..., H, 3]. branches: compressed, selected, sliding: [..., H, Dv]; all contiguous.
        log_sums: where given, the keys of each branch were divided: branches are [splits, ..., H, Dv], and these
            fp32 [splits, ..., H] weigh the parts.
    """
    value_dim = branches[0].shape[-1]
    out = branches[0].new_empty(*gates.shape[:-1], value_dim, dtype=dtype)
    size = gates.numel() // 3
    splits = (1, 1, 1) if log_sums is None else tuple(len(log_sum) for log_sum in log_sums)
    with on_device(gates):
        gated_sum_kernel[(triton.cdiv(size, TILE.queries),)](
            *(gates, *branches, *(log_sums or (None,) * 3), out, size, *splits),
            **constants(value_dim), **options(TILE), DIVIDED=log_sums is not None,
        )  # fmt: skip
    return out


def constants(value_dim: int) -> dict[str, int]:
    """Constants of `gated_sum_kernel` but for DIVIDED."""
    return {"VALUE_DIM": value_dim, "BLOCK_VALUE": padded(value_dim), "BLOCK_M": TILE.queries}


@triton.jit(do_not_specialize=NUMBERS)
def gated_sum_kernel(
    gates, compressed, selected, sliding, compressed_logs, selected_logs, sliding_logs, out, size,
    compressed_splits, splits, sliding_splits,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_M: tl.constexpr, DIVIDED: tl.constexpr,
):  # fmt: skip
    """Tensors as in `run_gated_sum`."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    known = index < size
    total = tl.zeros([BLOCK_M, BLOCK_VALUE], tl.float32)
    for branch in tl.static_range(3):
        if branch == 0:
            parts, logs, count = compressed, compressed_logs, compressed_splits
        elif branch == 1:
            parts, logs, count = selected, selected_logs, splits
        else:
            parts, logs, count = sliding, sliding_logs, sliding_splits
        output = _whole(parts, logs, index, known, size, count, VALUE_DIM, BLOCK_VALUE, BLOCK_M, DIVIDED)
        gate = tl.load(gates + 3 * index + branch, mask=known, other=0.0).to(tl.float32)
        total += gate[:, None] * output
    store_rows(out, index, VALUE_DIM, total, known, VALUE_DIM, BLOCK_VALUE)


@triton.jit
def _whole(
    parts, logs, index, known, size, count,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_M: tl.constexpr, DIVIDED: tl.constexpr,
):  # fmt: skip
    """The output of a branch, put together from `count` parts if DIVIDED."""
    if DIVIDED:
        level = merged_level(logs, index, known, size, count)
        output = tl.zeros([BLOCK_M, BLOCK_VALUE], tl.float32)
        for part in range(count):
            place = index + size.to(tl.int64) * part
            weight = tl.exp2(tl.load(logs + place, mask=known, other=float("-inf")) - level)
            output += weight[:, None] * load_rows(parts, place, VALUE_DIM, known, VALUE_DIM, BLOCK_VALUE)
    else:
        output = load_rows(parts, index, VALUE_DIM, known, VALUE_DIM, BLOCK_VALUE).to(tl.float32)
    return output


def run_gated_sum_gradient(grad_out: Tensor, gates: Tensor, branches: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of the gates and of the branches, undivided, in their dtypes; all contiguous."""
    gradients = tuple(torch.empty_like(x) for x in (gates, *branches))
    size = gates.numel() // 3
    with on_device(gates):
        gated_sum_gradient_kernel[(triton.cdiv(size, TILE.queries),)](
            *(grad_out, gates, *branches, *gradients, size), **constants(branches[0].shape[-1]), **options(TILE)
        )
    return gradients


@triton.jit(do_not_specialize=NUMBERS)
def gated_sum_gradient_kernel(
    grad_out, gates, compressed, selected, sliding, grad_gates, grad_compressed, grad_selected, grad_sliding, size,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Tensors as in `run_gated_sum_gradient`."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    known = index < size
    grad = load_rows(grad_out, index, VALUE_DIM, known, VALUE_DIM, BLOCK_VALUE).to(tl.float32)
    for branch in tl.static_range(3):
        if branch == 0:
            rows, target = compressed, grad_compressed
        elif branch == 1:
            rows, target = selected, grad_selected
        else:
            rows, target = sliding, grad_sliding
        gate = tl.load(gates + 3 * index + branch, mask=known, other=0.0).to(tl.float32)
        output = load_rows(rows, index, VALUE_DIM, known, VALUE_DIM, BLOCK_VALUE).to(tl.float32)
        store_rows(target, index, VALUE_DIM, gate[:, None] * grad, known, VALUE_DIM, BLOCK_VALUE)
        inner = tl.sum(output * grad, axis=1)
        tl.store(grad_gates + 3 * index + branch, inner.to(grad_gates.dtype.element_ty), mask=known)
