"""Gradients of gradients: right, or refused with a line that says what to take instead."""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from holdfast.ops.gated_attention import gated_retained_attention
from holdfast.ops.gated_delta_rule import gated_delta_rule, gated_delta_step, native
from holdfast.ops.grouped_convolution import grouped_convolution
from holdfast.ops.native_sparse_attention import native_sparse_attention
from holdfast.ops.norms import gated_rms_norm, l2_norm, rms_norm
from holdfast.ops.retained_attention import retained_attention
from holdfast.ops.rotary import apply_rotary, rotary_tables
from holdfast.ops.short_convolution import short_convolution
from holdfast.ops.swiglu import swiglu
from holdfast.ops.window_step import Slots, window_step

Op = Callable[..., Tensor]

needs_compiler = pytest.mark.skipif(not native.is_available(), reason="there is no C++ compiler")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="Triton's interpreter is needed"
)


def random(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


def delta_inputs(T: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    row = (1, T, 2, 4)
    q, k, v, g, beta = random(row, row, row, row[:3], row[:3], dtype=dtype)
    return l2_norm(q), l2_norm(k), v, -g, beta


def attention_inputs(queries: int, keys: int, *further: tuple[int, ...]) -> tuple[Tensor, ...]:
    return random((1, queries, 2, 16), (1, keys, 2, 16), (1, keys, 2, 16), *further)


def step(q: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, *, backend: str) -> Tensor:
    """A step of decoding over slots that keep their gradient."""
    slots = Slots(keys.clone(), values.clone(), torch.full((1,), 5))
    return window_step(q, key, value, slots, backend=backend)


def step_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return random((1, 4, 8), (1, 2, 8), (1, 2, 8), (1, 2, 3, 8), (1, 2, 3, 8), dtype=dtype)


def second_gradients(op: Op, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = op(*inputs)
    out = out if isinstance(out, Tensor) else out[0]
    first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)


SPARSE = {"block_size": 16, "num_blocks": 2, "window": 16}
GATES = (1, 40, 2, 3)
REFUSED = [
    pytest.param(
        "gated_delta_rule",
        "native",
        partial(gated_delta_rule, backend="native"),
        delta_inputs(40),
        marks=needs_compiler,
    ),
    ("gated_delta_rule", "chunked", partial(gated_delta_rule, backend="chunked"), delta_inputs(40)),
    (
        "retained_attention",
        "blocked",
        partial(retained_attention, visible_until=None, window=8),
        attention_inputs(40, 40),
    ),
    (
        "retained_attention",
        "blocked",
        lambda q, k, v, gate: gated_retained_attention(q, k, v, torch.full((1, 40, 1), 50), 8, gate),
        attention_inputs(40, 40, (1, 40, 2)),
    ),
    (
        "native_sparse_attention",
        "blocked",
        partial(native_sparse_attention, **SPARSE, backend="blocked"),
        attention_inputs(40, 40, GATES),
    ),
    ("window_step", "pytorch", partial(step, backend="pytorch"), step_inputs()),
    pytest.param(
        "retained_attention",
        "triton",
        partial(retained_attention, visible_until=None, window=8, backend="triton"),
        attention_inputs(40, 40),
        marks=needs_triton,
    ),
    pytest.param(
        "native_sparse_attention",
        "triton",
        partial(native_sparse_attention, **SPARSE, backend="triton"),
        attention_inputs(40, 40, GATES),
        marks=needs_triton,
    ),
]


@pytest.mark.parametrize("around", [nullcontext(), FlopCounterMode(display=False)], ids=["alone", "counted"])
@pytest.mark.parametrize(("name", "backend", "op", "inputs"), REFUSED)
def test_what_has_no_second_derivative_says_so(
    name: str, backend: str, op: Op, inputs: tuple[Tensor, ...], around: AbstractContextManager[object]
) -> None:
    message = f"^{name} has no second derivative with backend '{backend}': take"
    with around, pytest.raises(RuntimeError, match=message):
        second_gradients(op, inputs)


@pytest.mark.parametrize(("queries", "window"), [(40, None), (4, 8)])
def test_pytorchs_own_attention_refuses_in_its_own_words(queries: int, window: int | None) -> None:
    """Saying more would cost a quarter of the time of a few tokens."""
    with pytest.raises(RuntimeError, match="is not implemented"):
        second_gradients(partial(retained_attention, visible_until=None, window=window), attention_inputs(queries, 40))


@pytest.mark.parametrize("queries", [4, 40])
def test_first_derivatives_may_keep_their_graph(queries: int) -> None:
    inputs = attention_inputs(queries, 40)
    found = torch.autograd.grad(retained_attention(*inputs, None, None).sum(), inputs, create_graph=True)
    expected = torch.autograd.grad(retained_attention(*inputs, None, None, backend="reference").sum(), inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_first_derivatives_of_a_step_may_keep_their_graph() -> None:
    inputs = step_inputs()
    found, expected = (
        torch.autograd.grad(step(*inputs, backend=backend).square().sum(), inputs, create_graph=True)
        for backend in ("pytorch", "reference")
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        (partial(step, backend="reference"), step_inputs(torch.float64)),
        (partial(gated_delta_rule, backend="reference"), delta_inputs(5, torch.float64)),
        (
            partial(retained_attention, visible_until=None, window=2, backend="reference"),
            random(*[(1, 6, 1, 2)] * 3, dtype=torch.float64),
        ),
        (
            partial(native_sparse_attention, block_size=2, num_blocks=2, window=2, backend="reference"),
            random(*[(1, 6, 1, 2)] * 3, (1, 6, 1, 3), dtype=torch.float64),
        ),
    ],
)
def test_the_reference_has_one(op: Op, inputs: tuple[Tensor, ...]) -> None:
    def first(*xs: Tensor) -> Tensor:
        out = op(*xs)
        return out if isinstance(out, Tensor) else out[0]

    assert torch.autograd.gradgradcheck(first, tuple(x.detach().requires_grad_() for x in inputs))


TABLES = rotary_tables(torch.arange(80)[None], 16)


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        (swiglu, random((2, 80, 64), (2, 80, 64))),
        (l2_norm, random((2, 80, 64))),
        (rms_norm, random((2, 80, 64), (64,))),
        (gated_rms_norm, random((2, 80, 64), (2, 80, 64), (64,))),
        (short_convolution, random((2, 80, 64), (64, 1, 4))),
        (
            lambda x, weight, bias: grouped_convolution(x, torch.ones(1, 80, dtype=torch.bool), weight, bias),
            random((2, 2, 80, 16), (16, 16, 1, 3), (16,)),
        ),
        (lambda x: apply_rotary(x, *TABLES), random((2, 80, 4, 16))),
        (gated_delta_step, (*delta_inputs(1), *random((1, 2, 4, 4)))),
    ],
)
def test_the_others_have_one_and_it_does_not_depend_on_the_dtype(op: Op, inputs: tuple[Tensor, ...]) -> None:
    """In float64 they are made of PyTorch's operations, whose second derivatives are PyTorch's."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    exact = second_gradients(op, tuple(x.detach().double().requires_grad_() for x in inputs))
    for found, expected in zip(second_gradients(op, leaves), exact, strict=True):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1e-2)
