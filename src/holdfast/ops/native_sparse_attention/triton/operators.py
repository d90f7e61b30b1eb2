"""The kernels as operators of PyTorch, so that `torch.compile` and autograd know them without looking inside.

Triton is imported when an operator first runs.
"""

from typing import Any

import torch
from torch import Tensor

from holdfast.ops.flops import attention_flops, compressed_pairs, count_with, selected_pairs
from holdfast.ops.native_sparse_attention.triton.launch import Shape, by_rows
from holdfast.ops.native_sparse_attention.triton.sizes import Sizes, sizes_for
from holdfast.ops.retained_attention.triton.sizes import device_kind
from holdfast.ops.second_derivatives import refuse_in


@torch.library.custom_op("holdfast::nsa_compressed", mutates_args=())
def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    begins: Tensor | None,
    keys: int,
    block_size: int,
    num_blocks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the means of complete blocks, and the blocks that it chooses.

    Args:
        q: [B, Tq, H, D]. k: [B, M, Hkv, D], the means of M = keys // S blocks. v: [B, M, Hkv, Dv].
        begins: int64 [M], rising: the first block of the sequence of each block, where Tq = keys; None: block 0.

    Returns:
        Output [B, Tq, H, Dv] in the dtype of q, base-2 log-sum-exp fp32 [B, Tq, H] (−∞ where nothing is seen), and
        blocks int64 [B, Tq, Hkv, n]. Only the first has a gradient.
    """
    from holdfast.ops.native_sparse_attention.triton.forward import run_attend, run_choose

    q, k, v = q.contiguous(), by_rows(k), by_rows(v)
    shape = Shape.of(q, v, keys, block_size, num_blocks, lengths, begins)
    sizes = _sizes(q, v, packed=shape.packed)
    out, log_sum = run_attend(q, k, v, None, lengths, begins, shape, scale, sizes.means.forward)
    return out, log_sum, run_choose(q, k, log_sum, lengths, begins, shape, scale, sizes.choice)


@compressed_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    begins: Tensor | None,
    keys: int,
    block_size: int,
    num_blocks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = q.new_empty(*q.shape[:2], k.shape[2], num_blocks, dtype=torch.int64)
    return _fake_output(q, v), _fake_log_sum(q), blocks


@torch.library.custom_op("holdfast::nsa_compressed_backward", mutates_args=())
def compressed_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    begins: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    keys: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of `compressed_attention`, contiguous."""
    from holdfast.ops.native_sparse_attention.triton.backward import mean_splits, run_mean_gradient, run_query_gradient

    grad_out, q, k, v = grad_out.contiguous(), q.contiguous(), by_rows(k), by_rows(v)
    shape, sequences = Shape.of(q, v, keys, block_size, 1, lengths, begins), (lengths, begins)
    tiles = _sizes(q, v, packed=shape.packed).means
    dq, inner = run_query_gradient(grad_out, q, k, v, None, *sequences, out, log_sum, shape, scale, tiles.of_queries)
    splits = mean_splits(shape, tiles.of_keys, q.device)
    dk, dv = run_mean_gradient(grad_out, q, k, v, *sequences, log_sum, inner, shape, scale, tiles.of_keys, splits)
    return dq, dk, dv


@torch.library.custom_op("holdfast::nsa_selected", mutates_args=())
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    lengths: Tensor | None,
    begins: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of chosen blocks.

    Args:
        q: [B, Tq, H, D]. k: [B, Tk, Hkv, D]. v: [B, Tk, Hkv, Dv]. blocks: the third result of `compressed_attention`.
        begins: as there.

    Returns:
        Its first two results, of these keys.
    """
    from holdfast.ops.native_sparse_attention.triton.forward import run_attend

    q, k, v = q.contiguous(), by_rows(k), by_rows(v)
    shape = Shape.of(q, v, k.shape[1], block_size, blocks.shape[3], lengths, begins)
    return run_attend(q, k, v, blocks.contiguous(), lengths, begins, shape, scale, _sizes(q, v).listed)


@selected_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _fake_output(q, v), _fake_log_sum(q)


@torch.library.custom_op("holdfast::nsa_selected_backward", mutates_args=())
def selected_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    lengths: Tensor | None,
    begins: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of `selected_attention`, contiguous."""
    from holdfast.ops.native_sparse_attention.triton.backward import run_key_gradient, run_query_gradient
    from holdfast.ops.native_sparse_attention.triton.segments import find_segments

    grad_out, q, k, v, blocks = grad_out.contiguous(), q.contiguous(), by_rows(k), by_rows(v), blocks.contiguous()
    shape, sizes = Shape.of(q, v, k.shape[1], block_size, blocks.shape[3], lengths, begins), _sizes(q, v)
    dq, inner = run_query_gradient(grad_out, q, k, v, blocks, lengths, begins, out, log_sum, shape, scale, sizes.listed)
    segments = find_segments(blocks, shape)
    dk, dv = run_key_gradient(grad_out, q, k, v, lengths, log_sum, inner, segments, shape, scale, sizes.of_keys)
    return dq, dk, dv


@compressed_attention_backward.register_fake
@selected_attention_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op("holdfast::nsa_gated_sum", mutates_args=())
def gated_sum(gates: Tensor, compressed: Tensor, selected: Tensor, sliding: Tensor) -> Tensor:
    """Gates [..., H, 3] times the outputs [..., H, Dv] of the branches, summed; in their dtype."""
    from holdfast.ops.native_sparse_attention.triton.gates import run_gated_sum

    branches = (compressed.contiguous(), selected.contiguous(), sliding.contiguous())
    return run_gated_sum(gates.contiguous(), branches, None, compressed.dtype)


@gated_sum.register_fake
def _(gates: Tensor, compressed: Tensor, selected: Tensor, sliding: Tensor) -> Tensor:
    return compressed.new_empty(compressed.shape)


@torch.library.custom_op("holdfast::nsa_gated_sum_backward", mutates_args=())
def gated_sum_backward(
    grad_out: Tensor, gates: Tensor, compressed: Tensor, selected: Tensor, sliding: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs of `gated_sum`, contiguous."""
    from holdfast.ops.native_sparse_attention.triton.gates import run_gated_sum_gradient

    branches = (compressed.contiguous(), selected.contiguous(), sliding.contiguous())
    of_gates, of_compressed, of_selected, of_sliding = run_gated_sum_gradient(
        grad_out.contiguous(), gates.contiguous(), branches
    )
    return of_gates, of_compressed, of_selected, of_sliding


@gated_sum_backward.register_fake
def _(
    grad_out: Tensor, gates: Tensor, compressed: Tensor, selected: Tensor, sliding: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_gates, *branches = (x.new_empty(x.shape) for x in (gates, compressed, selected, sliding))
    return of_gates, branches[0], branches[1], branches[2]


@torch.library.custom_op("holdfast::nsa_step", mutates_args=())
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    means_k: Tensor,
    means_v: Tensor,
    lengths: Tensor | None,
    block_size: int,
    num_blocks: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """All branches of a few queries, without a gradient: output [B, Tq, H, Dv] and blocks int64 [B, Tq, Hkv, n]."""
    from holdfast.ops.native_sparse_attention.triton.step import run_step

    q, gates = q.contiguous(), gates.contiguous()
    k, v, means_k, means_v = (by_rows(x) for x in (k, v, means_k, means_v))
    shape = Shape.of(q, v, k.shape[1], block_size, num_blocks, lengths)
    return run_step(q, k, v, gates, means_k, means_v, lengths, shape, window, scale, _sizes(q, v))


@step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    means_k: Tensor,
    means_v: Tensor,
    lengths: Tensor | None,
    block_size: int,
    num_blocks: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _fake_output(q, v), q.new_empty(*q.shape[:2], k.shape[2], num_blocks, dtype=torch.int64)


def _keep_compressed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, lengths, begins, ctx.keys, ctx.block_size, _, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, lengths, begins, *output[:2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _compressed_gradients(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 9
    numbers = (ctx.keys, ctx.block_size, ctx.scale)
    return *compressed_attention_backward(grad_out, *ctx.saved_tensors, *numbers), *(None,) * 6


def _keep_selected(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, blocks, lengths, begins, ctx.block_size, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, blocks, lengths, begins, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _selected_gradients(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 8
    return *selected_attention_backward(grad_out, *ctx.saved_tensors, ctx.block_size, ctx.scale), *(None,) * 5


def _keep_branches(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gated_sum_gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
    return gated_sum_backward(grad_out, *ctx.saved_tensors)


compressed_attention.register_autograd(_compressed_gradients, setup_context=_keep_compressed)
selected_attention.register_autograd(_selected_gradients, setup_context=_keep_selected)
gated_sum.register_autograd(_gated_sum_gradients, setup_context=_keep_branches)
refuse_in(
    "native_sparse_attention",
    "triton",
    compressed_attention_backward,
    selected_attention_backward,
    gated_sum_backward,
)


def _compressed_flops(
    q: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    begins: Tensor | None,
    keys: int,
    block_size: int,
    *,
    backward: bool = False,
) -> int:
    pairs = q.shape[2] * compressed_pairs(_positions(q, keys, lengths), begins, block_size, v.shape[1])
    return attention_flops(pairs, q.shape[3], v.shape[3], backward=backward)


def _selected_flops(
    q: Tensor, v: Tensor, blocks: Tensor, lengths: Tensor | None, block_size: int, *, backward: bool = False
) -> int:
    positions, groups = _positions(q, v.shape[1], lengths).unsqueeze(2), q.shape[2] // v.shape[2]
    pairs = groups * selected_pairs(positions, blocks, block_size, v.shape[1])
    return attention_flops(pairs, q.shape[3], v.shape[3], backward=backward)


def _positions(q: Tensor, keys: int, lengths: Tensor | None) -> Tensor:
    """[B, Tq], the index of each query; negative where it sees nothing."""
    positions = torch.arange(keys - q.shape[1], keys, device=q.device).expand(q.shape[:2])
    return positions if lengths is None else positions + (lengths - keys)[:, None]


count_with(
    lambda q, _k, v, lengths, begins, keys, block_size, *_: _compressed_flops(q, v, lengths, begins, keys, block_size),
    compressed_attention,
)
count_with(
    lambda _grad, q, _k, v, lengths, begins, _out, _log_sum, keys, block_size, _: _compressed_flops(
        q, v, lengths, begins, keys, block_size, backward=True
    ),
    compressed_attention_backward,
)
count_with(
    lambda q, _k, v, blocks, lengths, _begins, block_size, _: _selected_flops(q, v, blocks, lengths, block_size),
    selected_attention,
)
count_with(
    lambda _grad, q, _k, v, blocks, lengths, *others: _selected_flops(q, v, blocks, lengths, others[-2], backward=True),
    selected_attention_backward,
)


def _sizes(q: Tensor, v: Tensor, *, packed: bool = False) -> Sizes:
    return sizes_for(device_kind(q.device), q.dtype, max(q.shape[3], v.shape[3]), packed=packed)


def _fake_output(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def _fake_log_sum(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)
