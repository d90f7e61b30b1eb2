"""Weights given to a model that was made on the meta device: all of them, and by seed the same as in memory."""

import pytest
import torch

from holdfast import HybridCache, HybridForCausalLM
from holdfast.mixers import MIXERS

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_drawn_and_the_seed_says_which(tied, small_config):
    config = small_config(*MIXERS, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    model.to_empty(device="cpu")
    assert all(tensor.isnan().any() for tensor in model.state_dict().values() if tensor.is_floating_point())
    direct = HybridForCausalLM(config)
    for module in direct.modules():
        module._is_hf_initialized = False  # transformers' note that it need not draw a second time
    for made in (model, direct):
        torch.manual_seed(7)
        made.init_weights()
    assert (model.lm_head.weight is model.model.embeddings.weight) == tied
    expected, found = direct.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.isfinite().all(), name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_runs_on_the_meta_device(mixer, small_model):
    """Shapes without arithmetic, for whoever plans memory."""
    model = small_model(mixer).to("meta")
    cache = HybridCache(model.config)
    ids = torch.zeros(2, 9, dtype=torch.long, device="meta")
    with torch.no_grad():
        assert model(ids, use_cache=False).logits.shape == (2, 9, 100)
        assert model(ids, past_key_values=cache).logits.shape == (2, 9, 100)
        assert model(ids[:, :1], past_key_values=cache).logits.shape == (2, 1, 100)


@pytest.mark.parametrize("mixer", sorted(set(MIXERS) - {"learned_eviction"}))
def test_layers_on_two_devices(mixer, small_model):
    """Each layer's state lies beside the layer, and reads the layout there. (Scores, gathered, cannot leave meta.)"""
    model = small_model(mixer, mixer).eval()
    model.model.layers[1].to("meta")
    model.model.norm.to("meta")
    model.lm_head = torch.nn.Linear(32, 100, bias=False, device="meta")
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0].to("meta"), *args[1:]))
    ids, cache = torch.zeros(2, 9, dtype=torch.long), HybridCache(model.config)
    with torch.no_grad():
        mask = torch.ones(2, 9).index_fill(1, torch.tensor([0, 4]), 0)
        assert model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.device.type == "meta"
        for part in (ids, ids[:, :1], ids[:, :4]):
            model(part, past_key_values=cache)
    for layer, device in zip(cache.layers, ("cpu", "meta"), strict=True):
        assert {tensor.device.type for tensor in layer.tensors.values()} == {device}
    assert cache.seen.tolist() == [14, 14]
