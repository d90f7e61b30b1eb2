"""The models that are compared: of equal size, with full caches, and counted rightly."""

import pytest
import torch

from holdfast.bench.models import (
    SIZES,
    Contender,
    Holdfast,
    Transformers,
    contenders,
    hybrid_config,
    keep_about,
)
from holdfast.bench.settings import DecodeSettings, ModelSettings, SizeName
from holdfast.modeling import HybridForCausalLM
from holdfast.training.recipe import load_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models() -> list[Contender]:
    torch.manual_seed(0)
    return contenders(ModelSettings(size="tiny"), CPU, torch.float32)


def test_the_models_are_equally_large_and_otherwise_alike(models: list[Contender]) -> None:
    assert [model.name for model in models] == ["holdfast", "Llama", "OLMo-Hybrid"]
    ours = models[0].parameters
    assert all(abs(model.parameters - ours) / ours < 0.01 for model in models)
    assert models[2].model.config.layer_types == ["linear_attention", "full_attention"]
    assert all(model.model.config.vocab_size == 256 and not model.model.training for model in models)


def test_peers_can_be_left_out_and_a_model_of_one_kind_of_layer_has_no_olmo_hybrid() -> None:
    alone = contenders(ModelSettings(size="tiny", peers=False), CPU, torch.float32)
    assert [model.name for model in alone] == ["holdfast"]
    pure = contenders(ModelSettings(size="tiny", mixers=("full_attention",)), CPU, torch.bfloat16)
    assert [model.name for model in pure] == ["holdfast", "Llama"]
    assert {model.model.dtype for model in pure} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["0.4b", "1.4b"])
@pytest.mark.parametrize(("recipe", "mixer"), [("gdn-lte", "learned_eviction"), ("gdn-nsa", "native_sparse_attention")])
def test_the_published_sizes_are_those_of_the_recipes(name: SizeName, recipe: str, mixer: str) -> None:
    published = load_recipe(f"{recipe}-{name}").build_config()
    ours = hybrid_config(SIZES[name], ("gated_deltanet", mixer))
    for field in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "mixers",
        "intermediate_size",
        "tie_word_embeddings",
    ):
        assert getattr(ours, field) == getattr(published, field), field
    assert ours.mixer_options == published.mixer_options


def test_filled_caches_are_those_of_a_prompt_that_was_read(models: list[Contender]) -> None:
    ours, llama, olmo = models
    with torch.no_grad():
        for model in models:
            caches = model.filled_caches([40, 90, 40], batch_size=2, chunk=32)
            assert {context: cache.get_seq_length() for context, cache in caches.items()} == {40: 40, 90: 90}
            read = model.prefill(model.random_ids(2, 90), chunk=45)
            assert model.cache_bytes(caches[90]) == model.cache_bytes(read)
            step = model.read(model.random_ids(2, 1), caches[40])
            assert step.shape == (2, 1, 256)
            assert step.isfinite().all()
            assert (caches[40].get_seq_length(), caches[90].get_seq_length()) == (41, 90)
    assert isinstance(ours, Holdfast)
    assert isinstance(llama, Transformers)
    # Keys and values of two heads of 16 in two layers; OLMo-Hybrid: one layer of them, and a state of two heads of
    # 32 × 32 with four columns of the convolution's 192 channels.
    assert llama.cache_bytes(llama.filled_caches([90], 1, 32)[90]) == 2 * 90 * 2 * 2 * 16 * 4
    assert olmo.cache_bytes(olmo.filled_caches([90], 1, 32)[90]) == 90 * 2 * 2 * 16 * 4 + (2 * 32 * 32 + 192 * 4) * 4


def test_the_caches_of_ours_hold_what_one_reading_in_a_row_would(models: list[Contender]) -> None:
    ours = models[0]
    ids = ours.random_ids(1, 90)
    drawn = iter([ids[:, :40], ids[:, 40:], ids[:, :7]])
    model = Holdfast(ours.model.config)
    model.model = ours.model
    model.random_ids = lambda batch_size, length: next(drawn)  # type: ignore[method-assign]
    with torch.no_grad():
        caches = model.filled_caches([90, 40], batch_size=1, chunk=16)
        for context, cache in caches.items():
            whole = model.prefill(ids[:, :context], chunk=None)
            torch.testing.assert_close(
                model.read(ids[:, :1], cache), model.read(ids[:, :1], whole), atol=1e-4, rtol=1e-4
            )


def test_a_rewound_cache_is_as_long_as_before(models: list[Contender]) -> None:
    for model in models[1:]:
        cache = model.filled_caches([40], batch_size=1, chunk=32)[40]
        rewind = model.rewinding(cache)
        before = [layer.keys.clone() for layer in cache.layers if getattr(layer, "keys", None) is not None]
        with torch.no_grad():
            for _ in range(3):
                model.read(model.random_ids(1, 1), cache)
        assert cache.get_seq_length() == 43
        rewind()
        after = [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]
        assert cache.get_seq_length() == 40
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_operations_of_llama_by_hand(models: list[Contender]) -> None:
    llama = models[1]
    width = llama.model.config.intermediate_size
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * width) + 64 * 256
    assert llama.flops(100) == 2 * weights + 2 * 4 * 100 * 64
    assert llama.flops_of_sequence(1000) == pytest.approx(sum(llama.flops(at + 1) for at in range(1000)), rel=2e-3)
    assert llama.flops_of_sequence(10) == sum(llama.flops(at + 1) for at in range(10))
    tied = llama.model.get_input_embeddings().weight
    assert llama.weight_bytes == 4 * llama.parameters
    assert tied is llama.model.get_output_embeddings().weight


def test_operations_of_equal_layers_are_equal(models: list[Contender]) -> None:
    """OLMo-Hybrid's linear layer against ours, once the projections and MLPs are taken away."""
    olmo = models[2]
    linear = 2 * sum(m.weight.numel() for m in olmo.model.modules() if isinstance(m, torch.nn.Linear))
    assert olmo.flops(500) - linear == 4 * 500 * 64 + 6 * 2 * 32 * 32


@pytest.mark.parametrize("sharing", ["head", "layer"])
def test_scorers_are_shifted_until_they_keep_so_many(sharing: str) -> None:
    torch.manual_seed(1)
    config = hybrid_config(SIZES["tiny"], ("gated_deltanet", "learned_eviction"))
    options = config.mixer_options | {
        "learned_eviction": config.mixer_options["learned_eviction"] | {"scorer_sharing": sharing}
    }
    model = HybridForCausalLM(type(config)(**{**config.to_dict(), "mixer_options": options})).eval()
    ids = torch.randint(256, (2, 200))
    before = model(input_ids=ids, use_cache=False).retention.scores[0]
    keep_about(model, ids, 30)
    after = model(input_ids=ids, use_cache=False).retention.scores[0]
    assert ((before > 0).sum(1) > 100).any()
    kept = (after > 0).sum((0, 1)) / 2
    if sharing == "head":
        torch.testing.assert_close(kept, torch.full_like(kept, 30.0), atol=1.0, rtol=0)
    else:
        assert 10 < kept.mean() < 60
    keep_about(model, ids, 200)  # as many as there are: nothing to shift
    assert torch.equal(model(input_ids=ids, use_cache=False).retention.scores[0], after)


def test_settings_are_checked_and_named() -> None:
    with pytest.raises(ValueError, match="contexts must be at least 1, got 0"):
        DecodeSettings(contexts=(5, 0))
    with pytest.raises(ValueError, match="contexts is empty"):
        DecodeSettings(contexts=())
    with pytest.raises(ValueError, match="limit must be above 0"):
        DecodeSettings(limit=0)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        DecodeSettings(threads=0)
    assert str(DecodeSettings(output="x").output_path) == "benchmarks/results/x.json"
    assert str(DecodeSettings(output="a/x").output_path) == "a/x.json"
    assert str(DecodeSettings(output="a/x.json").output_path) == "a/x.json"
    assert DecodeSettings().output_path is None
