"""Other scorers in place of the trained one: each by its definition, all at the same budget."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast import HybridForCausalLM
from holdfast.evaluation.scorers import SCORERS, Scorer, compare_scorers, scoring
from holdfast.mixers import LearnedEviction
from holdfast.mixers.layout import TokenLayout, plain_layout

SmallModel = Callable[..., HybridForCausalLM]
LENGTH, BUDGET = 41, 7


@pytest.fixture
def model(small_model: SmallModel) -> HybridForCausalLM:
    return small_model("gated_deltanet", "learned_eviction", "gated_deltanet", "learned_eviction")


def tokens() -> Tensor:
    return torch.stack([torch.randperm(100, generator=torch.Generator().manual_seed(s))[:LENGTH] for s in (3, 4)])


def run(model: HybridForCausalLM, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False, **arguments).logits


def scores_and_inputs(model: HybridForCausalLM, scorer: str) -> tuple[Tensor, dict[str, Tensor]]:
    """What the scorer of the last eviction layer says, and what it was given."""
    layer = model.model.eviction_layers()[-1]
    seen: dict[str, Tensor] = {}
    with scoring(model, scorer, BUDGET):
        inner = layer.substitute
        assert inner is not None

        def record(q: Tensor, k: Tensor, features: Tensor, layout: TokenLayout) -> Tensor:
            seen.update(q=q, k=k, features=features, scores=inner(q, k, features, layout))
            return seen["scores"]

        layer.substitute = record
        run(model)
    return seen["scores"], seen


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_budget_is_matched_and_all_is_restored(model: HybridForCausalLM, scorer: str) -> None:
    layers = model.model.eviction_layers()
    before, options = run(model), [layer.options for layer in layers]
    kept: list[Tensor] = []
    hook = LearnedEviction._retention

    def watched(layer: LearnedEviction, scores: Tensor, layout: TokenLayout) -> Tensor:
        kept.append(hook(layer, scores, layout))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch, scoring(model, scorer, BUDGET):
        patch.setattr(LearnedEviction, "_retention", watched)
        run(model)
    assert len(kept) == 2
    for until in kept:
        position = torch.arange(LENGTH)
        held = (position[None, :, None, None] <= until[:, None]) & (
            position[None, None, :, None] + layers[0].options.window < position[None, :, None, None]
        )
        counts = held.sum(2)  # [B, query, Hkv]
        outside = (position - layers[0].options.window).clamp(min=0)
        assert (counts == outside.clamp(max=BUDGET)[None, :, None]).all()  # the store is as full as it can be
    assert [layer.options for layer in layers] == options
    assert all(layer.substitute is None for layer in layers)
    assert torch.equal(run(model), before)


def test_the_trained_scorer_at_its_own_budget_without_a_threshold(small_model: SmallModel) -> None:
    settings = {"learned_eviction": {"threshold": 0.0, "budget": BUDGET}}
    model = small_model("gated_deltanet", "learned_eviction", options=settings)
    expected = run(model)
    with scoring(model, "trained", BUDGET):
        torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=0)
    with scoring(model, "random", BUDGET):
        assert (run(model) - expected).abs().max() > 0.01


def test_recency_is_a_longer_window(small_model: SmallModel) -> None:
    model = small_model("learned_eviction", options={"learned_eviction": {"sinks": 0}})
    wide = small_model("sliding_attention", options={"sliding_attention": {"window": 6 + BUDGET + 1}})
    wide.load_state_dict(model.state_dict(), strict=False)
    with scoring(model, "recency", BUDGET):
        torch.testing.assert_close(run(model), run(wide), atol=1e-5, rtol=0)


def test_norms(model: HybridForCausalLM) -> None:
    scores, given = scores_and_inputs(model, "value_norm")
    _, values = given["features"].chunk(2, dim=-1)
    torch.testing.assert_close(scores, values.square().sum(-1).sqrt())
    scores, given = scores_and_inputs(model, "key_norm")
    keys, _ = given["features"].chunk(2, dim=-1)
    assert (scores.argsort(1) == keys.square().sum(-1).argsort(1, descending=True)).all()


def test_accumulated_attention(model: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.evaluation.scorers._QUERIES", 9)  # several tiles, the last one partial
    scores, given = scores_and_inputs(model, "accumulated_attention")
    q, k = given["q"].double(), given["k"].double().repeat_interleave(2, dim=2)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    age = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    weights = logits.masked_fill((age < 0) | (age > 6), -torch.inf).softmax(-1)
    expected = weights.sum(2).unflatten(1, (-1, 2)).sum(2).transpose(1, 2)
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=1e-5)


def test_write_magnitude(small_model: SmallModel) -> None:
    model = small_model("gated_deltanet", "learned_eviction")
    scores, _ = scores_and_inputs(model, "write_magnitude")
    linear, inputs = model.model.layers[0].attn, []
    handle = linear.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    run(model)
    handle.remove()
    args, kwargs = inputs[0]
    hidden = args[0] if args else kwargs["hidden"]
    _, k, v, decay, beta = (x.double() for x in linear.recurrence(hidden, plain_layout(2, LENGTH)))
    state = torch.zeros(2, 2, 8, 8, dtype=torch.float64)
    for t in range(LENGTH):
        state = decay[:, t, :, None, None].exp() * state
        write = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        expected = write.norm(dim=-1).mean(-1)
        torch.testing.assert_close(scores[:, t].double(), expected[:, None].expand(-1, 2), atol=1e-5, rtol=1e-4)


def test_comparison_is_repeatable(model: HybridForCausalLM) -> None:
    def compare() -> list[tuple[str, int, float]]:
        measured = compare_scorers(
            model, lambda: float(run(model).std()), scorers=["random", "recency"], budgets=[3, 9]
        )
        return list(measured)

    first = compare()
    assert [(scorer, budget) for scorer, budget, _ in first] == [
        ("random", 3),
        ("recency", 3),
        ("random", 9),
        ("recency", 9),
    ]
    assert first == compare()


def test_what_cannot_be_is_named(model: HybridForCausalLM, small_model: SmallModel) -> None:
    with pytest.raises(ValueError, match="no scorer is named 'attention'"), scoring(model, "attention", 5):
        pass
    with pytest.raises(ValueError, match="no layer of learned eviction"):
        list(compare_scorers(small_model("full_attention"), lambda: 0, budgets=[5]))
    with pytest.raises(ValueError, match="needs a layer of Gated DeltaNet"):
        list(compare_scorers(small_model("learned_eviction"), lambda: 0, scorers=["write_magnitude"], budgets=[5]))
    with pytest.raises(ValueError, match=r"sinks \(2\)"), scoring(model, "random", 1):
        pass
    with scoring(model, "random", 5), torch.no_grad(), pytest.raises(ValueError, match="use_cache=False"):
        model(tokens(), use_cache=True)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    for scorer in ("accumulated_attention", "write_magnitude"):
        with scoring(model, scorer, 5), pytest.raises(ValueError, match="without pads"):
            run(model, attention_mask=mask)
    assert model.model.eviction_layers()[0].substitute is None


def registered(patch: pytest.MonkeyPatch, score: Callable[[Tensor, Tensor], Any]) -> None:
    """Enter the scorer "mine", which gives what `score` makes of keys and values."""

    class Mine(Scorer):
        def __call__(self, q: Tensor, k: Tensor, features: Tensor, layout: TokenLayout) -> Any:
            return score(*self.halves(features))

    patch.setitem(SCORERS, "mine", Mine)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (
            lambda k, v: v.norm(dim=-1).tolist(),
            r"scorer 'mine' returned list, not a tensor; return fp32 scores \[2, 41, 2",
        ),
        (lambda k, v: v.norm(dim=-1).mean(-1), r"returned float32 \[2, 41\]; return fp32 scores \[2, 41, 2\], one for"),
        (lambda k, v: v.norm(dim=-1).double(), r"scorer 'mine' returned float64 \[2, 41, 2\]"),
        (lambda k, v: v.norm(dim=-1) / 0, "scorer 'mine' returned scores that are infinite or NaN"),
        (lambda k, v: v.norm(dim=-1).index_fill(1, torch.tensor([7]), torch.nan), "infinite or NaN"),
    ],
)
def test_what_is_no_score_is_refused_by_the_scorers_name(
    model: HybridForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    score: Callable[[Tensor, Tensor], Any],
    message: str,
) -> None:
    registered(monkeypatch, score)
    with scoring(model, "mine", BUDGET), pytest.raises(ValueError, match=message):
        run(model)


def test_a_pad_needs_no_score(model: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, lambda k, v: v.norm(dim=-1).index_fill(1, torch.tensor([0]), torch.nan))
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[:, 0] = 0
    with scoring(model, "mine", BUDGET):
        assert run(model, attention_mask=mask)[:, 1:].isfinite().all()


def test_a_store_that_no_score_fills_is_told(model: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, lambda k, v: -k.norm(dim=-1))
    with (
        scoring(model, "mine", BUDGET),
        pytest.warns(UserWarning, match="'mine' gave no pair of a layer a score above 0"),
    ):
        empty = run(model)
    with scoring(model, "key_norm", BUDGET):
        assert (run(model) - empty).abs().max() > 0.01


def test_one_score_above_0_is_enough(
    model: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    registered(monkeypatch, lambda k, v: (-v.norm(dim=-1)).index_fill(1, torch.tensor([9]), 1.0))
    with scoring(model, "mine", BUDGET):
        run(model)
    assert [str(warning.message) for warning in recwarn if "score above 0" in str(warning.message)] == []


def test_scorers_entered_later_are_compared(model: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, lambda k, v: v.norm(dim=-1))
    compared = list(compare_scorers(model, lambda: float(run(model).std()), budgets=[BUDGET]))
    assert [scorer for scorer, _, _ in compared] == list(SCORERS)
    found = {scorer: value for scorer, _, value in compared}
    assert found["mine"] == found["value_norm"]
