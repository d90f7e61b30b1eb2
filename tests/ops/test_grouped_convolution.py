"""The scorer's convolution in C++ against PyTorch's products in float64, gradients and dropout included."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from holdfast.ops import grouped_convolution as module
from holdfast.ops import threads
from holdfast.ops.grouped_convolution import grouped_convolution, serves

_few = torch.ones(2, 2, 2, 2)
pytestmark = [
    pytest.mark.skipif(not serves(_few, _few, _few), reason="there is no C++ compiler"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def definition(x: Tensor, valid: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """Group by group, tap by tap."""
    weights, biases = (y.unflatten(0, (x.shape[0], -1)) for y in (weight, bias))
    x = torch.where(valid[None, :, :, None], x, 0.0)
    length = x.shape[2] - (weight.shape[3] - 1) * dilation
    sums = biases[:, None, None]
    for tap in range(weight.shape[3]):
        columns = x[:, :, tap * dilation : tap * dilation + length]
        sums = sums + torch.einsum("gbtc,goc->gbto", columns, weights[..., 0, tap])
    return F.silu(sums)


def inputs(
    groups: int, batch: int, length: int, channels: int, outputs: int, kernel: int, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x with the strides that features have, valid, weight and bias."""
    torch.manual_seed(length)
    x = torch.randn(batch, length, groups, channels).permute(2, 0, 1, 3)
    valid = torch.rand(rows or batch, length) < 0.8
    return x, valid, torch.randn(groups * outputs, channels, 1, kernel), torch.randn(groups * outputs)


def values_and_gradients(
    function: object, given: tuple[Tensor, ...], dilation: int, dtype: torch.dtype
) -> list[Tensor]:
    x, valid, weight, bias = given
    leaves = [y.to(dtype).requires_grad_() for y in (x, weight, bias)]
    out = function(leaves[0], valid, leaves[1], leaves[2], dilation)  # type: ignore[operator]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1e-3)


SHAPES = [
    (8, 2, 205, 128, 64, 3, 2),
    (2, 3, 97, 16, 8, 3, 2),
    (1, 4, 100, 20, 5, 5, 1),
    (3, 1, 96, 7, 1, 1, 1),
    (2, 2, 7, 33, 17, 3, 3),
    (1, 1, 1, 1, 1, 1, 1),
]


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("shared_row", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    shape: tuple[int, ...], shared_row: bool, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    call = module._call
    monkeypatch.setattr(module, "_call", lambda *given: (called.append(given[0]), call(*given)))
    monkeypatch.setattr(module, "_SEGMENT", 100)
    monkeypatch.setattr(threads, "_THREADED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: workers)
    *sizes, dilation = shape
    given = inputs(*sizes, rows=1 if shared_row else None)
    actual = values_and_gradients(grouped_convolution, given, dilation, torch.float32)
    assert called == ["holdfast_grouped_convolution", "holdfast_grouped_convolution_backward"]
    assert_close(actual, values_and_gradients(definition, given, dilation, torch.float64))
    assert_close(
        values_and_gradients(grouped_convolution, given, dilation, torch.float64),  # PyTorch's products
        values_and_gradients(definition, given, dilation, torch.float64),
    )


def factors(x: Tensor, p: float, seed: int) -> Tensor:
    """What dropout multiplies x with, seen through SiLU, which is the identity for large numbers."""
    groups, _, length, channels = x.shape
    same = torch.eye(channels).repeat(groups, 1)[:, :, None, None]
    torch.manual_seed(seed)
    valid = torch.ones(1, length, dtype=torch.bool)
    return grouped_convolution(torch.full_like(x, 100.0), valid, same, torch.zeros(groups * channels), 1, p) / 100


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_dropout_and_its_gradients(shape: tuple[int, ...], p: float) -> None:
    *sizes, dilation = shape
    given = inputs(*sizes)
    by = factors(given[0], p, seed=3)

    def dropped(x: Tensor, *rest: Tensor) -> Tensor:
        torch.manual_seed(3)
        return grouped_convolution(x, *rest, p)  # type: ignore[arg-type]

    def expected(x: Tensor, *rest: Tensor) -> Tensor:
        return definition(x * by, *rest)  # type: ignore[arg-type]

    actual = values_and_gradients(dropped, given, dilation, torch.float32)
    assert_close(actual, values_and_gradients(expected, given, dilation, torch.float64))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("channels", [128, 13])
def test_share_and_scale_of_dropout(p: float, channels: int) -> None:
    by = factors(torch.empty(3, 2, 500, channels), p, seed=0)
    stays = by != 0
    assert stays.double().mean().item() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / by.numel()) ** 0.5)
    torch.testing.assert_close(by[stays], torch.full_like(by[stays], 1 / (1 - p)), rtol=2e-4, atol=0)
    # Of every row and every channel, too.
    for dims, size in (((0, 1, 2), 3000), (3, channels)):
        shares = stays.double().mean(dims)
        assert (shares - (1 - p)).abs().max() < 6 * (p * (1 - p) / size) ** 0.5


def test_rows_lose_as_many_as_chance_has_it() -> None:
    """The variance of their counts is that of independent draws; its own deviation is √(2 / rows)."""
    rows, channels, p = 200_000, 128, 0.1
    counts = (factors(torch.empty(1, 1, rows, channels), p, seed=0) == 0).double().sum(-1)
    assert counts.var().item() / (channels * p * (1 - p)) == pytest.approx(1, abs=4.5 * (2 / rows) ** 0.5)


def test_neighbours_are_independent() -> None:
    stays = (factors(torch.empty(2, 2, 2000, 64), 0.5, seed=1) != 0).double() - 0.5
    for axis, lag in itertools.product(range(4), (1, 2, 8, 16, 32)):  # lanes and halves of a random number
        if lag >= stays.shape[axis]:
            continue
        pairs = stays.narrow(axis, lag, stays.shape[axis] - lag) * stays.narrow(axis, 0, stays.shape[axis] - lag)
        assert abs(pairs.mean().item()) < 4.5 * 0.25 / pairs.numel() ** 0.5, (axis, lag)


def test_it_draws_from_the_generator_that_seeds_set() -> None:
    x = torch.empty(1, 1, 40, 8)
    assert torch.equal(factors(x, 0.3, seed=2), factors(x, 0.3, seed=2))
    assert not torch.equal(factors(x, 0.3, seed=2), factors(x, 0.3, seed=4))
    assert torch.isfinite(factors(x, 1 - 1e-9, seed=2)).all()
    assert not factors(x, 1.0, seed=2).any()


def test_what_is_no_number_in_a_pad_goes_nowhere() -> None:
    x, valid, weight, bias = inputs(2, 2, 60, 12, 6, 3)
    assert not valid.all()
    for p in (0.0, 0.5):
        outs, slopes = [], []
        for other in (0.0, math.nan):
            torch.manual_seed(0)
            leaf = x.masked_fill(~valid[None, :, :, None], other).requires_grad_()
            outs.append(grouped_convolution(leaf, valid, weight, bias, 2, p))
            slopes.append(torch.autograd.grad(outs[-1].sum(), leaf)[0])
        assert torch.equal(*outs)
        assert torch.equal(*slopes)


def expected_gradients(given: tuple[Tensor, ...], dilation: int = 2) -> list[Tensor]:
    x, valid, weight, bias = given
    leaves = [y.double().requires_grad_() for y in (x, weight, bias)]
    out = definition(leaves[0], valid, leaves[1], leaves[2], dilation)
    return list(torch.autograd.grad(out.square().sum(), leaves))


@pytest.mark.parametrize("change", [lambda y: y.clone(), lambda y: y.clone(memory_format=torch.contiguous_format)])
def test_hooks_of_saved_tensors_may_change_strides(change: object) -> None:
    x, valid, weight, bias = inputs(2, 2, 60, 12, 6, 3)
    wide = torch.zeros(2, 60, 2, 40)
    wide[..., :12] = x.permute(1, 2, 0, 3)
    leaves = [wide[..., :12].permute(2, 0, 1, 3).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    with torch.autograd.graph.saved_tensors_hooks(lambda y: change(y.detach()), lambda y: y):  # type: ignore[operator]
        out = grouped_convolution(leaves[0], valid, leaves[1], leaves[2], 2)
    assert_close(list(torch.autograd.grad(out.square().sum(), leaves)), expected_gradients((x, valid, weight, bias)))


def test_what_is_not_contiguous_and_gradients_of_gradients() -> None:
    x, valid, weight, bias = inputs(2, 2, 60, 12, 6, 3)
    turned = x.mT.contiguous().mT
    assert turned.stride(3) != 1
    leaves = [turned.requires_grad_(), weight.to(memory_format=torch.channels_last).requires_grad_(), bias]
    bias.requires_grad_()
    for create in (False, True):
        out = grouped_convolution(leaves[0], valid, leaves[1], leaves[2], 2)
        found = torch.autograd.grad(out.square().sum(), leaves, create_graph=create)
        assert_close([y.detach() for y in found], expected_gradients((x, valid, weight, bias)))
    assert all(y.requires_grad for y in found)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_frozen_inputs(wanted: tuple[bool, ...]) -> None:
    x, valid, weight, bias = inputs(2, 2, 60, 12, 6, 3)
    leaves = [y.clone().requires_grad_(want) for y, want in zip((x, weight, bias), wanted, strict=True)]
    out = grouped_convolution(leaves[0], valid, leaves[1], leaves[2], 2)
    assert out.requires_grad == any(wanted)
    expected = expected_gradients((x, valid, weight, bias))
    if any(wanted):
        out.square().sum().backward()
        pairs = [(y.grad, e) for y, e, want in zip(leaves, expected, wanted, strict=True) if want]
        assert_close(*map(list, zip(*pairs, strict=True)))
    assert all(y.grad is None for y, want in zip(leaves, wanted, strict=True) if not want)


def test_batched_gradients_and_autocast() -> None:
    x, valid, weight, bias = inputs(2, 2, 60, 12, 6, 3)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(0)
    out = grouped_convolution(leaf, valid, weight, bias, 2, 0.3)
    grads = torch.randn(3, *out.shape)
    (batched,) = torch.autograd.grad(out, leaf, grads, is_grads_batched=True, retain_graph=True)
    for one, grad in zip(batched, grads, strict=True):
        torch.testing.assert_close(
            one, torch.autograd.grad(out, leaf, grad, retain_graph=True)[0], rtol=1e-4, atol=1e-5
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as where there is no compiler
        assert grouped_convolution(x, valid, weight, bias, 2).dtype == torch.bfloat16


def test_biases_of_long_inputs_learn_exactly() -> None:
    x, weight, bias = torch.randn(1, 1, 200_000, 4), torch.zeros(4, 4, 1, 1), torch.ones(4).requires_grad_()
    out = grouped_convolution(x, torch.ones(1, 200_000, dtype=torch.bool), weight, bias)
    grad = torch.rand_like(out)
    slope = torch.sigmoid(torch.ones(())) * (1 + 1 - torch.sigmoid(torch.ones(())))
    expected = (grad.double() * slope.double()).sum((0, 1, 2))
    assert ((torch.autograd.grad(out, bias, grad)[0] - expected).abs() / expected).max() < 1e-6


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"valid": lambda y: y[:, :5]}, ValueError, "valid .* does not fit"),
        ({"valid": lambda y: y[:1].expand(3, -1)}, ValueError, "valid .* does not fit"),
        ({"valid": lambda y: y.long()}, TypeError, "dtype torch.int64"),
        ({"weight": lambda y: y[:, :4]}, ValueError, "asks for weights"),
        ({"weight": lambda y: y[:5]}, ValueError, "asks for weights"),
        ({"bias": lambda y: y[:1]}, ValueError, "asks for weights"),
        ({"x": lambda y: y[0]}, ValueError, "four dimensions"),
        ({"x": lambda y: y[:, :, :4], "valid": lambda y: y[:, :4]}, ValueError, "too few"),
        ({"p": lambda _: -0.1}, ValueError, "p is -0.1"),
        ({"p": lambda _: 1.5}, ValueError, "p is 1.5"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bad_arguments_are_named(dtype: torch.dtype, change: dict, error: type[Exception], words: str) -> None:
    x, valid, weight, bias = inputs(2, 2, 60, 12, 6, 3)
    given = {"x": x.to(dtype), "valid": valid, "weight": weight.to(dtype), "bias": bias.to(dtype), "p": 0.0}
    given |= {name: function(given[name]) for name, function in change.items()}
    with pytest.raises(error, match=words):
        grouped_convolution(**given, dilation=2)  # type: ignore[arg-type]


def test_second_derivatives() -> None:
    given = inputs(2, 2, 30, 12, 6, 3)
    by = factors(given[0], 0.3, seed=7)

    def penalty(dtype: torch.dtype) -> list[Tensor]:
        x, valid, weight, bias = given
        leaves = [y.to(dtype).requires_grad_() for y in (x, weight, bias)]
        torch.manual_seed(7)
        if dtype == torch.float32:
            out = grouped_convolution(leaves[0], valid, leaves[1], leaves[2], 2, 0.3)
        else:
            out = definition(leaves[0] * by, valid, leaves[1], leaves[2], 2)
        slopes = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(slope.square().sum() for slope in slopes), leaves))

    assert_close(penalty(torch.float32), penalty(torch.float64))


def test_who_is_served() -> None:
    x, valid, weight, bias = inputs(2, 2, 30, 12, 6, 3)
    assert serves(x, weight, bias)
    assert not serves(x.double(), weight, bias)
    assert not serves(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert not serves(x[:, :0], weight, bias)
    assert not serves(x.to("meta"), weight, bias)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(grouped_convolution(x, valid, weight, bias), FakeTensor)
    _, tangent = torch.func.jvp(lambda y: grouped_convolution(y, valid, weight, bias), (x,), (x,))
    assert tangent.abs().max() > 0
