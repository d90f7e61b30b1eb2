"""The kernels as operators of PyTorch, so that `torch.compile` and autograd know them without looking inside.

Triton is imported when an operator first runs.
"""

from typing import Any

import torch
from torch import Tensor

from holdfast.ops.flops import attention_flops, count_with, retained_pairs
from holdfast.ops.retained_attention.triton import sizes
from holdfast.ops.second_derivatives import refuse_in


@torch.library.custom_op("holdfast::retention_plan", mutates_args=())
def retention_plan(visible_until: Tensor, queries: int, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`plan.make_plan`: visible_until int64 [B, Tk, Hkv], no size 0 → until, order, offsets, starts, all int32."""
    from holdfast.ops.retained_attention.triton.plan import make_plan

    return make_plan(visible_until, queries, window)


@retention_plan.register_fake
def _(visible_until: Tensor, queries: int, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, keys, kv_heads = visible_until.shape
    rows, blocks = batch * kv_heads, -(-keys // sizes.KEY_BLOCK)
    columns = (keys, keys if window < keys - 1 else 0, (sizes.CLASSES + 1) * blocks + 1, blocks)
    until, order, offsets, starts = (visible_until.new_empty(rows, size, dtype=torch.int32) for size in columns)
    return until, order, offsets, starts


@torch.library.custom_op("holdfast::retained_attention", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    until: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    starts: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`forward.forward`: output in the dtype of q, and log-sum-exp, which carries no gradient."""
    from holdfast.ops.retained_attention.triton.forward import forward

    plan = (until, order, offsets, starts)
    return forward(q.contiguous(), k.contiguous(), v.contiguous(), plan, window, scale, _tiles(q, v).forward)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("holdfast::retained_attention_backward", mutates_args=())
def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    until: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    starts: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward.backward`: gradients of q, k and v."""
    from holdfast.ops.retained_attention.triton.backward import backward

    rows = (grad_out.contiguous(), q.contiguous(), k.contiguous(), v.contiguous())
    return backward(*rows, out, log_sum, (until, order, offsets, starts), window, scale, _tiles(q, v))


@attend_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *plan, window, scale = inputs
    ctx.save_for_backward(q, k, v, *output, *plan)
    ctx.window, ctx.scale = window, scale
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 9
    return *attend_backward(grad_out, *ctx.saved_tensors, ctx.window, ctx.scale), *(None,) * 6


attend.register_autograd(_gradients, setup_context=_keep)
refuse_in("retained_attention", "triton", attend_backward)


def _flops(q: Tensor, k: Tensor, v: Tensor, until: Tensor | None, *others: Any, backward: bool = False) -> int:
    (batch, keys, kv_heads, dim), groups = k.shape, q.shape[2] // k.shape[2]
    pairs = groups * retained_pairs(until, batch * kv_heads, q.shape[1], keys, others[-2])
    return attention_flops(pairs, dim, v.shape[3], backward=backward)


count_with(_flops, attend)
count_with(
    lambda _grad, q, k, v, _out, _log_sum, until, *others: _flops(q, k, v, until, *others, backward=True),
    attend_backward,
)


def _tiles(q: Tensor, v: Tensor) -> sizes.Tiles:
    return sizes.tiles_for(sizes.device_kind(q.device), q.dtype, max(q.shape[3], v.shape[3]))
