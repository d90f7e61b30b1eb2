"""When eviction starts, how exploration falls, when the scorer learns."""

import pytest
import torch

from holdfast import HybridConfig, HybridForCausalLM
from holdfast.mixers import TokenLayout
from holdfast.training import RetentionSchedule, learned_eviction_layers, load_recipe

GDN = {"num_heads": 2, "head_dim": 8}
LTE = {"num_heads": 2, "head_dim": 8, "window": 8, "budget": 4, "sinks": 1}


@pytest.fixture
def model():
    torch.manual_seed(0)
    mixers = ["gated_deltanet", "learned_eviction", "gated_deltanet", "learned_eviction"]
    options = {"gated_deltanet": GDN, "learned_eviction": LTE}
    return HybridForCausalLM(
        HybridConfig(vocab_size=31, hidden_size=16, num_hidden_layers=4, mixers=mixers, mixer_options=options)
    )


def test_layers_are_found_by_index_in_the_order_of_the_counts(model):
    layers = learned_eviction_layers(model)
    assert list(layers) == [1, 3]
    assert list(layers.values()) == model.model.eviction_layers()
    assert list(learned_eviction_layers(model.model)) == [1, 3]
    assert list(learned_eviction_layers(torch.nn.Sequential(model))) == [1, 3]  # as if wrapped


@pytest.mark.parametrize(("start", "first"), [(0, 0), (0.0, 0), (0.25, 50), (25, 25), (1, 1), (1.0, 200)])
def test_eviction_starts_at_a_step_or_a_fraction(model, start, first):
    schedule = RetentionSchedule(eviction_start=start)
    for step in (0, 1, 24, 25, 49, 50, 199, 200):
        schedule.apply(model, step, 200)
        assert [layer.eviction for layer in model.model.eviction_layers()] == [step >= first] * 2


def test_exploration_falls_to_zero_and_stays(model):
    schedule = RetentionSchedule(exploration=0.4, exploration_end=0.5)
    expected = {0: 0.4, 25: 0.3, 50: 0.2, 100: 0.0, 150: 0.0}
    for step, share in expected.items():
        schedule.apply(model, step, 200)
        for layer in model.model.eviction_layers():
            assert layer.exploration == pytest.approx(share)


def test_scorer_is_frozen_then_trained(model):
    schedule = RetentionSchedule(scorer_freeze_steps=2)
    tokens = torch.randint(31, (2, 24), generator=torch.Generator().manual_seed(0))
    for step, learns in ((0, False), (1, False), (2, True)):
        schedule.apply(model, step, 10)
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients = {name: p.grad is not None for name, p in model.named_parameters()}
        assert all(has == (learns or ".attn.router." not in name) for name, has in gradients.items())


def test_without_eviction_the_model_is_full_attention(model):
    tokens = torch.randint(31, (1, 40), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 31
    for layer in model.model.eviction_layers():  # nothing is worth keeping
        torch.nn.init.constant_(layer.router.conv_stack.proj.bias, -50.0)
        layer.router.dropout = 0.0
    for start in (0, 100):
        RetentionSchedule(eviction_start=start).apply(model, 0, 200)
        outputs = [layer_output(model, x) for x in (tokens, changed)]
        differs = not torch.equal(outputs[0][:, 30:], outputs[1][:, 30:])
        assert differs == (start > 0)


def layer_output(model: HybridForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """What one eviction layer makes of embeddings alone, so that only its own attention carries the past."""
    hidden = model.model.embeddings(tokens)
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    return model.model.layers[1].attn(hidden, TokenLayout(torch.zeros(1, dtype=torch.long), positions)).hidden


def test_a_model_without_eviction_is_left_alone():
    config = HybridConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        mixers=["gated_deltanet"],
        mixer_options={"gated_deltanet": GDN},
    )
    model = HybridForCausalLM(config)
    RetentionSchedule(scorer_freeze_steps=5).apply(model, 0, 10)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eviction_start": -1}, "eviction_start must be a step"),
        ({"eviction_start": 1.5}, "eviction_start must be a step"),
        ({"scorer_freeze_steps": -1}, "scorer_freeze_steps must be 0 or more"),
        ({"exploration": 1.5}, "exploration must be a share"),
        ({"exploration_end": 0.0}, "exploration_end must be a fraction"),
        ({"soft_gate": -0.1}, "soft_gate must be a power of 0 or more"),
        ({"soft_gate_end": 1.5}, "soft_gate_end must be a fraction"),
    ],
)
def test_errors_name_the_setting(settings, message):
    with pytest.raises(ValueError, match=message):
        RetentionSchedule(**settings)


def test_the_budget_can_be_held_in_training(model):
    layer = next(iter(learned_eviction_layers(model).values()))
    assert layer.training_budget is None
    RetentionSchedule(enforce_budget=True).apply(model, 0, 10)
    assert layer.training_budget == layer.options.budget
    RetentionSchedule().apply(model, 0, 10)
    assert layer.training_budget is None


def test_the_soft_gate_falls_to_zero_and_stays(model):
    schedule = RetentionSchedule(soft_gate=2.0, soft_gate_end=0.25)
    for step, power in {0: 2.0, 10: 1.6, 50: 0.0, 150: 0.0}.items():
        schedule.apply(model, step, 200)
        assert [layer.soft_gate for layer in model.model.eviction_layers()] == pytest.approx([power] * 2)


SWITCHES = """
base = "needle-lalte"
[model.mixer_options.learned_eviction]
conv_size = [3, 1, 3]
conv_dilation = [1, 1, 1]
scorer_sharing = "all"
scorer_causal = true
[retention]
eviction_start = 10
enforce_budget = true
scorer_freeze_steps = 20
exploration = 0.4
exploration_end = 0.5
soft_gate = 1.0
soft_gate_end = 0.8
"""


def test_every_open_question_is_a_switch_of_a_recipe(tmp_path):
    (tmp_path / "switches.toml").write_text(SWITCHES)
    recipe = load_recipe(tmp_path / "switches.toml")
    model = HybridForCausalLM(recipe.build_config())
    (layer,) = model.model.eviction_layers()
    scorer = layer.router
    assert scorer is model.model.router
    assert (scorer.receptive_field, scorer.reach, scorer.shared) == (5, 0, True)
    found = []
    for step in (0, 15, 25, 90):
        recipe.retention.apply(model, step, 100)
        learns = all(parameter.requires_grad for parameter in scorer.parameters())
        found.append((layer.eviction, layer.training_budget, learns, layer.exploration, layer.soft_gate))
    assert found == [
        (False, 40, False, 0.4, 1.0),
        (True, 40, False, pytest.approx(0.28), pytest.approx(0.8125)),
        (True, 40, True, pytest.approx(0.2), pytest.approx(0.6875)),
        (True, 40, True, 0.0, 0.0),
    ]
