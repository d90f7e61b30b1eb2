"""Gated DeltaNet token by token, as specification §3.1 writes it, in the variants that no golden file covers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from holdfast.mixers import GatedDeltaNet
from holdfast.mixers.layout import plain_layout


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Causal depthwise convolution of x [T, C], then SiLU."""
    width, (length, channels) = weight.shape[2], x.shape
    padded = torch.cat([x.new_zeros(width - 1, channels), x])
    return F.silu(sum(padded[tap : tap + length] * weight[:, 0, tap] for tap in range(width)))


def by_definition(layer: GatedDeltaNet, hidden: Tensor) -> Tensor:
    """hidden [T, hidden_size] → the same shape, one head and one token at a time."""
    options = layer.options
    q, k, v = (
        convolved(getattr(layer, f"{n}_proj")(hidden), getattr(layer, f"{n}_conv1d").weight).unflatten(1, (heads, -1))
        for n, heads in (("q", options.num_heads), ("k", options.num_heads), ("v", options.value_heads))
    )
    beta = torch.sigmoid(layer.b_proj(hidden)) * (2 if options.allow_neg_eigval else 1)
    decay = torch.exp(-layer.A_log.exp() * F.softplus(layer.a_proj(hidden) + layer.dt_bias))
    gate = F.silu(layer.g_proj(hidden)).unflatten(1, (options.value_heads, -1))
    outputs = []
    for head in range(options.value_heads):
        key_head = head // (options.value_heads // options.num_heads)
        state, rows = hidden.new_zeros(options.head_dim, options.value_dim), []
        for t in range(len(hidden)):
            query, key = (x[t, key_head] / (x[t, key_head].square().sum() + 1e-6).sqrt() for x in (q, k))
            state = decay[t, head] * state
            state = state + torch.outer(key, beta[t, head] * (v[t, head] - key @ state))
            out = query @ state / math.sqrt(options.head_dim)
            normed = out / (out.square().mean() + layer.norm_eps).sqrt() * layer.o_norm.weight
            rows.append(normed * gate[t, head])
        outputs.append(torch.stack(rows))
    return layer.o_proj(torch.cat(outputs, dim=1))


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(("value_heads", "expand"), [(None, 1.0), (4, 2.0), (6, 0.5)])
def test_by_definition(negative: bool, value_heads: int | None, expand: float) -> None:
    torch.manual_seed(0)
    options = GatedDeltaNet.Options.from_mapping(
        "gated_deltanet",
        {"num_heads": 2, "head_dim": 8, "num_v_heads": value_heads, "expand_v": expand, "allow_neg_eigval": negative},
    )
    layer = GatedDeltaNet(16, 1e-6, options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    hidden = torch.randn(1, 19, 16)
    found = layer(hidden, plain_layout(1, 19)).hidden[0]
    torch.testing.assert_close(found, by_definition(layer, hidden[0]), atol=1e-5, rtol=1e-4)
