"""The other implementations compute what this library computes; otherwise their times would mean nothing."""

import dataclasses

import pytest
import torch

from holdfast.bench import peers
from holdfast.bench.ops import BUDGET, CAUSAL, UNCAPPED, AttentionSize, attention_work, random_inputs, visible_until
from holdfast.ops.gated_delta_rule import gated_delta_rule
from holdfast.ops.norms import l2_norm
from holdfast.ops.retained_attention import FOREVER, retained_attention

CPU = torch.device("cpu")
SIZE = AttentionSize(
    batch=2, tokens=70, heads=4, kv_heads=2, head_dim=16, window=9, kept=6, device="cpu", dtype=torch.float32, seed=3
)


def test_causal_attention_is_retained_attention_that_loses_nothing() -> None:
    inputs = random_inputs(SIZE)
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    expected = retained_attention(inputs.q, inputs.k, inputs.v, None, None)
    torch.testing.assert_close(peers.causal_attention(q, k, v).transpose(1, 2), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", [BUDGET, UNCAPPED])
def test_flex_attention_gets_the_same_mask(name: str) -> None:
    inputs = random_inputs(SIZE)
    until = visible_until(name, inputs.scores, SIZE)
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    out = peers.flex_attention(q, k, v, until, compiled=False).transpose(1, 2)
    expected = retained_attention(inputs.q, inputs.k, inputs.v, until, SIZE.window)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, retained_attention(inputs.q, inputs.k, inputs.v, None, None), atol=1e-3)


def test_transformers_delta_rule_is_the_same() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 70, 3, 16) for _ in range(3))
    q, k = l2_norm(q), l2_norm(k)
    g, beta = -torch.rand(2, 70, 3), torch.rand(2, 70, 3)
    found = peers.delta_rule_peers(CPU)
    assert list(found) == ["transformers"]
    out = found["transformers"](q, k, v, g, beta)
    torch.testing.assert_close(out, gated_delta_rule(q, k, v, g, beta)[0], atol=1e-5, rtol=1e-4)


def test_pairs_are_those_that_attention_reads() -> None:
    inputs = random_inputs(SIZE)
    query = torch.arange(SIZE.tokens)[:, None]
    key = torch.arange(SIZE.tokens)
    for name in (BUDGET, UNCAPPED):
        until = visible_until(name, inputs.scores, SIZE)[:, None]  # [B, 1, T, Hkv]
        seen = (key <= query)[None, ..., None] & (query[None, ..., None] <= until)
        assert inputs.pairs(name) == seen.sum() * 2
        assert inputs.pairs(name) < inputs.pairs(CAUSAL) == 2 * 4 * 70 * 71 // 2
    alive = (visible_until(BUDGET, inputs.scores, SIZE) > SIZE.tokens - 1 + SIZE.window).sum(1)
    assert (alive == SIZE.kept).all()


def test_a_store_that_holds_everything_keeps_everything() -> None:
    large = dataclasses.replace(SIZE, kept=SIZE.tokens)
    for name in (BUDGET, UNCAPPED):
        scores = random_inputs(large).scores
        scores = scores.abs() if name == BUDGET else scores
        assert (visible_until(name, scores, large) == FOREVER).all()


@pytest.mark.parametrize("name", [BUDGET, UNCAPPED, CAUSAL])
def test_the_work_gives_outputs_and_gradients(name: str) -> None:
    """Of the library's and of SDPA, against the reference, whatever the layout that each of them likes."""
    inputs = random_inputs(SIZE)
    until = None if name == CAUSAL else visible_until(name, inputs.scores, SIZE)
    q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out = retained_attention(q, k, v, until, None, backend="reference")
    gradients = torch.autograd.grad(out, (q, k, v), inputs.grad)

    def by_time(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2) if name == CAUSAL else x

    torch.testing.assert_close(by_time(attention_work(name, inputs, backward=False)()), out, atol=1e-5, rtol=1e-4)
    for found, expected in zip(attention_work(name, inputs, backward=True)(), gradients, strict=True):
        torch.testing.assert_close(by_time(found), expected, atol=1e-5, rtol=1e-4)
