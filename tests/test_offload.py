"""Weights that accelerate keeps on disk and brings in as modules are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from holdfast import HybridCache, HybridForCausalLM
from holdfast.mixers import MIXERS

pytest.importorskip("accelerate")


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_layer_on_disk(mixer: str, small_model: Callable[..., HybridForCausalLM], tmp_path: Path) -> None:
    model = small_model(mixer)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embeddings": "cpu", "lm_head": "cpu", "model.layers.0": "disk", "model.norm": "cpu"}
    places |= {f"model.{name}": "cpu" for name, _ in model.model.named_buffers(recurse=False)}
    offloaded = HybridForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert {weight.device.type for weight in offloaded.model.layers.parameters()} == {"meta"}
    ids, cache = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(0)), HybridCache(model.config)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(offloaded(ids, use_cache=False).logits, expected)
        parts = [offloaded(part, past_key_values=cache).logits for part in (ids[:, :9], ids[:, 9:10], ids[:, 10:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)
