"""The cache as a value: its size is known beforehand and is what is allocated; it can be saved and refuses misuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast import HybridCache, HybridConfig, HybridForCausalLM
from holdfast.mixers import MIXERS, LearnedEviction
from holdfast.mixers.layout import TokenLayout
from holdfast.mixers.softmax_attention import gather_rows
from holdfast.mixers.window_state import WindowState
from holdfast.ops.retention import streaming_retention

ModelFactory = Callable[..., HybridForCausalLM]
ALL = ("gated_deltanet", "full_attention", "sliding_attention", "learned_eviction", "native_sparse_attention")

PUBLISHED_1_4B = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "mixers": ["gated_deltanet", "learned_eviction"],
    "mixer_options": {
        "gated_deltanet": {"num_heads": 8, "head_dim": 256},
        "learned_eviction": {
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 64,
            "window": 768,
            "budget": 512,
            "sinks": 4,
        },
    },
}


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


def storage_bytes(cache: HybridCache) -> int:
    """What the allocator gave, each storage counted once."""
    tensors = [cache.seen, *(tensor for layer in cache.layers for tensor in layer.tensors.values())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


@pytest.mark.parametrize("mixer", ALL)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bytes_are_known_before_and_equal_what_is_allocated(
    small_model: ModelFactory, mixer: str, batch: int, dtype: torch.dtype
) -> None:
    model = small_model(mixer).to(dtype)
    cache = HybridCache(model.config)
    assert cache.nbytes == 0
    ids, read = random_ids(batch, 300), 0
    with torch.no_grad():
        for length in (1, 20, 1, 250, 1):
            model(ids[:, read : read + length], past_key_values=cache)
            read += length
            assert (
                cache.nbytes == storage_bytes(cache) == HybridCache.bytes_for(model.config, batch, dtype, tokens=read)
            )
    constant = HybridCache.bytes_for(model.config, batch, dtype) == cache.nbytes
    assert constant is not MIXERS[mixer].make_state(model.config.options_for(mixer)).growing
    cache.select_rows(torch.zeros(2, dtype=torch.long))
    assert cache.nbytes == storage_bytes(cache) == HybridCache.bytes_for(model.config, 2, dtype, tokens=read)
    cache.restore(cache.snapshot())
    assert cache.nbytes == storage_bytes(cache) == HybridCache.bytes_for(model.config, 2, dtype, tokens=read)
    cache.reset()
    assert cache.nbytes == storage_bytes(cache) == HybridCache.bytes_for(model.config, 2, dtype)


def test_the_published_1_4b_model_needs_the_same_bytes_at_any_length() -> None:
    """By hand, per row and LTE layer: 8 heads × (512 + 769) slots × 64 × 2 tensors × 2 bytes, fp32 scores, int32
    positions of the store, the scorer's 12 latest inputs, the count; per GDN layer: the fp32 state and 3 inputs."""
    config = HybridConfig(**PUBLISHED_1_4B)
    slots = 8 * (512 + 769)
    eviction = slots * 64 * 2 * 2 + slots * 4 + 8 * 512 * 4 + 12 * 8 * 128 * 2 + 8
    linear = 8 * 256 * 256 * 4 + 3 * (8 * 256) * 3 * 2
    expected = 12 * (eviction + linear) + 8
    for tokens in (0, 2_000, 200_000):
        assert HybridCache.bytes_for(config, 1, torch.bfloat16, tokens) == expected
    cache = HybridCache(config)
    cache.allocate(1, torch.bfloat16)
    assert cache.nbytes == storage_bytes(cache) == expected


def test_200_000_tokens_occupy_what_2_000_do() -> None:
    """One published LTE layer's state, fed random pairs: its tensors stay where they are and hold the best scores."""
    torch.manual_seed(0)
    options = HybridConfig(**PUBLISHED_1_4B).options_for("learned_eviction")
    state = LearnedEviction.make_state(options)
    state.allocate(1, torch.bfloat16, "cpu")
    allocated = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in state.tensors.items()}
    total, chunk, heads, reach = 200_000, 20_000, options.kv_heads, options.receptive_field // 2
    scores = torch.rand(1, total + reach, heads) - 0.5
    for start in range(0, total, chunk):
        positions = torch.arange(start, start + chunk).unsqueeze(0)
        layout = TokenLayout(state.seen.clone(), positions, fresh=start == 0)
        pairs = torch.randn(1, chunk, heads, 64, dtype=torch.bfloat16)
        rows = gather_rows(pairs, pairs, scores[:, max(0, start - reach) : start + chunk], layout, state)
        ranked = rows.scores.masked_fill(rows.positions < options.sinks, torch.inf)
        ranked = ranked.masked_fill(rows.positions < 0, -torch.inf)
        state.write_rows(rows, streaming_retention(ranked, options.budget, options.window), layout)
    assert {name: (tensor.data_ptr(), tensor.shape) for name, tensor in state.tensors.items()} == allocated
    assert state.nbytes == state.bytes_for(1, torch.bfloat16, 2_000) == state.bytes_for(1, torch.bfloat16, total)
    left = scores[0, options.sinks : total - options.window - 1]
    best = left.topk(options.budget - options.sinks, dim=0).indices + options.sinks
    for head in range(heads):
        expected = [*range(options.sinks), *sorted(best[:, head].tolist())]
        assert sorted(state.positions[0, head].tolist()) == expected


def test_decoding_touches_the_same_tensors_at_any_length(small_model: ModelFactory) -> None:
    """No tensor is added, grows or moves while decoding, but those of full attention."""
    model = small_model("gated_deltanet", "sliding_attention", "learned_eviction")
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(random_ids(2, 30), past_key_values=cache)
        seen = set()
        for token in random_ids(1, 40)[0]:
            model(token.expand(2, 1), past_key_values=cache)
            seen.add(
                tuple((t.data_ptr(), t.shape, t.stride()) for layer in cache.layers for t in layer.tensors.values())
            )
    assert len(seen) == 1


def test_reset_keeps_the_memory_it_has(small_model: ModelFactory) -> None:
    model = small_model("gated_deltanet", "sliding_attention", "learned_eviction")
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(random_ids(2, 30), past_key_values=cache)
    addresses = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors.values()]
    cache.reset()
    assert [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors.values()] == addresses


def test_snapshots_go_through_safetensors(small_model: ModelFactory, tmp_path: Path) -> None:
    model = small_model(*ALL)
    ids = random_ids(2, 40)
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        save_file(cache.snapshot(), tmp_path / "prefix.safetensors")
        expected = model(ids[:, 30:], past_key_values=cache).logits
        again = HybridCache(model.config)
        again.restore(load_file(tmp_path / "prefix.safetensors"))
        assert again.get_seq_length() == 30
        assert again.seen.tolist() == [30, 30]
        assert torch.equal(model(ids[:, 30:], past_key_values=again).logits, expected)


def test_a_snapshot_is_a_copy(small_model: ModelFactory) -> None:
    """Neither the cache it was taken from nor one restored from it changes it."""
    model = small_model(*ALL)
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(random_ids(2, 20), past_key_values=cache)
        snapshot = cache.snapshot()
        before = {name: tensor.clone() for name, tensor in snapshot.items()}
        for _ in range(2):
            for token in random_ids(1, 12)[0]:
                model(token.expand(2, 1), past_key_values=cache)
            cache.reset()
            assert all(torch.equal(snapshot[name], tensor) for name, tensor in before.items())
            cache.restore(snapshot)


def test_an_empty_cache_has_an_empty_snapshot(small_model: ModelFactory) -> None:
    model = small_model(*ALL)
    cache = HybridCache(model.config)
    assert cache.snapshot() == {}
    with torch.no_grad():
        expected = model(random_ids(3, 9), past_key_values=cache).logits
        cache.restore({})
        assert cache.nbytes == cache.get_seq_length() == 0
        assert torch.equal(model(random_ids(3, 9), past_key_values=cache).logits, expected)


@pytest.mark.parametrize("mixer", ALL)
@pytest.mark.parametrize("change", ["none", "select_rows", "batch_repeat_interleave", "restore"])
def test_what_was_read_under_inference_mode_can_be_written_outside(
    small_model: ModelFactory, mixer: str, change: str
) -> None:
    model = small_model(mixer).eval()
    ids = random_ids(2, 20)
    cache = HybridCache(model.config)
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache)
        if change == "select_rows":
            cache.select_rows(torch.tensor([1, 0]))
            ids = ids.flip(0)
        elif change == "batch_repeat_interleave":
            cache.batch_repeat_interleave(2)
            ids = ids.repeat_interleave(2, dim=0)
        elif change == "restore":
            cache.restore(cache.snapshot())
    with torch.no_grad():
        step = model(input_ids=ids[:, :1], past_key_values=cache).logits
        whole = model(input_ids=torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:]
        torch.testing.assert_close(step, whole)
    assert cache.columns == 21
    cache.reset()
    assert (cache.is_fresh, cache.columns, cache.seen.tolist()) == (True, 0, [0] * len(ids))
    with torch.no_grad():
        again = model(input_ids=ids, past_key_values=cache).logits
        torch.testing.assert_close(again, model(input_ids=ids).logits)


def test_restore_refuses_what_does_not_fit_and_changes_nothing(small_model: ModelFactory) -> None:
    model = small_model("gated_deltanet", "learned_eviction")
    other = small_model("gated_deltanet", "learned_eviction", options={"learned_eviction": {"budget": 4}})
    shorter = small_model("gated_deltanet")
    ids = random_ids(2, 20)
    cache, foreign, short = (HybridCache(m.config) for m in (model, other, shorter))
    with torch.no_grad():
        for m, c in ((model, cache), (other, foreign), (shorter, short)):
            m(ids, past_key_values=c)
        before = cache.snapshot()
        with pytest.raises(ValueError, match="does not fit WindowState"):
            cache.restore(foreign.snapshot())
        with pytest.raises(ValueError, match="nothing for layer 1"):
            cache.restore(short.snapshot())
        with pytest.raises(ValueError, match=r"layers\.1\.\w+"):
            short.restore(before)
    after = cache.snapshot()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_another_batch_size_is_refused(small_model: ModelFactory) -> None:
    model = small_model()
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(random_ids(2, 5), past_key_values=cache)
        with pytest.raises(ValueError, match=r"holds 2 rows, the input has 3.*select_rows"):
            model(random_ids(3, 5), past_key_values=cache)


def test_tokens_cannot_be_taken_back(small_model: ModelFactory) -> None:
    cache = HybridCache(small_model().config)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match=r"snapshot.*restore"):
        cache.crop(3)
    with pytest.raises(TypeError, match="advanced by its mixer"):
        cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)


def test_a_state_names_the_tensor_it_does_not_have() -> None:
    with pytest.raises(AttributeError, match="'keys'"):
        _ = WindowState(2, 8, 5).keys


@pytest.mark.parametrize("missing", ["seen", "layers.0.columns"])
def test_an_incomplete_snapshot_is_refused_by_name(missing: str, small_model: Callable[..., HybridForCausalLM]) -> None:
    model = small_model()
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(torch.arange(9).view(1, -1), past_key_values=cache)
    snapshot = cache.snapshot()
    del snapshot[missing]
    with pytest.raises(ValueError, match="incomplete"):
        cache.restore(snapshot)
    assert cache.columns == 9


@pytest.mark.parametrize("fault", ["rows", "columns", "seen"])
def test_a_snapshot_that_contradicts_itself_is_refused(
    fault: str, small_model: Callable[..., HybridForCausalLM]
) -> None:
    model = small_model()
    cache, other = HybridCache(model.config), HybridCache(model.config)
    with torch.no_grad():
        model(random_ids(2, 9), past_key_values=cache)
        model(random_ids(1, 9), past_key_values=other)
    snapshot, single = cache.snapshot(), other.snapshot()
    if fault == "rows":
        snapshot |= {name: tensor for name, tensor in single.items() if name.startswith("layers.0.")}
    elif fault == "columns":
        snapshot["layers.1.columns"] = torch.tensor(8)
    else:
        snapshot["seen"] = single["seen"]
    with pytest.raises(ValueError, match="contradicts itself: layer"):
        cache.restore(snapshot)
    assert cache.columns == 9
    assert cache.seen.tolist() == [9, 9]


@pytest.mark.parametrize("learns", ["v_proj", "k_proj", "router"])
def test_a_few_tokens_on_a_cache_have_gradients_whatever_learns(small_model: ModelFactory, learns: str) -> None:
    """Those of a chunk, also where no query needs one: they are not read one after the other, in place."""
    model = small_model("learned_eviction").eval()
    for name, weight in model.named_parameters():
        weight.requires_grad_(learns in name)
    ids, cache = random_ids(2, 36), HybridCache(model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :30], past_key_values=cache)
    model(input_ids=ids[:, 30:], past_key_values=cache).logits.square().sum().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert gradients
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients if gradient is not None)


def test_states_are_marked_without_a_guard(small_model: ModelFactory) -> None:
    cache = HybridCache(small_model("learned_eviction").config)
    cache.allocate(1, torch.float32, "cpu")
    marks = [tensor._dynamo_static_input_type for layer in cache.layers for tensor in layer.tensors.values()]
    assert marks
    assert set(marks) == {"unguarded"}
