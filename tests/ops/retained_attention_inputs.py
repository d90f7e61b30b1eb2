"""Inputs of the tests of retained_attention, and what they look at."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from holdfast.ops.retained_attention import FOREVER, retained_attention
from holdfast.ops.retention import streaming_retention


def tensors(
    keys: int,
    queries: int | None = None,
    *,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int = 2,
    dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (keys if queries is None else queries, heads, dim),
        (keys, kv_heads, dim),
        (keys, kv_heads, value_dim or dim),
    )
    q, k, v = (torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def visibility(kind: str, k: Tensor, window: int | None, seed: int = 0, budget: int = 11) -> Tensor | None:
    """`visible_until` of a kind, [B, Tk, Hkv]."""
    generator = torch.Generator().manual_seed(seed)
    shape, width = k.shape[:3], window or 0
    leaving = (torch.arange(shape[1]) + width)[None, :, None].expand(shape)
    scores = torch.randn(shape, generator=generator)
    match kind:
        case "plain":
            return None
        case "all":
            return torch.full((*shape[:2], 1), FOREVER)
        case "nothing":
            return leaving
        case "some":
            return torch.where(scores > 0, FOREVER, leaving)
        case "budget":
            return streaming_retention(scores, budget, width, 2)
        case "documents":  # lost inside the window as well: the ends of packed sequences
            return ((leaving - width) // 37 * 37 + 36)[..., :1]
        case "pads":  # in front, some rows more, one of them whole
            padded = torch.arange(shape[1])[None, :] < torch.tensor([shape[1] // 3, shape[1]])[: shape[0], None]
            return torch.where(padded[..., None], -1, torch.where(scores > 0.5, FOREVER, leaving))
        case "random":
            return torch.randint(-3, shape[1] + 3, shape, generator=generator)
    raise ValueError(kind)


KINDS = ["plain", "all", "nothing", "some", "budget", "documents", "pads", "random"]


def outputs_and_gradients(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], *inputs: Tensor, seed: int = 99
) -> list[Tensor]:
    out = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def assert_like_reference(inputs: tuple[Tensor, ...], until: Tensor | None, window: int | None, backend: str) -> None:
    """Output and all gradients within rounding of the reference computed in float64."""
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    attend = functools.partial(retained_attention, visible_until=until, window=window)
    expected = outputs_and_gradients(functools.partial(attend, backend="reference"), *exact)
    actual = outputs_and_gradients(functools.partial(attend, backend=backend), *inputs)
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}[inputs[0].dtype]
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert ours.dtype == inputs[0].dtype
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(1.0)
        assert error < limit, f"{name} is off by {error:.2e}"
