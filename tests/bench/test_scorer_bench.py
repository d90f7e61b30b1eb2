"""What the scorer is timed beside computes the same."""

import torch

from holdfast.bench.scorer import convolutions, scorer_flops
from holdfast.mixers.scorers import ConvScorer


def test_the_frameworks_convolutions_give_the_same_scores_and_gradients() -> None:
    torch.manual_seed(0)
    scorer = ConvScorer(3, 16, dropout=0.0)
    scorer.conv_stack.proj.reset_parameters()
    features = torch.randn(2, 20 + scorer.receptive_field - 1, 3, 16, requires_grad=True)
    valid = torch.ones(1, features.shape[1], dtype=torch.bool)
    grad = torch.randn(2, 20, 3)
    leaves = [features, *scorer.parameters()]
    ours = scorer(features, valid)
    theirs = convolutions(scorer, features)
    torch.testing.assert_close(ours, theirs)
    assert ours.std() > 1e-3
    found, expected = (torch.autograd.grad(scores, leaves, grad) for scores in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_operations_of_one_score() -> None:
    scorer = ConvScorer(2, 8, kernel_sizes=(3, 1), dilations=(1, 1))
    per_head = 3 * 8 * 4 + 4 * 2 + 2  # two convolutions that halve the channels, and the last map
    assert scorer_flops(scorer, 5) == 2 * 5 * 2 * per_head
