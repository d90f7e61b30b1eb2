"""The scorers that ablations compare: each is exact however the tokens arrive, is saved, loaded and counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast import HybridCache, HybridForCausalLM
from holdfast.checkpoints import convert
from holdfast.info import describe_cost, parameters_by_part
from holdfast.training import RetentionSchedule, learned_eviction_layers, parameter_groups

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ModelFactory = Callable[..., HybridForCausalLM]

VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "no context": {"conv_size": (1, 1, 1), "conv_dilation": (1, 1, 1)},
    "R = 7": {"conv_dilation": (1, 1, 1)},
    "causal": {"scorer_causal": True},
    "one per layer": {"scorer_sharing": "layer"},
    "one for all": {"scorer_sharing": "all"},
    "one for all, causal": {"scorer_sharing": "all", "scorer_causal": True},
}
STACK = ("learned_eviction", "gated_deltanet", "learned_eviction")


def make(small_model: ModelFactory, variant: str) -> HybridForCausalLM:
    return small_model(*STACK, options={"learned_eviction": VARIANTS[variant]})


def tokens(length: int = 47) -> Tensor:
    """No token twice: equal pairs would have equal scores."""
    return torch.stack([torch.randperm(100, generator=torch.Generator().manual_seed(s))[:length] for s in (1, 2)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_pass_chunks_tokens_and_a_saved_copy_agree(small_model: ModelFactory, variant: str, tmp_path: Path) -> None:
    model, ids = make(small_model, variant), tokens()
    model.save_pretrained(tmp_path)
    loaded = HybridForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        whole = model(ids, use_cache=False)
        assert torch.equal(loaded(ids, use_cache=False).logits, whole.logits)
        for lengths in ([47], [20, 1, 3, 1, 22], [1] * 47):
            cache = HybridCache(model.config)
            parts = [model(part, past_key_values=cache).logits for part in ids.split(lengths, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, atol=1e-4, rtol=0)
        stored = torch.stack([(cache.layers[n].positions >= 0).sum(-1) for n in (0, 2)])
    assert 2 <= stored.min() <= stored.max() == 5  # the sinks at least, the budget at most, and it binds
    kept = torch.stack([(scores > 0).float().mean() for scores in whole.retention.scores])
    assert (kept > 0.1).all()
    assert (kept < 0.9).all()


def test_a_causal_scorer_is_final_at_once(small_model: ModelFactory) -> None:
    """What comes later changes no score of before, and a decoded token's score is there with the token."""
    ids = tokens()
    changed = ids.clone()
    changed[:, 30:] = ids[:, 30:].flip(1)
    for variant, reach in (("published", 6), ("R = 7", 3), ("no context", 0), ("causal", 0)):
        model = make(small_model, variant)
        with torch.no_grad():
            before, after = (model(x, use_cache=False).retention.scores[0] for x in (ids, changed))
            pending = model(ids[:, :1], use_cache=True)
            decoded = model(ids[:, 1:2], past_key_values=pending.past_key_values).retention.scores[0]
        assert torch.equal(before[:, : 30 - reach], after[:, : 30 - reach])
        assert not torch.equal(before[:, 30 - reach], after[:, 30 - reach])
        assert decoded.isnan().all() == (reach > 0)
        assert model.model.eviction_layers()[0].router.reach == reach


@pytest.mark.parametrize(
    ("sharing", "networks", "prefix"), [("head", 4, None), ("layer", 2, None), ("all", 1, "model.router.")]
)
def test_a_shared_network_is_there_once(
    small_model: ModelFactory, sharing: str, networks: int, prefix: str | None
) -> None:
    model = small_model(*STACK, options={"learned_eviction": {"scorer_sharing": sharing}})
    one = 16 * 8 * 3 + 8 + 8 * 4 * 3 + 4 + 4 * 2 * 3 + 2 + 2 + 1
    assert parameters_by_part(model)["retention scorer"] == networks * one
    assert sum(parameters_by_part(model).values()) == model.num_parameters()
    # Every head of every layer asks its network, whoever else does.
    assert describe_cost(model.config).scorer_flops == 4 * 2 * (16 * 8 * 3 + 8 * 4 * 3 + 4 * 2 * 3 + 2)
    names = [name for name in model.state_dict() if "router" in name]
    assert all(name.startswith(prefix or "model.layers.") for name in names)
    layers = learned_eviction_layers(model)
    assert (layers[0].router is layers[2].router) == (sharing == "all")
    decayed = parameter_groups(model, learning_rate=1.0, weight_decay=0.0, scorer_lr_scale=0.1)
    slow = [parameter for group in decayed if group["lr"] == 0.1 for parameter in group["params"]]
    assert sum(parameter.numel() for parameter in slow) == networks * one


def test_every_layer_teaches_a_network_for_all(small_model: ModelFactory) -> None:
    model = make(small_model, "one for all").train()
    ids = tokens()
    gradients = []
    for silent in (None, 0, 2):
        for number, layer in learned_eviction_layers(model).items():
            layer.eviction = number != silent
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.router.conv_stack.proj.weight.grad.clone())
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert not torch.allclose(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])
    RetentionSchedule(scorer_freeze_steps=3).apply(model, 2, 10)
    assert not any(parameter.requires_grad for parameter in model.model.router.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer_sharing": "all"}, "has only scorer_sharing = 'head' or 'layer', this model has 'all'"),
        ({"scorer_causal": True}, "has only scorer_causal = False, this model has True"),
    ],
)
def test_the_published_format_is_refused_what_it_cannot_say(
    small_model: ModelFactory, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    small_model("gated_deltanet", "learned_eviction", options={"learned_eviction": options}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, tmp_path / "published", format="published")


def test_a_causal_scorer_needs_no_window_for_its_future(small_model: ModelFactory) -> None:
    with pytest.raises(ValueError, match=r"window \(2\) is shorter than the future that the scorer reads \(6\)"):
        small_model("learned_eviction", options={"learned_eviction": {"window": 2}})
    model = small_model("learned_eviction", options={"learned_eviction": {"window": 0, "scorer_causal": True}})
    assert model(tokens(), use_cache=False).logits.isfinite().all()
