"""Inputs that no model can read are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from holdfast import HybridForCausalLM

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
