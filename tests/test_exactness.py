"""However the tokens arrive, the logits are the same: one pass, chunks, token by token, padded, packed, batched.

Tolerance (fp32): 1e-4 on logits of standard deviation 0.9. Budgets are small, so eviction always binds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast import HybridCache, HybridForCausalLM
from passes import STACKS, ModelFactory, assert_equal_logits, in_chunks, one_pass, random_ids

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Case:
    """A model to be made: hypothesis shows it where a test fails."""

    stack: tuple[str, ...]
    options: dict[str, dict[str, Any]]
    seed: int

    def build(self, small_model: ModelFactory, **settings: Any) -> HybridForCausalLM:
        return small_model(*self.stack, seed=self.seed, options=self.options, **settings)


@st.composite
def cases(draw: st.DrawFn, stacks: list[tuple[str, ...]] = STACKS) -> Case:
    """Any stack with any small window, budget, sinks, scorer, groups of heads, and Gated DeltaNet variant."""
    sizes, dilations = draw(st.sampled_from([((1,), (1,)), ((3,), (1,)), ((5, 3), (1, 2)), ((3, 3, 3), (2, 2, 2))]))
    causal = draw(st.booleans())
    reach = 0 if causal else sum((n - 1) * step for n, step in zip(sizes, dilations, strict=True)) // 2
    budget = draw(st.integers(1, 7))
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    key_heads, value_heads = draw(st.sampled_from([(2, None), (2, 4), (1, 3)]))
    options: dict[str, dict[str, Any]] = {
        "learned_eviction": {
            "window": draw(st.integers(max(0, reach - 1), 9)),
            "budget": budget,
            "sinks": draw(st.integers(0, min(budget, 3))),
            "conv_size": sizes,
            "conv_dilation": dilations,
            "num_kv_heads": kv_heads,
            "scorer_sharing": draw(st.sampled_from(["head", "layer", "all"])),
            "scorer_causal": causal,
        },
        "sliding_attention": {"window": draw(st.integers(1, 9)), "num_kv_heads": kv_heads, "qkv_bias": True},
        "full_attention": {"num_kv_heads": kv_heads},
        "native_sparse_attention": {
            "num_kv_heads": kv_heads,
            "block_size": draw(st.integers(1, 9)),
            "num_blocks": draw(st.integers(1, 6)),
            "window": draw(st.integers(1, 9)),
        },
        "gated_deltanet": {
            "num_heads": key_heads,
            "num_v_heads": value_heads,
            "expand_v": draw(st.sampled_from([1.0, 2.0, 0.5])),
            "allow_neg_eigval": draw(st.booleans()),
            "conv_size": draw(st.sampled_from([2, 4])),
        },
    }
    return Case(draw(st.sampled_from(stacks)), options, draw(st.integers(0, 99)))


def assume_clear_decisions(model: HybridForCausalLM, ids: Tensor) -> None:
    """Leave out the rare model in which rounding decides: two scores, or a score and 0, or two blocks' importance are
    so near."""
    with torch.no_grad():
        output = model(ids, use_cache=False, output_selection=True)
        if output.selection:
            embedded = model.get_input_embeddings()(ids)
            nudged = embedded * (1 + 3e-6 * torch.randn(embedded.shape, generator=torch.Generator().manual_seed(1)))
            others = model(inputs_embeds=nudged, use_cache=False, output_selection=True).selection
            assume(all(torch.equal(one, other) for one, other in zip(output.selection, others, strict=True)))
    retention = output.retention
    for scores in () if retention is None else retention.scores:
        with_zero = torch.cat([scores, torch.zeros_like(scores[:, :1])], dim=1)
        assume(with_zero.sort(dim=1).values.diff(dim=1).min() > 2e-6)


def gradients(model: HybridForCausalLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within 1e-4 of the largest entry of each."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-6, name


@given(
    case=cases(), length=st.integers(1, 40), lengths=st.lists(st.integers(1, 25), max_size=6), batch=st.integers(1, 2)
)
@settings(max_examples=40)
def test_chunks_and_single_tokens_equal_one_pass(
    small_model: ModelFactory, case: Case, length: int, lengths: list[int], batch: int
) -> None:
    model = case.build(small_model)
    ids = random_ids(batch, length, case.seed)
    assume_clear_decisions(model, ids)
    expected = one_pass(model, ids)
    assert_equal_logits(in_chunks(model, ids, lengths), expected)
    assert_equal_logits(in_chunks(model, ids, [1] * length), expected)


@given(case=cases(), data=st.data())
@settings(max_examples=60)
def test_pads_anywhere_in_any_call_change_nothing(small_model: ModelFactory, case: Case, data: st.DataObject) -> None:
    """Rows of unequal length, their tokens spread over several calls with pads left, right or between."""
    model = case.build(small_model)
    batch = data.draw(st.integers(1, 3), "rows")
    widths = data.draw(st.lists(st.sampled_from([1, 2, 5, 9, 17]), min_size=1, max_size=4), "columns of each call")
    mask = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.booleans(), min_size=sum(widths), max_size=sum(widths)), min_size=batch, max_size=batch
            )
        )
    )
    assume(mask.any())
    ids = random_ids(batch, sum(widths), case.seed)
    given_mask = mask.long()
    cache, pieces, start = HybridCache(model.config), [], 0
    with torch.no_grad():
        whole = model(ids, attention_mask=given_mask, use_cache=False).logits
        for width in widths:
            columns = slice(start, start + width)
            start += width
            # A mask over everything so far, or over this call only: both are understood.
            call_mask = given_mask[:, : columns.stop] if start % 2 else given_mask[:, columns]
            pieces.append(model(ids[:, columns], attention_mask=call_mask, past_key_values=cache).logits)
    assert whole.isfinite().all()
    called = torch.cat(pieces, dim=1)
    assert called.isfinite().all()
    assert cache.seen is not None
    assert cache.seen.tolist() == mask.sum(dim=1).tolist()
    for row in range(batch):
        real = mask[row]
        if real.any():
            assume_clear_decisions(model, ids[row : row + 1, real])
            alone = one_pass(model, ids[row : row + 1, real])[0]
            assert_equal_logits(whole[row, real], alone)
            assert_equal_logits(called[row, real], alone)


@pytest.mark.parametrize("stack", STACKS[:6], ids="+".join)
@pytest.mark.parametrize("pads", [1, 7, 30])
def test_left_padded_second_chunk_of_a_batch_of_one(
    small_model: ModelFactory, stack: tuple[str, ...], pads: int
) -> None:
    """Continued chat: final scores of the past must survive however many pads stand before the new tokens."""
    model = small_model(*stack)
    ids = random_ids(1, 40)
    expected = one_pass(model, ids)
    cache = HybridCache(model.config)
    padded = torch.cat([torch.zeros(1, pads, dtype=torch.long), ids[:, 22:]], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :pads] = 0
    with torch.no_grad():
        model(ids[:, :22], past_key_values=cache)
        logits = model(padded, attention_mask=mask, past_key_values=cache).logits
    assert_equal_logits(logits[:, pads:], expected[:, 22:])


@pytest.mark.parametrize("stack", STACKS[:6], ids="+".join)
def test_left_pads_do_not_take_the_places_of_sinks(small_model: ModelFactory, stack: tuple[str, ...]) -> None:
    model = small_model(*stack)
    ids = random_ids(1, 40)
    padded, mask = torch.cat([torch.zeros(1, 10, dtype=torch.long), ids], dim=1), torch.ones(1, 50)
    mask[:, :10] = 0
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, use_cache=False).logits
    assert_equal_logits(logits[:, 10:], one_pass(model, ids))


def separately(model: HybridForCausalLM, documents: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of documents given one at a time, and both losses averaged over all their tokens."""
    outputs = [model(document, labels=document, use_cache=False) for document in documents]
    targets = [out.logits.shape[1] - 1 for out in outputs]
    counted = [int(out.retention.penalised.sum()) if out.retention is not None else 0 for out in outputs]
    lm_loss, retention_loss = torch.zeros(()), torch.zeros(())
    for out, target, count in zip(outputs, targets, counted, strict=True):
        lm_loss = lm_loss + out.lm_loss * target / max(sum(targets), 1)
        retention_loss = retention_loss + out.retention_loss * count / max(sum(counted), 1)
    return torch.cat([out.logits for out in outputs], dim=1), lm_loss, retention_loss


@given(case=cases(), lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5), training=st.booleans())
@settings(max_examples=40)
def test_packed_documents_equal_separate_ones(
    small_model: ModelFactory, case: Case, lengths: list[int], training: bool
) -> None:
    assume(sum(lengths) > 0)
    model = case.build(small_model).train(training)
    if model.model.has_scorers:
        model.model.l1_lambda.uniform_(0.5, 2.0)
    ids = random_ids(1, sum(lengths), case.seed)
    documents = [document for document in ids.split(lengths, dim=1) if document.shape[1]]
    for document in documents:
        assume_clear_decisions(model, document)
    packed = model(ids, labels=ids, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    packed.loss.backward()
    found = gradients(model)
    model.zero_grad()
    logits, lm_loss, retention_loss = separately(model, documents)
    (lm_loss + retention_loss).backward()
    assert_equal_logits(packed.logits, logits)
    torch.testing.assert_close(packed.lm_loss, lm_loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed.retention_loss, retention_loss, atol=1e-5, rtol=0)
    assert_equal_gradients(found, gradients(model))


@given(case=cases(), training=st.booleans(), pads=st.integers(1, 12))
@settings(max_examples=25)
def test_padded_batches_have_the_losses_and_gradients_of_their_rows(
    small_model: ModelFactory, case: Case, training: bool, pads: int
) -> None:
    """Left or right padding; the batch's losses are the averages over its rows' tokens."""
    model = case.build(small_model).train(training)
    if model.model.has_scorers:
        model.model.l1_lambda.uniform_(0.5, 2.0)
    length, short = 24, 24 - pads
    ids = random_ids(2, length, case.seed)
    mask = torch.ones(2, length, dtype=torch.long)
    hidden = slice(0, pads) if case.seed % 2 else slice(short, length)
    mask[1, hidden] = 0
    kept = ids[1:, pads:] if case.seed % 2 else ids[1:, :short]
    assume_clear_decisions(model, ids[:1])
    assume_clear_decisions(model, kept)
    together = model(ids, attention_mask=mask, labels=ids, use_cache=False)
    together.loss.backward()
    found = gradients(model)
    model.zero_grad()
    _, lm_loss, retention_loss = separately(model, [ids[:1], kept])
    (lm_loss + retention_loss).backward()
    torch.testing.assert_close(together.lm_loss, lm_loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.retention_loss, retention_loss, atol=1e-5, rtol=0)
    assert_equal_gradients(found, gradients(model))


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_a_pass_that_fills_a_cache_has_the_gradients_of_one_that_does_not(
    small_model: ModelFactory, stack: tuple[str, ...]
) -> None:
    model, ids = small_model(*stack), random_ids(2, 30)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model(ids, labels=ids, use_cache=True).loss.backward()
    assert_equal_gradients(gradients(model), expected)


@given(case=cases(), first=st.integers(1, 30), branch=st.integers(1, 12))
@settings(max_examples=30)
def test_snapshot_and_reset_undo_everything(small_model: ModelFactory, case: Case, first: int, branch: int) -> None:
    model = case.build(small_model)
    ids, other = random_ids(2, first + 12, case.seed), random_ids(2, branch, case.seed + 1)
    cache = HybridCache(model.config)
    in_chunks(model, ids[:, :first], [], cache)
    snapshot = cache.snapshot()
    size = cache.nbytes
    expected = in_chunks(model, ids[:, first:], [5, 1, 1], cache)
    for _ in range(2):  # a snapshot can be used again
        cache.restore(snapshot)
        assert cache.nbytes == size
        in_chunks(model, other, [], cache)
        cache.restore(snapshot)
        assert torch.equal(in_chunks(model, ids[:, first:], [5, 1, 1], cache), expected)
    cache.reset()
    assert cache.get_seq_length() == 0
    fresh = in_chunks(model, ids, [3, 1])
    assert torch.equal(in_chunks(model, ids, [3, 1], cache), fresh)


@given(case=cases(), rows=st.lists(st.integers(0, 2), min_size=1, max_size=5), first=st.integers(1, 30))
@settings(max_examples=30)
def test_selected_and_repeated_rows_go_on_as_they_would_alone(
    small_model: ModelFactory, case: Case, rows: list[int], first: int
) -> None:
    model = case.build(small_model)
    ids = random_ids(3, first + 8, case.seed)
    assume_clear_decisions(model, ids)
    expected = one_pass(model, ids)[:, first:]
    index = torch.tensor(rows)
    for change in ("select_rows", "reorder_cache", "batch_select_indices"):
        cache = HybridCache(model.config)
        in_chunks(model, ids[:, :first], [], cache)
        getattr(cache, change)(index)
        assert_equal_logits(in_chunks(model, ids[index, first:], [1, 1], cache), expected[index])
    cache = HybridCache(model.config)
    in_chunks(model, ids[:, :first], [], cache)
    cache.batch_repeat_interleave(2)
    twice = torch.arange(3).repeat_interleave(2)
    assert_equal_logits(in_chunks(model, ids[twice, first:], [1, 4], cache), expected[twice])
