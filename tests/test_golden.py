"""The numbers of the published implementation, within 1e-4 (logits), 1e-5 (losses) and 1e-4 of the largest entry
(gradients). `golden/README.md` says what the files hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from holdfast import HybridCache, HybridCausalLMOutput, HybridConfig, HybridForCausalLM

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["gdn", "gdn_full", "gdn_swa", "lte_mha", "lte_stream", "nsa"]
LTE_NAMES = ["lte_mha", "lte_stream"]
LTE_LAYERS = (1, 3)


def load(name: str) -> tuple[HybridForCausalLM, dict[str, Tensor]]:
    """The published model, in evaluation mode, and its golden numbers."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    model = HybridForCausalLM(HybridConfig.from_dict(json.loads((GOLDEN / f"{name}.config.json").read_text())))
    state = {key.removeprefix("state."): tensor for key, tensor in tensors.items() if key.startswith("state.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"]  # tied
    assert not unexpected
    return model.eval(), tensors


def train_pass(model: HybridForCausalLM, tensors: dict[str, Tensor]) -> HybridCausalLMOutput:
    if "train.l1_lambda" in tensors:
        model.model.l1_lambda.copy_(tensors["train.l1_lambda"])
    return model.train()(tensors["input_ids"], labels=tensors["input_ids"])


def streamed_logits(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors["cache.prefill_logits"], tensors["cache.decode_logits"]], dim=1)


def assert_close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_gives_the_logits_of_prefill_and_decoding(name: str) -> None:
    model, tensors = load(name)
    with torch.no_grad():
        logits = model(tensors["input_ids"], use_cache=False).logits
    assert_close(logits, streamed_logits(tensors), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decoding(name: str) -> None:
    model, tensors = load(name)
    ids, prompt = tensors["input_ids"], int(tensors["cache.prefill_len"])
    cache = HybridCache(model.config)
    with torch.no_grad():
        logits = [model(ids[:, :prompt], past_key_values=cache).logits]
        logits += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, ids.shape[1])]
    assert_close(torch.cat(logits, dim=1), streamed_logits(tensors), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients(name: str) -> None:
    model, tensors = load(name)
    out = train_pass(model, tensors)
    assert_close(out.lm_loss, tensors["train.loss"], 1e-5)
    assert_close(out.retention_loss, tensors.get("train.l1_loss", torch.zeros(())), 1e-5)
    out.loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {key.removeprefix("grad."): value for key, value in tensors.items() if key.startswith("grad.")}
    assert len(gradients) > 20
    for key, expected in gradients.items():
        found = parameters[key].grad
        assert found is not None
        found = found if found.shape == expected.shape else found[::8]
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), key


@pytest.mark.parametrize("name", LTE_NAMES)
def test_scores_and_what_is_kept(name: str) -> None:
    model, tensors = load(name)
    retention = train_pass(model, tensors).retention
    reach, sinks = 6, 4
    assert retention.penalised[:, :-reach].all()
    assert not retention.penalised[:, -reach:].any()
    for row, layer in enumerate(LTE_LAYERS):
        scores = retention.scores[row][:, :-reach]
        assert_close(scores, tensors[f"train.score.{layer}"], 1e-4)
        selected = scores > 0
        selected[:, :sinks] = True
        assert torch.equal(selected, tensors[f"train.selected.{layer}"])
        share = retention.kept[row] / scores.shape[1]
        assert_close(share, tensors[f"train.sparsity.{layer}"].mean(dim=0), 1e-6)


def test_the_budget_of_lte_stream_binds() -> None:
    """Otherwise agreement with its decoding would prove little: without the budget the logits are others."""
    model, tensors = load("lte_stream")
    with torch.no_grad():
        unlimited = model.train()(tensors["input_ids"]).logits
    assert (unlimited - streamed_logits(tensors)).abs().max() > 0.05
