"""What one call may find in a cache that another has left: no graph, another dtype, inference tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from holdfast import HybridCache, HybridForCausalLM

ModelFactory = Callable[..., HybridForCausalLM]
ALL = ("gated_deltanet", "full_attention", "sliding_attention", "learned_eviction", "native_sparse_attention")


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


def graph_size(tensor: Tensor) -> int:
    """Nodes of the graph behind `tensor`."""
    nodes, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return len(nodes)


@pytest.mark.parametrize("mixer", ALL)
def test_the_graph_of_a_call_ends_at_its_cache(small_model: ModelFactory, mixer: str) -> None:
    """Whoever forgets no_grad pays for one call and not for all; the memory stays where it is."""
    model = small_model(mixer)
    cache, ids, sizes, addresses = HybridCache(model.config), random_ids(2, 20), [], []
    model(ids[:, :12], past_key_values=cache)
    for token in ids[:, 12:].split(1, dim=1):
        sizes.append(graph_size(model(token, past_key_values=cache).logits))
        addresses.append([tensor.data_ptr() for tensor in cache.layers[0].tensors.values()])
    assert min(sizes) == max(sizes) > 0
    if not cache.layers[0].growing:
        assert all(found == addresses[0] for found in addresses)


@pytest.mark.parametrize("mixer", [name for name in ALL if name != "learned_eviction"])
@pytest.mark.parametrize("length", [1, 7])
def test_gradients_of_a_call_that_reads_a_cache(small_model: ModelFactory, mixer: str, length: int) -> None:
    """They are those of one pass in which the past is constant: what the last tokens' embeddings get is the same.

    Not so for learned eviction, whose scores of past pairs read the tokens that follow.
    """
    model = small_model(mixer).double()
    embeddings = model.get_input_embeddings()(random_ids(2, 20)).detach()
    whole, part = (embeddings[:, 20 - length :].clone().requires_grad_() for _ in range(2))
    past = embeddings[:, : 20 - length]
    model(inputs_embeds=torch.cat([past, whole], dim=1), use_cache=False).logits[:, -length:].square().sum().backward()
    cache = HybridCache(model.config)
    model(inputs_embeds=past, past_key_values=cache)
    model(inputs_embeds=part, past_key_values=cache).logits.square().sum().backward()
    assert whole.grad is not None
    assert part.grad is not None
    torch.testing.assert_close(part.grad, whole.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ALL)
def test_a_cache_filled_in_inference_mode_serves_outside(small_model: ModelFactory, mixer: str) -> None:
    model, ids = small_model(mixer), random_ids(2, 14)
    cache = HybridCache(model.config)
    with torch.inference_mode():
        model(ids[:, :12], past_key_values=cache)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), model.generate(ids, **settings))
    with torch.inference_mode():
        model(ids[:, :1], past_key_values=cache)
    model(ids[:, :3], past_key_values=cache).logits.sum().backward()


@pytest.mark.parametrize("mixer", ALL)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("length", [1, 4])
def test_a_cache_of_another_dtype(small_model: ModelFactory, mixer: str, autocast: bool, length: int) -> None:
    """A cache in fp32 under bf16, by autocast or of the model: as close to fp32 as bf16 is."""
    model, ids = small_model(mixer), random_ids(2, 24)
    mask = torch.ones(2, 20 + length, dtype=torch.long)
    if length > 1:
        mask[1, 20] = 0
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        snapshot = cache.snapshot()
        rest = {"input_ids": ids[:, 20 : 20 + length], "attention_mask": mask, "past_key_values": cache}
        expected = model(**rest).logits
        cache.restore(snapshot)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = (model if autocast else model.bfloat16())(**rest).logits
    assert found.dtype == torch.bfloat16
    real = mask[:, -length:].bool()
    assert (found.float() - expected)[real].norm() < 0.05 * expected[real].norm()
