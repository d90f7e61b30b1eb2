"""The scorer computes what its definition says, and the straight-through gradient what the paper says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from holdfast.mixers import scorers
from holdfast.mixers.base import straight_through
from holdfast.mixers.scorers import ConvScorer, receptive_field

SHAPES = [((3, 3, 3), (2, 2, 2)), ((5, 3), (1, 3)), ((1,), (1,))]


def by_definition(scorer: ConvScorer, features: Tensor, valid: Tensor) -> Tensor:
    """Specification §3.3: one head at a time, 'same' zero padding, zeros at pads before every convolution."""
    stack, scores = scorer.conv_stack, []
    for head in range(features.shape[2]):
        x = features[:, :, head].transpose(1, 2)
        for conv in (*stack.convs, stack.proj):
            groups = conv.groups
            weight, bias = (t.chunk(groups)[head if groups > 1 else 0] for t in (conv.weight, conv.bias))
            dilation = conv.dilation[1]
            if conv is not stack.proj:
                x = x * valid[:, None, :]
            past = (weight.shape[3] - 1) * dilation
            x = F.pad(x, (past, 0) if scorer.causal else (past // 2, past // 2))
            x = F.conv1d(x, weight[:, :, 0], bias, dilation=dilation)
            x = x if conv is stack.proj else F.silu(x)
        scores.append(torch.sigmoid(x[:, 0]) - 0.5)
    return torch.stack(scores, dim=2)


def padded(scorer: ConvScorer, features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    around = (scorer.lookback, scorer.reach)
    return F.pad(features, (0, 0, 0, 0, *around)), F.pad(valid, around)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("sizes", "dilations"), SHAPES)
def test_scores_and_gradients_by_definition(
    sizes: tuple[int, ...], dilations: tuple[int, ...], shared: bool, causal: bool
) -> None:
    torch.manual_seed(0)
    scorer = ConvScorer(3, 16, sizes, dilations, dropout=0.0, shared=shared, causal=causal).double()
    features = torch.randn(2, 21, 3, 16, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(2, 21, dtype=torch.bool)
    valid[1, :5] = False
    out = scorer(*padded(scorer, features, valid))
    expected = by_definition(scorer, features, valid)
    weight = torch.randn_like(expected) * valid.unsqueeze(2)
    torch.testing.assert_close(out.double()[valid], expected[valid], atol=1e-6, rtol=0)  # scores are fp32
    inputs = [features, *scorer.parameters()]
    found = torch.autograd.grad((out * weight).sum(), inputs)
    for got, want in zip(found, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("sizes", "dilations"), SHAPES)
def test_long_inputs_by_definition(
    sizes: tuple[int, ...], dilations: tuple[int, ...], shared: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients, and without C++, the framework's convolutions compute the scores; pads may hold anything."""
    monkeypatch.setattr(scorers, "serves", lambda *_: False)
    torch.manual_seed(0)
    scorer = ConvScorer(3, 16, sizes, dilations, shared=shared, causal=causal).eval()
    features = torch.randn(2, 300, 3, 16)
    valid = torch.rand(2, 300) < 0.9
    inputs = padded(scorer, features, valid)
    with_gradient = scorer(*inputs)
    called = []
    original = scorers.by_convolutions
    monkeypatch.setattr(scorers, "by_convolutions", lambda *args: called.append(args) or original(*args))
    with torch.no_grad():
        out = scorer(inputs[0].masked_fill(~inputs[1][:, :, None, None], torch.nan), inputs[1])
    assert len(called) == 1
    expected = by_definition(scorer.double(), features.double(), valid)
    torch.testing.assert_close(out.double()[valid], expected[valid], atol=2e-6, rtol=0)
    torch.testing.assert_close(out[valid], with_gradient[valid], atol=2e-6, rtol=0)
    scorer.float().train()  # dropout is the other way's, and so are gradients
    scorer(*inputs)
    scorer.eval()(*inputs)
    assert len(called) == 1


@pytest.mark.parametrize(("causal", "first", "last"), [(False, 14, 26), (True, 8, 20)])
def test_a_score_depends_on_its_receptive_field_and_on_nothing_else(causal: bool, first: int, last: int) -> None:
    torch.manual_seed(0)
    scorer = ConvScorer(2, 16, dropout=0.0, causal=causal)
    assert scorer.receptive_field == receptive_field((3, 3, 3), (2, 2, 2)) == 13
    assert (20 - scorer.lookback, 20 + scorer.reach) == (first, last)
    features = torch.randn(1, 40, 2, 16, requires_grad=True)
    scores = scorer(*padded(scorer, features, torch.ones(1, 40, dtype=torch.bool)))
    (gradient,) = torch.autograd.grad(scores[0, 20, 1], features)
    touched = gradient[0].abs().sum(2).nonzero()
    assert touched[:, 0].min() == first
    assert touched[:, 0].max() == last
    assert (touched[:, 1] == 1).all()  # the other head's pairs do not matter


def test_values_at_pads_do_not_matter_even_if_they_are_nan() -> None:
    scorer = ConvScorer(1, 8, dropout=0.0)
    features = torch.randn(1, 20, 1, 8)
    valid = torch.arange(20).unsqueeze(0) >= 4
    clean = scorer(*padded(scorer, features, valid))[:, 4:]
    features[:, :4] = torch.nan
    assert torch.equal(scorer(*padded(scorer, features, valid))[:, 4:], clean)


def test_dropout_only_in_training() -> None:
    torch.manual_seed(0)
    scorer, features = ConvScorer(1, 8, dropout=0.5), torch.randn(1, 32, 1, 8)
    valid = torch.ones(1, 32, dtype=torch.bool)
    assert not torch.equal(scorer(features, valid), scorer(features, valid))
    scorer.eval()
    assert torch.equal(scorer(features, valid), scorer(features, valid))


def test_unusable_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be odd and positive, got \(2,\)"):
        receptive_field((2,), (1,))
    with pytest.raises(ValueError, match="one dilation for each convolution"):
        receptive_field((3, 3), (1,))


def test_straight_through() -> None:
    """Forward: v. Backward: ∂L/∂v unchanged, ∂L/∂s = ⟨∂L/∂v, v⟩."""
    value = torch.randn(2, 5, 3, 4, requires_grad=True)
    score = torch.randn(2, 5, 3, requires_grad=True)
    upstream = torch.randn(2, 5, 3, 4)
    out = straight_through(value, score)
    assert torch.equal(out, value)
    out.backward(upstream)
    assert torch.equal(value.grad, upstream)
    torch.testing.assert_close(score.grad, (upstream * value.detach()).sum(-1))
