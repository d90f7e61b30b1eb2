"""What the tests of the model share: small models with working scorers, and poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

import triton_interpreter  # noqa: F401  # before anything that imports Triton
from holdfast import HybridConfig, HybridForCausalLM
from holdfast.mixers.scorers import ConvScorer

# No time limits: other work on the machine is no failure.
settings.register_profile(
    "holdfast", deadline=None, derandomize=True, print_blob=False, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("holdfast")

SMALL_OPTIONS: dict[str, dict[str, Any]] = {
    "gated_deltanet": {"num_heads": 2, "head_dim": 8},
    "full_attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "sliding_attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": 5},
    "learned_eviction": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "window": 6,
        "budget": 5,
        "sinks": 2,
        "dropout": 0.0,
    },
    "native_sparse_attention": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "block_size": 3,
        "num_blocks": 4,
        "window": 5,
    },
}
"""Budgets, windows and blocks so small that a few dozen tokens make the budget bind and the choice of blocks matter."""


def _small_config(*mixers: str, options: dict[str, dict[str, Any]] | None = None, **settings: Any) -> HybridConfig:
    """A configuration with hidden size 32; `options` change the settings of `SMALL_OPTIONS`."""
    names = list(mixers) or ["gated_deltanet", "learned_eviction"]
    defaults: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": len(names),
        "initializer_range": 0.15,
        "scale_residual_init": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    changed = {name: SMALL_OPTIONS[name] | (options or {}).get(name, {}) for name in set(names)}
    return HybridConfig(mixers=names, mixer_options=changed, **(defaults | settings))


def _small_model(*mixers: str, seed: int = 0, **settings: Any) -> HybridForCausalLM:
    """A model in evaluation mode whose random scorers keep about half of the pairs."""
    torch.manual_seed(seed)
    model = HybridForCausalLM(_small_config(*mixers, **settings)).eval()
    for module in model.modules():
        if isinstance(module, ConvScorer):
            nn.init.zeros_(module.conv_stack.proj.bias)
            nn.init.normal_(module.conv_stack.proj.weight, std=2.0)
    return model


@pytest.fixture(scope="session")
def small_config() -> Callable[..., HybridConfig]:
    return _small_config


@pytest.fixture(scope="session")
def small_model() -> Callable[..., HybridForCausalLM]:
    return _small_model


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """Fresh memory (torch.empty and its kin) holds NaN, so that whoever reads it unwritten is found out."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
