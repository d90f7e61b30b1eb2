"""Costs from the configuration alone: against hand-computed numbers, and against models that were allocated."""

import resource
import sys

import pytest
import torch

from holdfast import HybridCache, HybridConfig, HybridForCausalLM
from holdfast.info import CONTEXTS, describe_cost, flops_per_token, parameters_by_part
from holdfast.training.recipe import load_recipe

OPTIONS = {
    "gated_deltanet": {"num_heads": 2, "head_dim": 8},
    "learned_eviction": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": 12, "budget": 5, "sinks": 1},
    "sliding_attention": {"num_heads": 2, "head_dim": 8, "window": 9},
    "full_attention": {"num_heads": 2, "head_dim": 8},
    "native_sparse_attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "block_size": 16, "num_blocks": 3},
}


def small_config(*mixers: str, tied: bool = True, layers: int = 2) -> HybridConfig:
    return HybridConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=layers,
        intermediate_size=48,
        mixers=list(mixers),
        mixer_options={name: OPTIONS[name] for name in dict.fromkeys(mixers)},
        tie_word_embeddings=tied,
    )


def test_parameters_of_a_transformer_by_hand() -> None:
    cost = describe_cost(small_config("full_attention", tied=False))
    assert cost.parameters == {
        "embeddings": 50 * 32,
        "full_attention": 2 * 4 * 32 * 16,
        "MLP": 2 * 3 * 32 * 48,
        "norms": (2 * 2 + 1) * 32,
        "output head": 50 * 32,
    }


def test_scorer_parameters_by_hand() -> None:
    cost = describe_cost(small_config("gated_deltanet", "learned_eviction"))
    # Two heads; kernel 3; 16 → 8 → 4 → 2 channels, then one logit; a bias for every channel.
    per_head = (16 * 8 * 3 + 8) + (8 * 4 * 3 + 4) + (4 * 2 * 3 + 2) + (2 + 1)
    assert cost.parameters["retention scorer"] == 2 * per_head
    assert cost.parameters["learned_eviction"] == 2 * 32 * 32 + 2 * 32 * 16
    assert cost.scorer_flops == 2 * 2 * (16 * 8 * 3 + 8 * 4 * 3 + 4 * 2 * 3 + 2)
    assert "output head" not in cost.parameters  # tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "mixers", [("gated_deltanet", "learned_eviction"), ("sliding_attention", "full_attention"), ("gated_deltanet",)]
)
def test_parts_add_up_to_an_allocated_model(mixers: tuple[str, ...], tied: bool) -> None:
    config = small_config(*mixers, tied=tied)
    model = HybridForCausalLM(config)
    assert describe_cost(config).parameters == parameters_by_part(model)
    assert describe_cost(config).total_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_flops_of_a_transformer_by_hand() -> None:
    model = HybridForCausalLM(small_config("full_attention", layers=3))
    maps, mlp, head = 4 * 32 * 16, 3 * 32 * 48, 32 * 50
    for context in (1, 7, 1000):
        attention = 2 * context * 16  # q·k and the weighted sum of v, over both heads
        assert flops_per_token(model, context) == 2 * (3 * (maps + mlp + attention) + head)


def test_flops_stop_growing_where_memory_does() -> None:
    cost = describe_cost(small_config("gated_deltanet", "learned_eviction"), contexts=(4, 18, 10_000))
    assert cost.flops[4] < cost.flops[18] == cost.flops[10_000]  # window 12, the token itself, 5 slots


def test_flops_of_sparse_attention_by_hand() -> None:
    model = HybridForCausalLM(small_config("native_sparse_attention", layers=1))
    maps, mlp, head = 32 * (32 + 16 + 16 + 32 + 12), 3 * 32 * 48, 32 * 50
    for context, keys in ((10, 0 + 10 + 10), (100, 6 + 48 + 100), (10_000, 625 + 48 + 512)):
        assert flops_per_token(model, context) == 2 * (maps + mlp + head + 2 * keys * 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", list(OPTIONS))
def test_cache_bytes_are_those_allocated(mixer: str, dtype: torch.dtype) -> None:
    config = small_config(mixer)
    cost = describe_cost(config, contexts=(300,), dtype=dtype, batch_size=3)
    model = HybridForCausalLM(config).to(dtype).eval()
    cache = HybridCache(config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (3, 300), generator=generator)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    assert cost.cache_bytes == {300: cache.nbytes}
    assert cost.dtype == str(dtype).removeprefix("torch.")


def test_the_largest_published_model_is_not_allocated() -> None:
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    cost = describe_cost(load_recipe("gdn-lte-1.4b").build_config())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    assert 1.3e9 < cost.total_parameters < 1.4e9
    assert grown < cost.total_parameters  # the weights alone would be four bytes each
    assert len(set(cost.cache_bytes.values())) == 1
    assert tuple(cost.cache_bytes) == CONTEXTS == (1024, 4096, 16384, 65536, 262144, 1048576)
    # 12 layers of learned eviction: 8 heads of 512 + 769 slots with keys and values of 64 in bf16 and a score in fp32,
    # 512 positions in int32, the scorer's 12 latest inputs, and the count of tokens.
    eviction = 8 * (1281 * (2 * 64 * 2 + 4) + 512 * 4 + 12 * 128 * 2) + 8
    # 12 of Gated DeltaNet: 8 heads of 256 × 256 in fp32 at least.
    assert cost.cache_bytes[1024] >= 12 * (eviction + 8 * 256 * 256 * 4)
    assert cost.cache_bytes[1024] < 12 * (eviction + 8 * 256 * 256 * 4) * 1.01


def test_numbers_are_checked() -> None:
    config = small_config("gated_deltanet")
    with pytest.raises(ValueError, match="batch_size is 0"):
        describe_cost(config, batch_size=0)
    with pytest.raises(ValueError, match="at least 1"):
        describe_cost(config, contexts=(0,))
