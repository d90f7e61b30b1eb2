"""What learned eviction does in training, and with a store that is always full."""

import pytest
import torch

from holdfast import HybridCache, HybridConfig, HybridForCausalLM
from holdfast.mixers.learned_eviction import LearnedEvictionOptions

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
    model = make_model().train()
    layer = model.model.eviction_layers()[0]
    layer.exploration = 1.0
    explored = model(tokens()).logits
    layer.exploration, layer.eviction = 0.0, False
    torch.testing.assert_close(explored, model(tokens()).logits, atol=1e-5, rtol=0)


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
