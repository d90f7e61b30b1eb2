"""Models in training mode, and in bfloat16: what they see, and that streaming them changes nothing."""

from __future__ import annotations

import pytest
import torch

from holdfast import HybridCache
from passes import STACKS, ModelFactory, assert_equal_logits, in_chunks, one_pass, random_ids

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_training_mode_without_dropout_streams_like_evaluation(
    small_model: ModelFactory, stack: tuple[str, ...]
) -> None:
    """With a cache the budget holds in training mode too: a model in training can generate."""
    model, ids = small_model(*stack), random_ids(2, 40)
    expected = one_pass(model, ids)
    model.train()
    assert_equal_logits(in_chunks(model, ids, [7, 1, 1, 12, 1]), expected)


def test_training_mode_keeps_every_pair_with_a_positive_score(small_model: ModelFactory) -> None:
    """What training sees is evaluation with a budget that never binds; with eviction off, it is full attention."""
    model, roomy = (small_model("learned_eviction", options={"learned_eviction": {"budget": b}}) for b in (5, 60))
    ids = random_ids(2, 40)
    enforced, expected = one_pass(model, ids), one_pass(roomy, ids)
    assert (enforced - expected).abs().max() > 0.05  # the budget binds
    model.train()
    assert_equal_logits(one_pass(model, ids), expected)
    model.model.eviction_layers()[0].eviction = False
    full = small_model("full_attention")
    full.load_state_dict(model.state_dict(), strict=False)
    assert_equal_logits(one_pass(model, ids), one_pass(full, ids))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_exploration_shows_dropped_pairs(small_model: ModelFactory, share: float) -> None:
    model = small_model("learned_eviction", options={"learned_eviction": {"budget": 40}}).train()
    ids = random_ids(2, 40)
    evicting = one_pass(model, ids)
    layer = model.model.eviction_layers()[0]
    layer.exploration = share
    explored = one_pass(model, ids)
    layer.eviction = False
    assert_equal_logits(explored, one_pass(model, ids) if share else evicting)


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_finite_and_near(small_model: ModelFactory, stack: tuple[str, ...], autocast: bool) -> None:
    """Scorers keep everything here: at a score near 0, rounding may rightly decide otherwise."""
    model = small_model(*stack)
    for layer in model.model.eviction_layers():
        layer.router.conv_stack.proj.bias.data += 40
    ids = random_ids(2, 9)
    expected = one_pass(model, ids)
    if not autocast:
        model.to(torch.bfloat16)
    cache = HybridCache(model.config)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole, chunks = one_pass(model, ids), in_chunks(model, ids, [3, 4, 1], cache)
    assert whole.dtype == chunks.dtype == torch.bfloat16
    assert cache.nbytes == HybridCache.bytes_for(model.config, 2, torch.bfloat16, tokens=9)
    for logits in (whole, chunks):
        assert logits.isfinite().all()
        assert (logits - expected).square().mean().sqrt() < 0.06 * expected.std()


def test_bfloat16_gradients_are_finite(small_model: ModelFactory) -> None:
    model = small_model(*STACKS[-1]).to(torch.bfloat16).train()
    ids, mask = random_ids(2, 33), torch.ones(2, 33)
    mask[1, :9] = 0
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
