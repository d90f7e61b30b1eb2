"""generate(): the same tokens as scoring without a cache, for every way of asking; what cannot work is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from holdfast import HybridCache, HybridForCausalLM

ModelFactory = Callable[..., HybridForCausalLM]
STACKS = [
    ("gated_deltanet", "learned_eviction"),
    ("gated_deltanet", "full_attention", "sliding_attention", "learned_eviction"),
    ("native_sparse_attention",),
]
NEW = 12


@pytest.fixture(scope="module", params=STACKS, ids="+".join)
def model(request: pytest.FixtureRequest, small_model: ModelFactory) -> HybridForCausalLM:
    return small_model(*request.param)


def prompts(batch: int = 2, length: int = 17, seed: int = 3) -> Tensor:
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy_without_cache(model: HybridForCausalLM, ids: Tensor, count: int = NEW) -> Tensor:
    """The most likely next token again and again, each from a whole pass."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids (pads are 0) and mask [B, longest]."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return ids, mask


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("length", [1, 17, 40])
def test_greedy(model: HybridForCausalLM, use_cache: bool, length: int) -> None:
    ids = prompts(length=length)
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False, use_cache=use_cache)
    assert torch.equal(found, greedy_without_cache(model, ids))


def test_max_length_and_end_of_sequence(model: HybridForCausalLM) -> None:
    ids = prompts(1)
    expected = greedy_without_cache(model, ids)
    assert torch.equal(model.generate(ids, max_length=20, do_sample=False), expected[:, :20])
    end = int(expected[0, 19])
    stop = 1 + expected[0, 17:].tolist().index(end)
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=0)
    assert torch.equal(found, expected[:, : 17 + stop])


def test_sampling_is_seeded_and_does_not_depend_on_the_cache(model: HybridForCausalLM) -> None:
    drawn = []
    for use_cache in (True, True, False):
        torch.manual_seed(5)
        drawn.append(model.generate(prompts(), max_new_tokens=NEW, do_sample=True, top_k=0, use_cache=use_cache))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    torch.manual_seed(6)
    assert not torch.equal(drawn[0], model.generate(prompts(), max_new_tokens=NEW, do_sample=True, top_k=0))


def test_num_return_sequences_continue_their_prompt(model: HybridForCausalLM) -> None:
    torch.manual_seed(5)
    out = model.generate(
        prompts(), max_new_tokens=NEW, do_sample=True, num_return_sequences=3, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert out.sequences.shape == (6, 17 + NEW)
    with torch.no_grad():
        rescored = model(out.sequences, use_cache=False).logits[:, 16:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), rescored, atol=1e-4, rtol=0)


def test_beams_score_as_a_pass_without_cache_says(model: HybridForCausalLM) -> None:
    """Beams swap rows of every state at each step; a wrong swap gives sequences another score than they have."""
    out = model.generate(
        prompts(), max_new_tokens=10, do_sample=False, num_beams=5, num_return_sequences=5, length_penalty=0.0,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert (out.beam_indices[:, :10] % 5).unique().numel() > 1
    with torch.no_grad():
        logits = model(out.sequences, use_cache=False).logits
    scores = logits.log_softmax(-1)[:, 16:-1].gather(2, out.sequences[:, 17:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, scores, atol=1e-4, rtol=0)


def test_wide_beams_find_the_best_of_all_continuations(small_model: ModelFactory) -> None:
    """With as many beams as prefixes nothing is cut off: the answer is the maximum over all 6³ continuations."""
    model = small_model(*STACKS[0], vocab_size=6)
    ids = prompts(1, 17) % 6
    ends = torch.tensor(list(itertools.product(range(6), repeat=3)))
    every = torch.cat([ids.expand(len(ends), -1), ends], dim=1)
    with torch.no_grad():
        steps = model(every, use_cache=False).logits.log_softmax(-1)[:, 16:-1]
    scores = steps.gather(2, ends.unsqueeze(2)).sum((1, 2))
    found = model.generate(ids, max_new_tokens=3, do_sample=False, num_beams=36, length_penalty=0.0)
    assert found[0, 17:].tolist() == ends[scores.argmax()].tolist()


def test_left_padded_batches_equal_rows_alone(model: HybridForCausalLM) -> None:
    rows = [prompts(1, length, seed=length)[0] for length in (30, 1, 11, 5)]
    ids, mask = left_padded(rows)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    for row, tokens in zip(rows, found, strict=True):
        assert torch.equal(tokens[-NEW:], greedy_without_cache(model, row.unsqueeze(0))[0, -NEW:])


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_prefill_in_chunks(model: HybridForCausalLM, chunk: int) -> None:
    rows = [prompts(1, length, seed=length)[0] for length in (30, 13)]
    ids, mask = left_padded(rows)
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, prefill_chunk_size=chunk)
    found = model.generate(ids, attention_mask=mask, generation_config=settings)
    for row, tokens in zip(rows, found, strict=True):
        assert torch.equal(tokens[-NEW:], greedy_without_cache(model, row.unsqueeze(0))[0, -NEW:])


def test_a_chat_goes_on_with_its_cache(model: HybridForCausalLM) -> None:
    """Three turns; each gives the whole conversation so far, of which only the new part is read."""
    cache, text = HybridCache(model.config), prompts(1)
    for turn in range(3):
        found = model.generate(text, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(found, greedy_without_cache(model, text))
        assert cache.get_seq_length() == found.shape[1] - 1  # the last token has not been read yet
        text = torch.cat([found, prompts(1, 5, seed=turn)], dim=1)


def test_a_chat_of_rows_of_unequal_length(model: HybridForCausalLM) -> None:
    """Pads before the first turn and between the turns."""
    first = [prompts(1, length, seed=length)[0] for length in (20, 9)]
    second = [prompts(1, length, seed=length)[0] for length in (3, 14)]
    cache = HybridCache(model.config)
    ids, mask = left_padded(first)
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    more, more_mask = left_padded(second)
    ids = torch.cat([found, more], dim=1)
    mask = torch.cat([mask, torch.ones(2, NEW, dtype=torch.long), more_mask], dim=1)
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    for start, row in enumerate(zip(first, second, strict=True)):
        alone = greedy_without_cache(model, row[0].unsqueeze(0))
        alone = greedy_without_cache(model, torch.cat([alone, row[1].unsqueeze(0)], dim=1))
        assert torch.equal(found[start, -NEW:], alone[0, -NEW:])


def test_from_embeddings(model: HybridForCausalLM) -> None:
    ids = prompts()
    found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, greedy_without_cache(model, ids)[:, 17:])


def test_streamer(model: HybridForCausalLM) -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    collector = Collector()
    found = model.generate(prompts(1), max_new_tokens=NEW, do_sample=False, streamer=collector)
    assert collector.tokens == found[0].tolist()
    assert collector.ended


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported with stateful models"),
        ({"cache_implementation": "static"}, "cache_implementation='static' does not apply"),
        ({"output_attentions": True}, "no attention matrix is ever formed"),
        ({"past_key_values": DynamicCache()}, r"must be a holdfast.HybridCache\(config\), got a DynamicCache"),
    ],
)
def test_what_cannot_work_is_refused(model: HybridForCausalLM, arguments: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        model.generate(prompts(1), max_new_tokens=3, do_sample=False, **arguments)


def test_assisted_decoding_is_refused(model: HybridForCausalLM, small_model: ModelFactory) -> None:
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(prompts(1), max_new_tokens=3, do_sample=False, assistant_model=small_model("gated_deltanet"))


def test_a_dynamic_cache_is_refused_by_forward(model: HybridForCausalLM) -> None:
    with pytest.raises(ValueError, match="got a DynamicCache"):
        model(prompts(1), past_key_values=DynamicCache())
