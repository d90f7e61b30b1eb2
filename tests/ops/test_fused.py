"""Norms, SwiGLU, rotations and convolutions in C++: PyTorch's numbers and gradients, in any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from holdfast.ops import fused, threads
from holdfast.ops.norms import gated_rms_norm, l2_norm, rms_norm
from holdfast.ops.rotary import apply_rotary
from holdfast.ops.short_convolution import short_convolution
from holdfast.ops.swiglu import swiglu

pytestmark = [
    pytest.mark.skipif(not fused.serves(torch.ones(1 << 12)), reason="there is no C++ compiler, or no OpenMP"),
    pytest.mark.usefixtures("poisoned_memory"),
]

# Of x, of a gate like it, and of a weight for its last dimension.
FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "l2_norm": lambda x, gate, weight: l2_norm(x),
    "rms_norm": lambda x, gate, weight: rms_norm(x, weight),
    "gated_rms_norm": lambda x, gate, weight: gated_rms_norm(x, gate, weight),
    "swiglu": lambda x, gate, weight: swiglu(gate, x),
}


def inputs(*shape: int, scale: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = (shape, shape, shape[-1:], shape)
    return [scale * torch.randn(size, generator=generator) for size in shapes]


def results(function: Callable[..., Tensor], given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of those inputs that it depends on."""
    *leaves, grad = (x.detach().to(dtype) for x in given)
    for leaf in leaves:
        leaf.requires_grad_()
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("shape", [(3, 700, 67), (2, 9, 1000), (4, 5, 40, 64), (4100, 1), (1, 4097)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(name: str, shape: tuple[int, ...], workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    call = fused._call
    monkeypatch.setattr(fused, "_call", lambda *given: (called.append(given[0]), call(*given)))
    monkeypatch.setattr(threads, "_THREADED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: workers)
    given = inputs(*shape)
    ours = results(FUNCTIONS[name], given, torch.float32)
    assert len(called) == 2
    theirs = results(FUNCTIONS[name], given, torch.float64)
    assert len(called) == 2
    for one, other in zip(ours, theirs, strict=True):
        error = (one - other).abs().max() / other.abs().max().clamp(min=1e-3)
        assert error < 3e-6


@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 1, 2, 20), (2, 5), (1, 1)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_small_tensors_without_gradients(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    call = fused._call
    monkeypatch.setattr(fused, "_call", lambda *given: (called.append(given[0]), call(*given)))
    x, gate, weight, _ = inputs(*shape)
    ours = FUNCTIONS[name](x, gate, weight)
    assert len(called) == 1
    exact = FUNCTIONS[name](x.double(), gate.double(), weight.double())
    torch.testing.assert_close(ours, exact.float(), rtol=3e-6, atol=3e-6)
    assert torch.equal(l2_norm(torch.zeros(2, 9)), torch.zeros(2, 9))
    with_gradient = FUNCTIONS[name](x.requires_grad_(), gate, weight)
    assert len(called) == 2  # of the zeros; PyTorch's few calls cost less than a function of autograd
    assert with_gradient.requires_grad


@pytest.mark.parametrize("name", FUNCTIONS)
def test_layouts_and_frozen_inputs(name: str) -> None:
    x, gate, weight, grad = inputs(70, 96)
    expected = results(FUNCTIONS[name], [x, gate, weight, grad], torch.float32)
    turned = [y.T.contiguous().T for y in (x, gate)]
    actual = results(FUNCTIONS[name], [*turned, weight, grad.T.contiguous().T], torch.float32)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    gate_only = gate.clone().requires_grad_()
    out = FUNCTIONS[name](x, gate_only, weight)
    assert out.requires_grad == (name in ("gated_rms_norm", "swiglu"))
    with torch.inference_mode():
        torch.testing.assert_close(FUNCTIONS[name](x, gate, weight), expected[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_extreme_and_broken_numbers(name: str) -> None:
    x, gate, weight, _ = inputs(64, 64)
    gate[0, :7] = torch.tensor([0.0, -88.0, 200.0, -200.0, 1e30, -1e30, torch.finfo(torch.float32).min])
    x[3] = 0
    expected = FUNCTIONS[name](x.double(), gate.double(), weight.double()).float()
    torch.testing.assert_close(FUNCTIONS[name](x, gate, weight), expected, rtol=1e-5, atol=1e-6)
    for value in (torch.nan, torch.inf):
        x[5, 5] = value
        assert FUNCTIONS[name](x, gate, weight)[5, 5].isnan() == (name != "swiglu" or value != value)


def test_who_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(64, 64)
    assert fused.serves(x, torch.nn.Parameter(x))
    assert fused.serves(x[:60])
    assert not fused.serves(x[:60], torch.nn.Parameter(x))  # PyTorch's few calls cost less than autograd's Python
    assert not fused.serves(x[:0])
    assert not fused.serves(x.double())
    assert not fused.serves(x.bfloat16())
    assert not fused.serves(x, x.half())
    assert not fused.serves(x.to("meta"))
    assert not fused.serves(torch._neg_view(x))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(swiglu(x, x), FakeTensor)
    (tangent,) = torch.func.jvp(l2_norm, (x,), (x,))[1:]
    torch.testing.assert_close(tangent, torch.zeros_like(x), atol=1e-6, rtol=0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(threads, "openmp", lambda: None)
    assert fused.serves(x)
    assert not fused.serves(x.expand(64, 64, 64))  # PyTorch has several threads for it, and this has one


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives(name: str) -> None:
    def penalty(dtype: torch.dtype) -> list[Tensor]:
        """Gradients of the length of a gradient."""
        leaves = [x.to(dtype).requires_grad_() for x in inputs(64, 65, scale=0.5)[:3]]
        out = FUNCTIONS[name](*leaves)
        slopes = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True, allow_unused=True)
        sum(slope.square().sum() for slope in slopes if slope is not None).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    for one, other in zip(penalty(torch.float32), penalty(torch.float64), strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "width"), [(2, 65, 67, 4), (3, 2, 1000, 4), (1, 4100, 1, 2), (5, 40, 64, 3)]
)
@pytest.mark.parametrize("continued", [False, True])
def test_convolution(
    batch: int, tokens: int, channels: int, width: int, workers: int, continued: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    call = fused._call
    monkeypatch.setattr(fused, "_call", lambda *given: (called.append(given[0]), call(*given)))
    monkeypatch.setattr(threads, "_THREADED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: workers)
    torch.manual_seed(tokens)
    x, grad = torch.randn(2, batch, tokens, channels)
    weight, state = torch.randn(channels, 1, width), torch.randn(batch, channels, width - 1)

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [y.to(dtype).requires_grad_() for y in (x, weight)]
        out, latest = short_convolution(*leaves, state.to(dtype) if continued else None)
        # Through what is handed on, too.
        gradients = torch.autograd.grad((out * grad.to(dtype)).sum() + latest.sin().sum(), leaves)
        return [out.detach(), latest.detach(), *gradients]

    ours = run(torch.float32)
    assert called == ["holdfast_convolution", "holdfast_convolution_backward"]
    for one, other in zip(ours, run(torch.float64), strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 3e-6 * other.abs().max().clamp(min=1)
    assert len(called) == 2


def test_convolution_leaves_to_pytorch_what_it_does_not_know() -> None:
    x, weight, state = torch.randn(1, 70, 64), torch.randn(64, 1, 4), torch.randn(1, 64, 3)
    state.requires_grad_()
    short_convolution(x, weight, state)[0].sum().backward()
    assert state.grad is not None
    assert state.grad.abs().min() > 0
    plain, _ = short_convolution(x, weight, activation=False)
    torch.testing.assert_close(short_convolution(x, weight)[0], torch.nn.functional.silu(plain), rtol=1e-5, atol=1e-5)
    packed, _ = short_convolution(x, weight, cu_seqlens=torch.tensor([0, 30, 70]))
    torch.testing.assert_close(packed[:, 30:], short_convolution(x[:, 30:], weight)[0], rtol=1e-5, atol=1e-5)


# Inputs of which one depends on the other, or that are one.
DEPENDENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "twice": lambda x, w: swiglu(2 * x, x),
    "same": lambda x, w: swiglu(x, x),
    "shared weight": lambda x, w: rms_norm(rms_norm(x, w).tanh(), w),
    "gate": lambda x, w: gated_rms_norm(x, x.sin(), w),
    "two layers": lambda x, w: short_convolution(short_convolution(x, _taps(w))[0], _taps(w.cos()))[0],
}


def _taps(weight: Tensor) -> Tensor:
    return torch.stack((weight, weight.sin()), dim=-1).unsqueeze(1)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", DEPENDENT)
def test_inputs_that_depend_on_each_other(name: str, create_graph: bool) -> None:
    def run(dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        x, weight = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 70, 64), (64,)))
        out = DEPENDENT[name](x, weight).sin().sum()
        slopes = torch.autograd.grad(out, (x, weight), create_graph=create_graph, allow_unused=True)
        slopes = [slope for slope in slopes if slope is not None]
        if create_graph:
            slopes += torch.autograd.grad(sum(slope.square().sum() for slope in slopes), x)
        return slopes

    for one, other in zip(run(torch.float32), run(torch.float64), strict=True):
        assert (one - other).abs().max() < 2e-5 * other.abs().max()


def test_gradients_that_cpp_cannot_read() -> None:
    x, gate, weight, grad = inputs(64, 65)
    x.requires_grad_()
    weight.requires_grad_()
    out = gated_rms_norm(x, gate, weight)
    expected = torch.autograd.grad(out, (x, weight), grad, retain_graph=True)
    batched = torch.autograd.grad(out, (x, weight), torch.stack((grad, 2 * grad)), True, is_grads_batched=True)
    for one, other in zip(batched, expected, strict=True):
        torch.testing.assert_close(one, torch.stack((other, 2 * other)), rtol=1e-4, atol=1e-4)
    negative = torch.autograd.grad(out, (x, weight), torch._neg_view(grad))
    for one, other in zip(negative, expected, strict=True):
        torch.testing.assert_close(one, -other, rtol=1e-4, atol=1e-4)


def test_frozen_weights_get_no_gradient() -> None:
    x, gate, weight, grad = inputs(2, 64, 65)
    x.requires_grad_()
    gated_rms_norm(x, gate, weight).backward(grad)
    alone, x.grad = x.grad, None
    gated_rms_norm(x, gate, weight.clone().requires_grad_()).backward(grad)
    assert torch.equal(x.grad, alone)
    taps = torch.randn(65, 1, 4)
    x.grad = None
    short_convolution(x, taps)[0].backward(grad)
    alone, x.grad = x.grad, None
    short_convolution(x, taps.clone().requires_grad_())[0].backward(grad)
    assert torch.equal(x.grad, alone)


def test_a_filter_of_one_and_a_state_that_is_overwritten() -> None:
    x = torch.randn(1, 70, 64, requires_grad=True)
    out, latest = short_convolution(x, torch.full((64, 1, 1), 2.0))
    torch.testing.assert_close(out, torch.nn.functional.silu(2 * x))
    assert latest.shape == (1, 64, 0)
    with torch.inference_mode():
        state = torch.randn(1, 64, 1)
    weight = torch.randn(64, 1, 2, requires_grad=True)
    out, latest = short_convolution(x, weight, state)
    torch.testing.assert_close(latest, x[:, -1:].transpose(1, 2))
    before = torch.autograd.grad(out.sum(), weight, retain_graph=True)[0]
    with torch.inference_mode():
        state.zero_()
    assert torch.equal(torch.autograd.grad(out.sum(), weight)[0], before)


def test_second_derivatives_of_the_convolution() -> None:
    def penalty(dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        x, weight = torch.randn(2, 70, 64).to(dtype).requires_grad_(), torch.randn(64, 1, 4).to(dtype).requires_grad_()
        slopes = torch.autograd.grad(short_convolution(x, weight)[0].sin().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), (x, weight))

    for one, other in zip(penalty(torch.float32), penalty(torch.float64), strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


def test_swiglu_of_other_shapes_is_pytorchs() -> None:
    gate, up = torch.randn(64, 64), torch.randn(64)
    torch.testing.assert_close(swiglu(gate, up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize(("batch", "tables"), [(3, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(41, 9, 66), (700, 3, 4), (5, 1, 2000)])
def test_rotation(
    batch: int, tables: int, tokens: int, heads: int, dim: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    call = fused._call
    monkeypatch.setattr(fused, "_call", lambda *given: (called.append(given[0]), call(*given)))
    monkeypatch.setattr(threads, "_THREADED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: workers)
    torch.manual_seed(tokens)
    x, grad = torch.randn(2, batch, tokens, heads, dim)
    angles = 6 * torch.randn(tables, tokens, dim // 2)

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        out = apply_rotary(leaf, angles.to(dtype).cos(), angles.to(dtype).sin())
        return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(dtype))]

    ours = run(torch.float32)
    assert called == ["holdfast_rotate"] * 2
    for one, other in zip(ours, run(torch.float64), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=3e-6, atol=3e-6)


def turned(x: Tensor) -> Tensor:
    """The same numbers, with the last dimension but one last in memory."""
    return x.detach() if x.ndim < 2 else x.detach().mT.contiguous().mT


@pytest.mark.parametrize("name", [*FUNCTIONS, "rotation", "convolution"])
def test_hooks_of_saved_tensors_may_change_layouts(name: str) -> None:
    torch.manual_seed(0)
    x, gate, grad = torch.randn(3, 2, 80, 4, 64)
    weight, angles, taps = torch.randn(64), torch.randn(2, 80, 32), torch.randn(256, 1, 4)
    functions = FUNCTIONS | {
        "rotation": lambda x, *_: apply_rotary(x, angles.cos(), angles.sin()),
        "convolution": lambda x, *_: short_convolution(x.flatten(2), taps)[0].view_as(x),
    }
    found = []
    for hook in (lambda y: y, turned):
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda y: y):
            out = functions[name](leaf, gate, weight)
        found.append(torch.autograd.grad(out, leaf, grad)[0])
    assert torch.equal(*found)


def test_rotation_by_learned_angles_and_back() -> None:
    x, angles = torch.randn(2, 70, 4, 32), torch.randn(1, 70, 16).requires_grad_()
    out = apply_rotary(x, angles.cos(), angles.sin())
    (slope,) = torch.autograd.grad(out.square().sum(), angles)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-4, rtol=0)  # lengths stay the same
    cos, sin = angles.detach().cos(), angles.detach().sin()
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(apply_rotary(leaf, cos, sin), leaf, out)[0], x, rtol=1e-5, atol=1e-6)
    grad = out.detach().requires_grad_()
    (slope,) = torch.autograd.grad(apply_rotary(leaf, cos, sin), leaf, grad, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(slope, grad, x)[0], out.detach(), rtol=1e-5, atol=1e-6)
    backwards = [apply_rotary(y.detach(), cos, sin) for y in (x.transpose(1, 2).contiguous().transpose(1, 2), x)]
    assert torch.equal(*backwards)
