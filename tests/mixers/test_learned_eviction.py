"""What learned eviction does in training, and with a store that is always full."""

import pytest
import torch

from holdfast import HybridCache, HybridConfig, HybridForCausalLM
from holdfast.mixers.layout import TokenLayout
from holdfast.mixers.learned_eviction import LearnedEvictionOptions
from holdfast.ops.retention import FOREVER

OPTIONS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "window": 8, "budget": 6, "sinks": 1, "dropout": 0.0}


def make_model(**options: object) -> HybridForCausalLM:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=32,
        initializer_range=0.2,
        mixers=["gated_deltanet", "learned_eviction"],
        mixer_options={
            "gated_deltanet": {"num_heads": 2, "head_dim": 8},
            "learned_eviction": {**OPTIONS, **options},
        },
    )
    model = HybridForCausalLM(config)
    for layer in model.model.eviction_layers():
        torch.nn.init.zeros_(layer.router.conv_stack.proj.bias)  # scores on both sides of 0
    return model


def tokens(length: int = 61) -> torch.Tensor:
    """Every token once: equal scores would leave the order to rounding."""
    return torch.stack([torch.randperm(61, generator=torch.Generator().manual_seed(s))[:length] for s in (1, 2)])


def test_training_with_the_cap_computes_what_evaluation_does() -> None:
    model = make_model().train()
    uncapped = model(tokens()).logits
    for layer in model.model.eviction_layers():
        layer.training_budget = OPTIONS["budget"]
    capped = model(tokens()).logits
    expected = model.eval()(tokens(), use_cache=False).logits
    torch.testing.assert_close(capped, expected, atol=1e-5, rtol=0)
    assert (uncapped - expected).abs().max() > 1e-3  # the budget does bind here


def test_exploration_shows_dropped_pairs_and_nothing_else() -> None:
    model = make_model(budget=61).train()
    layer = model.model.eviction_layers()[0]
    layer.exploration = 1.0
    explored = model(tokens()).logits
    layer.exploration, layer.eviction = 0.0, False
    torch.testing.assert_close(explored, model(tokens()).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_explored_pairs_are_a_random_sample_no_larger_than_the_budget(share: float) -> None:
    """Each of the pairs beyond the window is as likely as another, whenever it came, and their number does not grow."""
    torch.manual_seed(3)
    rows, length, window, budget = 400, 90, OPTIONS["window"], 12
    layer = make_model(budget=budget).model.eviction_layers()[0]
    layer.exploration = share
    columns = torch.arange(length)
    dropped_at_once = (columns + window).view(1, -1, 1).repeat(rows, 1, 2)
    kept = torch.rand(rows, length, 2) < 0.3
    visible_until = dropped_at_once.masked_fill(kept, FOREVER)
    found = layer._explored(visible_until, TokenLayout.whole(rows, length))
    assert (found[kept] == FOREVER).all()
    assert (found >= visible_until).all()
    query = length - 1
    explored = (found >= query) & ~kept & (columns + window < query).view(1, -1, 1)
    counts = explored.sum(dim=1).float()
    eligible = length - 1 - window
    assert counts.max() <= budget
    assert (counts.mean() - min(budget, share * 0.7 * eligible)).abs() < 0.5
    chances = explored.float().mean(dim=(0, 2))[:eligible] / 0.7
    expected = counts.mean() / eligible / 0.7
    spread = (expected * (1 - expected) / (rows * 2 * 0.7)).sqrt()
    assert ((chances - expected).abs() < 5 * spread).all()


def test_without_a_threshold_the_store_is_always_full() -> None:
    full, published = make_model(threshold=0.0).eval(), make_model().eval()
    full.load_state_dict(published.state_dict())
    caches = [HybridCache(full.config), HybridCache(published.config)]
    with torch.no_grad():
        whole = full(tokens(), use_cache=False).logits
        parts = [full(part, past_key_values=caches[0]).logits for part in tokens().split([20, 1, 1, 17, 1, 21], dim=1)]
        published(tokens(), past_key_values=caches[1])
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)
    stored = [(cache.layers[1].positions >= 0).sum(-1) for cache in caches]
    assert (stored[0] == OPTIONS["budget"]).all()
    assert (stored[1] <= stored[0]).all()


def test_no_gradient_reaches_the_scorer_while_eviction_is_off() -> None:
    model = make_model().train()
    model.model.l1_lambda.fill_(0.1)  # a run that is continued brings its λ along
    layer = model.model.eviction_layers()[0]
    for eviction in (True, False):
        model.zero_grad()
        layer.eviction = eviction
        model(tokens(), labels=tokens()).loss.backward()
        total = sum(float(p.grad.abs().sum()) for p in layer.router.parameters())  # zero, and there for all ranks
        assert (total > 0) is eviction


def test_threshold_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold must lie in"):
        LearnedEvictionOptions(**{**OPTIONS, "threshold": 1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [0.5, 0.0])
def test_stored_is_what_the_cache_holds(threshold: float) -> None:
    """Sinks, the window and the budget count; λ's count of candidates knows none of them."""
    model = make_model(threshold=threshold).eval()
    ids, mask = tokens(), torch.ones(2, 61)
    mask[1, :48] = 0  # the second row's store is not full
    with torch.no_grad():
        retention = model(ids, attention_mask=mask, use_cache=False).retention
        cached = model(ids, attention_mask=mask, use_cache=True)
    held = (cached.past_key_values.layers[1].positions >= 0).sum(-1).float()
    torch.testing.assert_close(retention.stored, held.mean(0, keepdim=True))
    assert held.min() < OPTIONS["budget"] == held.max()
    assert retention.kept.min() > retention.stored.max()
    assert cached.retention.stored is None
    model.train()
    torch.testing.assert_close(model(ids, attention_mask=mask).retention.stored, retention.stored)


def test_stored_of_packed_documents_is_the_mean_of_theirs() -> None:
    model, ids, lengths = make_model().eval(), tokens()[:1], [9, 0, 31, 21]
    with torch.no_grad():
        packed = model(ids, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0)).retention.stored
        documents = [part for part in ids.split(lengths, dim=1) if part.numel()]
        alone = [model(part, use_cache=False).retention.stored for part in documents]
    torch.testing.assert_close(packed, torch.stack(alone).mean(0))


def test_a_soft_gate_of_power_0_is_the_hard_cut_and_one_above_lets_far_queries_teach() -> None:
    model = make_model().train()
    layer, ids = model.model.eviction_layers()[0], tokens()
    hard = model(ids).logits
    last = layer.router.conv_stack.proj.bias
    layer.soft_gate = 1e-7
    torch.testing.assert_close(model(ids).logits, hard, atol=1e-4, rtol=0)
    layer.soft_gate = 1.0
    assert (model(ids).logits - hard).abs().max() > 1e-3
    evaluated, expected = model.eval()(ids, use_cache=False), make_model().eval()(ids, use_cache=False)
    torch.testing.assert_close(evaluated.logits, expected.logits)
    # With the cut soft but no pair visible that was dropped, nothing tells the scorer what those would be worth.
    model.train()
    torch.nn.init.constant_(last, -3.0)
    norms = []
    for exploration in (0.0, 1.0):
        layer.exploration = exploration
        model.zero_grad()
        layer._teaching = lambda v, scores: v  # type: ignore[method-assign]  # the gate's path alone
        model(ids, labels=ids).lm_loss.backward()
        norms.append(float(last.grad.abs().sum()) if last.grad is not None else 0.0)
    assert norms[0] == 0 < norms[1]


def test_a_soft_gate_spares_sinks_and_pads() -> None:
    model = make_model().train()
    layer, ids = model.model.eviction_layers()[0], tokens(40)
    layer.soft_gate = layer.exploration = 1.0
    torch.nn.init.constant_(layer.router.conv_stack.proj.bias, -60.0)  # beyond what a logarithm bears
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], dim=1)
    mask = torch.ones(2, 45)
    mask[:, :5] = 0
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits[:, 5:]
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=0)
        layer.exploration, layer.soft_gate = 0.0, 0.0  # only the sink is left, as the gate left only the sink
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-3, rtol=0)
    layer.exploration = layer.soft_gate = 1.0
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
