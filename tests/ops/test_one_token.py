"""The C++ of a decoded token against the same ops in PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.mixers.scorers import ConvScorer
from holdfast.ops import one_token
from holdfast.ops.gated_delta_rule import gated_delta_step
from holdfast.ops.linear import apply_linear
from holdfast.ops.norms import gated_rms_norm, l2_norm, rms_norm
from holdfast.ops.rotary import apply_rotary
from holdfast.ops.short_convolution import short_convolution

pytestmark = [
    pytest.mark.skipif(not one_token.serves(torch.ones(1)), reason="there is no C++ compiler"),
    pytest.mark.usefixtures("poisoned_memory"),
]


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


@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 1, 2, 20), (2, 5), (1, 1)])
def test_norms(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate, weight = numbers(*shape), numbers(*shape, seed=1), numbers(shape[-1])
    for function, inputs in ((rms_norm, (x, weight)), (gated_rms_norm, (x, gate, weight)), (l2_norm, (x,))):
        with monkeypatch.context() as patch:
            assert_same(function, *inputs, calls="norm", monkeypatch=patch)
    assert torch.equal(l2_norm(torch.zeros(2, 9)), torch.zeros(2, 9))


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


def test_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    angles = numbers(2, 3, 10)
    assert_same(apply_rotary, numbers(2, 3, 4, 20), angles.cos(), angles.sin(), calls="rotate", monkeypatch=monkeypatch)


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


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("size", "rows", "bias"), [(64, 96, True), (37, 5, False), (3, 1, True), (512, 1408, False)])
def test_linear(size: int, rows: int, bias: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_token, "_THREADED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
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
    monkeypatch.setattr(one_token, "openmp", lambda: None)
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
    assert not one_token.serves(torch.ones(1 << 17))
    assert rms_norm(x, weight).requires_grad
