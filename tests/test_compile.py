"""torch.compile takes the whole model as one graph, in training and in decoding, and changes no number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast import HybridCache, HybridConfig, HybridForCausalLM

OPTIONS: dict[str, dict[str, Any]] = {
    "gated_deltanet": {"num_heads": 2, "head_dim": 8},
    "full_attention": {"num_heads": 4, "num_kv_heads": 2},
    "sliding_attention": {"num_heads": 4, "num_kv_heads": 2, "window": 9},
    "learned_eviction": {"num_heads": 4, "num_kv_heads": 2, "window": 12, "budget": 6, "sinks": 1, "dropout": 0.0},
    "native_sparse_attention": {"num_heads": 4, "num_kv_heads": 2, "block_size": 4, "num_blocks": 3, "window": 5},
}


def small_model(kind: str = "plain") -> HybridForCausalLM:
    """One layer of every mixer: compiling costs seconds, whatever the size."""
    mixers = [name for name in OPTIONS if kind != "fixed" or name != "native_sparse_attention"]
    if kind == "bounded":
        mixers = ["gated_deltanet", "sliding_attention", "learned_eviction"]
    torch.manual_seed(3)
    config = HybridConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=len(mixers),
        intermediate_size=48,
        mixers=mixers,
        mixer_options={name: OPTIONS[name] for name in mixers},
    )
    return HybridForCausalLM(config)


def batch(kind: str, columns: int = 30) -> dict[str, Tensor]:
    ids = torch.randint(0, 50, (1 if kind == "packed" else 2, columns), generator=torch.Generator().manual_seed(1))
    if kind == "packed":
        return {"input_ids": ids, "cu_seqlens": torch.tensor([0, 11, 11, 12, columns])}
    if kind == "pads":
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
        return {"input_ids": ids, "attention_mask": mask}
    return {"input_ids": ids}


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["pads", "packed"])
def test_a_training_step_is_one_graph(kind: str) -> None:
    model = small_model(kind).train()
    inputs = batch(kind)

    def step(run: Callable[..., Any]) -> list[Tensor]:
        model.zero_grad()
        loss = run(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = step(model)
    actual = step(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert len(actual) == len(expected) > 40
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("kind", "most"), [("fixed", 4), ("growing", 6)])
@torch.no_grad()
def test_prefill_and_decoding_are_one_graph_each(kind: str, most: int) -> None:
    """Two chunks, and a step: once more, at most, when a count that changed turns out to be dynamic.

    Native sparse attention has two more that do, its tokens and its blocks.
    """
    model = small_model(kind).eval()
    ids = batch("plain", 48)["input_ids"]

    def logits(run: Callable[..., Any], cache: HybridCache) -> list[Tensor]:
        chunks = [ids[:, :20], ids[:, 20:34], *ids[:, 34:].split(1, dim=1)]
        return [run(input_ids=chunk, past_key_values=cache).logits for chunk in chunks]

    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    caches = HybridCache(model.config), HybridCache(model.config)
    expected = logits(model, caches[0])
    actual = logits(torch.compile(model, backend=count, fullgraph=True), caches[1])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for tensor, theirs in zip(caches[1].snapshot().values(), caches[0].snapshot().values(), strict=True):
        torch.testing.assert_close(tensor, theirs)
    assert graphs <= most


@pytest.mark.parametrize("restored", [False, True])
@torch.no_grad()
def test_steps_with_bounded_memory_are_one_graph_of_tensors_that_stay_in_place(restored: bool) -> None:
    """So that a CUDA graph can be played again: no input is a number that changes, and no state moves."""
    model = small_model("bounded").eval()
    ids = batch("plain", 40)["input_ids"]
    caches = HybridCache(model.config), HybridCache(model.config)
    for cache in caches:
        with torch.inference_mode():
            model(input_ids=ids[:, :30], past_key_values=cache)
            if restored:
                cache.restore(cache.snapshot())
    places = [tensor.data_ptr() for layer in caches[1].layers for tensor in layer.tensors.values()]
    inputs: list[list[Any]] = []

    def note(graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        inputs.append(examples)
        return graph.forward

    compiled = torch.compile(model, backend=note, fullgraph=True)
    for token in ids[:, 30:].split(1, dim=1):
        ours = compiled(input_ids=token, past_key_values=caches[1]).logits
        torch.testing.assert_close(ours, model(input_ids=token, past_key_values=caches[0]).logits)
    assert len(inputs) == 1
    assert all(isinstance(value, Tensor) for value in inputs[0])
    state = [value for value in inputs[0] if hasattr(value, "_dynamo_static_input_type")]
    tensors = [tensor for layer in caches[1].layers for tensor in layer.tensors.values()]
    assert [tensor.data_ptr() for tensor in tensors] == places
    assert {id(tensor) for tensor in tensors} <= {id(value) for value in state}
    assert caches[1].columns == caches[0].columns == 40
    assert [layer.get_seq_length() for layer in caches[1].layers] == [40] * 3
    for tensor, theirs in zip(caches[1].snapshot().values(), caches[0].snapshot().values(), strict=True):
        torch.testing.assert_close(tensor, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@torch.no_grad()
def test_cuda_graphs_play_the_steps() -> None:
    model = small_model("bounded").eval().cuda()
    ids = batch("plain", 48)["input_ids"].cuda()
    caches = HybridCache(model.config), HybridCache(model.config)
    for cache in caches:
        model(input_ids=ids[:, :30], past_key_values=cache)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for token in ids[:, 30:].split(1, dim=1):
        torch.compiler.cudagraph_mark_step_begin()
        ours = compiled(input_ids=token, past_key_values=caches[0]).logits.clone()
        torch.testing.assert_close(ours, model(input_ids=token, past_key_values=caches[1]).logits, rtol=1e-3, atol=1e-3)
    assert caches[0].columns == caches[1].columns == 48
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
