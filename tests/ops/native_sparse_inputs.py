"""Inputs of the tests of native_sparse_attention, and the comparison with its reference."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from holdfast.ops.native_sparse_attention import native_sparse_attention


def tensors(
    keys: int,
    queries: int | None = None,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaves q, k, v and gates."""
    generator = torch.Generator().manual_seed(seed)
    queries = keys if queries is None else queries
    shapes = ((queries, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim or dim), (queries, heads, 3))
    q, k, v, g = (torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), g.detach().sigmoid().requires_grad_()


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor, seed: int = 99
) -> tuple[list[Tensor], Tensor]:
    """Output and gradients, and the chosen blocks."""
    out, blocks = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)], blocks


def assert_like_reference(inputs: tuple[Tensor, ...], backend: str, **arguments: Any) -> None:
    """Output and all gradients within rounding of the reference in float64, and the same blocks."""
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    attend = functools.partial(native_sparse_attention, **arguments)
    expected, chosen = outputs_and_gradients(functools.partial(attend, backend="reference"), *exact)
    actual, blocks = outputs_and_gradients(functools.partial(attend, backend=backend), *inputs)
    assert blocks.dtype == torch.int64
    assert torch.equal(blocks, chosen)
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[inputs[0].dtype]
    for name, ours, theirs in zip(("out", "dq", "dk", "dv", "dgates"), actual, expected, strict=True):
        assert ours.dtype == inputs[0].dtype
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(1.0)
        assert error < limit, f"{name} is off by {error:.2e}"
