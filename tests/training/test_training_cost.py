"""What a run costs: against hand-computed numbers, and against what autograd keeps."""

import dataclasses

import pytest
import torch

from holdfast import HybridForCausalLM
from holdfast.mixers import MIXERS
from holdfast.ops import fused, grouped_convolution
from holdfast.ops.gated_delta_rule import native
from holdfast.training import load_recipe
from holdfast.training.cost import describe_training

OPTIONS = {
    "gated_deltanet": {"num_heads": 4, "head_dim": 32},
    "full_attention": {"num_heads": 4},
    "sliding_attention": {"num_heads": 4, "window": 128},
    "learned_eviction": {"num_heads": 4, "num_kv_heads": 2, "window": 64, "budget": 64},
    "native_sparse_attention": {"num_heads": 4, "num_kv_heads": 2, "block_size": 16, "num_blocks": 4, "window": 64},
}


def test_tokens_and_weights_of_the_published_run_by_hand():
    cost = describe_training(load_recipe("gdn-lte-1.4b"))
    assert cost.tokens_per_step == 2**20
    assert cost.tokens == 30_720 * 2**20
    assert 16 * 1.3e9 < cost.state_bytes < 16 * 1.4e9
    assert 6 * 1.3e9 * cost.tokens < cost.flops < 12 * 1.4e9 * cost.tokens  # 6 a weight, 8 recomputed, and attention


def with_model(mixer: str, **training):
    recipe = load_recipe("laptop-lalte")
    model = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "mixers": [mixer]}
    data = dataclasses.replace(recipe.data, length=512)
    section = dataclasses.replace(recipe.training, batch_size=2, **training)
    return dataclasses.replace(
        recipe, model=model | {"mixer_options": {mixer: OPTIONS[mixer]}}, training=section, data=data
    )


def kept_bytes(recipe) -> int:
    """Bytes that autograd keeps of one micro-batch, the weights aside."""
    torch.manual_seed(0)
    model = HybridForCausalLM(recipe.build_config()).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    ids = torch.randint(0, 64, (recipe.training.batch_size, recipe.data.length))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.training.bf16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        model(ids, labels=ids, use_cache=False)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("mixer", list(MIXERS))
def test_activations_are_about_what_autograd_keeps(mixer, bf16, monkeypatch):
    recipe = with_model(mixer, bf16=bf16)
    estimate = describe_training(recipe).activation_bytes
    assert kept_bytes(recipe) < 1.25 * estimate  # where there is a C++ compiler, it keeps less
    for module, name in ((fused, "serves"), (grouped_convolution, "serves"), (native, "supports")):
        monkeypatch.setattr(module, name, lambda *_: False)
    assert estimate == pytest.approx(kept_bytes(recipe), rel=0.25)


def test_checkpointing_keeps_one_block():
    plain, checkpointed = (
        describe_training(with_model("full_attention", gradient_checkpointing=on)) for on in (False, True)
    )
    tokens = 2 * 512
    logits = 16 * 64 * tokens
    one_block = (plain.activation_bytes - logits) / 2
    assert checkpointed.activation_bytes == one_block + logits + tokens * 2 * 4 * 128
    assert checkpointed.flops * 3 == plain.flops * 4
