"""Dropout by 16 random bits per element."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from holdfast.ops.dropout import dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_scale_and_gradient(p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(37, 1001, dtype=torch.float64).requires_grad_()
    y = dropout(x, p)
    stays = y != 0
    share = stays.double().mean().item()
    assert share == pytest.approx(1 - p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
    torch.testing.assert_close(y[stays], x[stays] / (1 - p), rtol=2e-4, atol=0)  # p is a multiple of 1 / 65,536
    y.sum().backward()
    torch.testing.assert_close(x.grad, stays.double() / (1 - p), rtol=2e-4, atol=0)


def test_neighbours_are_independent() -> None:
    torch.manual_seed(1)
    stays = (dropout(torch.ones(400_000), 0.5) != 0).double() - 0.5
    for lag in (1, 2, 3, 4, 7):  # four share a random number
        assert abs((stays[lag:] * stays[:-lag]).mean().item()) < 4 * 0.25 / 400_000**0.5


def test_it_draws_from_the_generator_that_seeds_set() -> None:
    torch.manual_seed(2)
    first, second = dropout(torch.ones(999), 0.3), dropout(torch.ones(999), 0.3)
    torch.manual_seed(2)
    assert torch.equal(dropout(torch.ones(999), 0.3), first)
    assert not torch.equal(first, second)


def test_none_and_nearly_all() -> None:
    x = torch.randn(3, 5)
    assert dropout(x, 0) is x
    assert dropout(x.bfloat16(), 0.2).dtype == torch.bfloat16
    assert torch.isfinite(dropout(x, 1 - 1e-9)).all()
    assert dropout(torch.empty(0, 4), 0.5).shape == (0, 4)


def test_where_the_trick_does_not_apply() -> None:
    x = torch.ones(40, 30)
    assert not dropout(x, 1.0).any()
    with torch.device("meta"):  # where new tensors are made, not where x is
        assert dropout(x, 0.5).device.type == "cpu"
    both = torch.func.vmap(lambda y: dropout(y, 0.5), randomness="different")(x)
    assert 0.3 < (both == 0).float().mean() < 0.7
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(dropout(x, 0.5), FakeTensor)
