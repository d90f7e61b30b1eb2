"""Whole models on a GPU, by its kernels, give the numbers that they give on a CPU."""

from __future__ import annotations

import pytest
import torch

from passes import STACKS, ModelFactory, in_chunks, one_pass, random_ids

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICE = "cuda"
CHUNKS = [[], [1] * 60, [31, 1, 1, 4, 8], [17, 2, 9]]


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_passes_chunks_and_steps(small_model: ModelFactory, stack: tuple[str, ...]) -> None:
    model, ids = small_model(*stack), random_ids(2, 60)
    expected = one_pass(model, ids)
    model.to(DEVICE)
    ids = ids.to(DEVICE)
    for found in (one_pass(model, ids), *(in_chunks(model, ids, lengths) for lengths in CHUNKS)):
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_losses_and_gradients(small_model: ModelFactory, stack: tuple[str, ...]) -> None:
    model, ids = small_model(*stack).train(), random_ids(2, 60)
    if model.model.has_scorers:
        model.model.l1_lambda.fill_(1.0)
    results = []
    for device in ("cpu", DEVICE):
        model.to(device).zero_grad()
        ids = ids.to(device)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach().cpu(), grads))
    (expected, theirs), (found, ours) = results
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= 1e-3 * grad.abs().max() + 1e-6, name


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near(small_model: ModelFactory, stack: tuple[str, ...], dtype: torch.dtype) -> None:
    """On average over the logits: rounding may change what single queries see."""
    model, ids = small_model(*stack), random_ids(2, 60)
    expected = one_pass(model, ids)
    model.to(DEVICE, dtype)
    for lengths in CHUNKS:
        found = in_chunks(model, ids.to(DEVICE), lengths).float().cpu()
        assert found.isfinite().all()
        assert (found - expected).abs().mean() <= 0.1 * expected.abs().mean()
