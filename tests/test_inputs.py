"""Inputs that no model can read are refused by name; packed documents that are empty do not count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from holdfast import HybridForCausalLM
from holdfast.training.callbacks import RetentionCallback

ModelFactory = Callable[..., HybridForCausalLM]


@pytest.mark.parametrize("mixer", ["learned_eviction", "gated_deltanet"])
@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
def test_an_empty_input(small_model: ModelFactory, mixer: str, shape: tuple[int, int]) -> None:
    model = small_model(mixer)
    with pytest.raises(ValueError, match="input_ids is empty"):
        model(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="inputs_embeds is empty"):
        model(inputs_embeds=torch.zeros(*shape, 32))


def test_inputs_of_another_shape_or_type(small_model: ModelFactory) -> None:
    model = small_model()
    for ids in (torch.zeros(5, dtype=torch.long), torch.zeros(1, 5)):
        with pytest.raises(ValueError, match=r"input_ids must be integers \[B, T\]"):
            model(ids)
    for embeddings in (torch.zeros(2, 5), torch.zeros(2, 5, 31)):
        with pytest.raises(ValueError, match=r"inputs_embeds must be \[B, T, 32\]"):
            model(inputs_embeds=embeddings)


@pytest.mark.parametrize("shape", [(2, 6), (1, 5), (5,), (2, 5, 1)])
def test_labels_of_another_shape(small_model: ModelFactory, shape: tuple[int, ...]) -> None:
    model = small_model()
    labels = torch.zeros(shape, dtype=torch.long)
    for inputs in ({"input_ids": torch.zeros(2, 5, dtype=torch.long)}, {"inputs_embeds": torch.zeros(2, 5, 32)}):
        with pytest.raises(ValueError, match=r"labels must have the shape of the input, \[2, 5\]"):
            model(**inputs, labels=labels)


def test_no_cache_in_silence(small_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_model(), torch.zeros(1, 5, dtype=torch.long)
    offsets, warnings = torch.tensor([0, 3, 5]), []
    assert model(ids, cu_seqlens=offsets).past_key_values is None
    with pytest.raises(ValueError, match=r"cu_seqlens.*leave use_cache out"):
        model(ids, cu_seqlens=offsets, use_cache=True)
    monkeypatch.setattr("holdfast.modeling.logger.warning_once", warnings.append)
    model.gradient_checkpointing_enable()
    model.train()
    assert model(ids).past_key_values is None
    assert not warnings
    assert model(ids, use_cache=True).past_key_values is None
    assert "gradient checkpointing" in warnings[0]


def test_empty_documents_are_not_counted(small_model: ModelFactory) -> None:
    model, ids = small_model().train(), torch.arange(40).view(1, -1)
    kept, positions = [], []
    for offsets in ([0, 20, 33, 40], [0, 0, 20, 33, 33, 40, 40]):
        callback, packed = RetentionCallback(), {"cu_seqlens": torch.tensor(offsets)}
        output = model(ids, **packed)
        callback._record(model, (ids,), packed, output)
        kept.append(output.retention.kept)
        positions.append(callback._positions.pop())
    assert kept[0].sum() > 0
    assert torch.equal(*kept)
    assert torch.equal(*positions)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_lambda_stays_fp32(small_model: ModelFactory, dtype: torch.dtype) -> None:
    model = small_model()
    model.model.l1_lambda.fill_(1e-9)
    expected = model.model.l1_lambda.clone()
    for converted in (model.to(dtype), model.half()):
        assert torch.equal(converted.model.l1_lambda, expected)
        assert converted.model.l1_lambda.dtype == converted.model.num_kept.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.float16
    assert model.to("meta").model.l1_lambda.device.type == "meta"
