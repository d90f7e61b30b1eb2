"""The C++ of a decoded token against the same ops in PyTorch."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from holdfast.mixers.scorers import ConvScorer
from holdfast.ops import one_token, threads
from holdfast.ops.gated_delta_rule import gated_delta_step
from holdfast.ops.linear import apply_linear
from holdfast.ops.norms import l2_norm
from holdfast.ops.short_convolution import short_convolution

pytestmark = [
    pytest.mark.skipif(not one_token.serves(torch.ones(1)), reason="there is no C++ compiler"),
    pytest.mark.usefixtures("poisoned_memory"),
]


WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_same(function: Callable[..., Any], *inputs: Tensor, calls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`function` gives the same in C++, by the function called `calls`, as in PyTorch with float64."""
    done = []
    called = getattr(one_token, calls)
    monkeypatch.setattr(one_token, calls, lambda *given: (done.append(calls), called(*given))[1])
    ours = function(*inputs)
    assert done == [calls]
    theirs = function(*(x.double() for x in inputs))
    assert done == [calls]
    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(("batch", "channels", "width"), [(1, 96, 4), (3, 5, 2)])
def test_convolution(batch: int, channels: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = numbers(batch, 1, channels), numbers(channels, 1, width), numbers(batch, channels, width - 1)
    assert_same(short_convolution, *inputs, calls="convolve", monkeypatch=monkeypatch)


@pytest.mark.parametrize(("batch", "key_heads", "heads", "keys", "values"), [(1, 4, 4, 32, 32), (2, 2, 6, 12, 7)])
def test_delta_rule(
    batch: int, key_heads: int, heads: int, keys: int, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = (l2_norm(numbers(batch, 1, key_heads, keys, seed=n)) for n in (0, 1))
    v, state = numbers(batch, 1, heads, values), numbers(batch, heads, keys, values)
    g, beta = -numbers(batch, 1, heads).exp(), numbers(batch, 1, heads, seed=1).sigmoid()
    assert_same(gated_delta_step, q, k, v, g, beta, state, calls="delta", monkeypatch=monkeypatch)
    pad = torch.zeros(batch, 1, heads)
    assert torch.equal(gated_delta_step(q, k, v, pad, pad, state)[1], state)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("kernels", "dilations"), [((3, 3, 3), (2, 2, 2)), ((5, 3), (1, 3)), ((1,), (1,))])
def test_scorer(
    kernels: tuple[int, ...], dilations: tuple[int, ...], shared: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    scorer = ConvScorer(3, 40, kernels, dilations, shared=shared, causal=causal).eval().requires_grad_(False)
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    length = scorer.receptive_field
    valid = torch.arange(length) >= torch.tensor([[0], [length // 3], [length - 1]])
    exact = ConvScorer(3, 40, kernels, dilations, shared=shared, causal=causal).eval().double().requires_grad_(False)
    exact.load_state_dict(scorer.state_dict())
    for rows in (valid, valid[1:2]):
        assert_same(
            lambda x, rows=rows: (scorer if x.dtype == torch.float32 else exact)(x, rows),
            numbers(3, length, 3, 40), calls="score", monkeypatch=monkeypatch,
        )  # fmt: skip
        monkeypatch.undo()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("size", "rows", "bias"), [(64, 96, True), (37, 5, False), (3, 1, True), (512, 1408, False)])
def test_linear(size: int, rows: int, bias: bool, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_THREADED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: workers)
    layer = nn.Linear(size, rows, bias).requires_grad_(False)
    layer.weight.copy_(numbers(rows, size) / size**0.5)
    double = copy.deepcopy(layer).double()
    assert_same(
        lambda x: apply_linear(layer if x.dtype == torch.float32 else double, x),
        numbers(1, 1, size),
        calls="linear",
        monkeypatch=monkeypatch,
    )


def test_linear_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "openmp", lambda: None)
    weight, x = numbers(600, 200), numbers(1, 200)
    torch.testing.assert_close(one_token.linear(x, weight, None), x @ weight.T, rtol=1e-5, atol=1e-5)


class Scaled(nn.Linear):
    """Stands for what libraries put in the place of a linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_other_layers_and_tokens_are_called_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_token, "linear", None)  # calling it would fail
    x = numbers(1, 1, 8)
    with torch.no_grad():
        for layer in (Scaled(8, 4), nn.Sequential(nn.Linear(8, 4))):
            assert torch.equal(apply_linear(layer, x), layer(x))
        layer = nn.Linear(8, 4)
        assert apply_linear(layer, x.expand(2, 1, 8)).shape == (2, 1, 4)
        assert apply_linear(layer, x[:0]).shape == (0, 1, 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert apply_linear(layer, x).dtype == torch.bfloat16
        layer.register_forward_hook(lambda *_: torch.zeros(1))
        assert torch.equal(apply_linear(layer, x), torch.zeros(1))
    assert apply_linear(nn.Linear(8, 4), x).requires_grad


def test_shapes_that_do_not_fit_are_refused_as_ever() -> None:
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            apply_linear(nn.Linear(8, 4), torch.ones(1, 1, 7))
        layer = nn.Linear(8, 4)
        layer.bias = nn.Parameter(torch.ones(3))
        with pytest.raises(RuntimeError):
            apply_linear(layer, torch.ones(1, 1, 8))
        with pytest.warns(UserWarning, match="zero-element"):
            nothing = nn.Linear(0, 3)
        assert torch.equal(apply_linear(nothing, torch.ones(5, 0)), nothing(torch.ones(5, 0)))
        assert torch.equal(apply_linear(nothing, torch.ones(1, 0)), nothing(torch.ones(1, 0)))


def test_what_follows_operations_sees_them() -> None:
    layer, x = nn.Linear(8, 4).requires_grad_(False), numbers(1, 1, 8)
    with FlopCounterMode(display=False) as counter:
        apply_linear(layer, x)
    assert counter.get_total_flops() == 2 * 8 * 4
    traced = torch.jit.trace(lambda y: apply_linear(layer, y), x)
    torch.testing.assert_close(traced(2 * x), layer(2 * x))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(apply_linear(layer, x), FakeTensor)
    torch.testing.assert_close(torch.func.vmap(lambda y: apply_linear(layer, y))(x), layer(x))
    (tangent,) = torch.func.jvp(lambda y: apply_linear(layer, y), (x,), (x,))[1:]
    torch.testing.assert_close(tangent, x @ layer.weight.T)
    with forward_ad.dual_level():
        dual = apply_linear(layer, forward_ad.make_dual(x, x))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, x @ layer.weight.T)
    layer.forward = lambda y: y  # type: ignore[method-assign]
    assert apply_linear(layer, x) is x
    handle = nn.modules.module.register_module_forward_hook(lambda *_: torch.zeros(2))
    try:
        assert torch.equal(apply_linear(nn.Linear(8, 4).requires_grad_(False), x), torch.zeros(2))
    finally:
        handle.remove()


@pytest.mark.parametrize("thread", [0, 1, 2])
def test_a_thread_computes_its_rows_and_no_other(thread: int) -> None:
    """By a team of three of which one works: rows 0 to 1, 2 to 3 and 4 to 6 of seven."""
    fake = (
        ctypes.CFUNCTYPE(None, WORK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(lambda work, data, *_: work(data)),
        ctypes.CFUNCTYPE(ctypes.c_int)(lambda: thread),
        ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 3),
    )
    team = (ctypes.c_void_p * 3)(*(ctypes.cast(function, ctypes.c_void_p).value for function in fake))
    x, weight, out = numbers(5), numbers(7, 5), torch.full((7,), float("nan"))
    one_token._call("holdfast_linear", x, weight, None, out, 7, 5, ctypes.addressof(team), 3)
    rows = slice(7 * thread // 3, 7 * (thread + 1) // 3)
    torch.testing.assert_close(out[rows], weight[rows] @ x, rtol=1e-5, atol=1e-5)
    assert out.isnan().sum() == 7 - (rows.stop - rows.start)


def test_who_is_served() -> None:
    x = torch.ones(2, 6)
    weight = torch.nn.Parameter(torch.ones(6))
    assert not one_token.serves(x, weight)
    with torch.no_grad():
        assert one_token.serves(x, weight)
    assert one_token.serves(x, None)
    assert not one_token.serves(x.double())
    assert not one_token.serves(x.bfloat16())
    assert not one_token.serves(x.T)
    assert not one_token.serves(x.to("meta"))
    assert not one_token.serves(torch._neg_view(x))
    assert not one_token.serves(x.to_sparse_csr())
    assert not one_token.serves(torch.ones(1 << 17))
