"""The other implementations compute what this library computes; otherwise their times would mean nothing."""

import dataclasses

import pytest
import torch

from holdfast.bench import peers
from holdfast.bench.ops import (
    BUDGET,
    CAUSAL,
    CAUSAL_BY_TIME,
    GIVEN,
    UNCAPPED,
    AttentionSize,
    attention_work,
    random_inputs,
    visible_until,
)
from holdfast.bench.sparse import SPARSE, SparseSize, pairs_read, sparse_work
from holdfast.ops.gated_delta_rule import gated_delta_rule
from holdfast.ops.native_sparse_attention import native_sparse_attention
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


@pytest.mark.parametrize("name", [BUDGET, UNCAPPED, GIVEN, CAUSAL, CAUSAL_BY_TIME])
def test_the_work_gives_outputs_and_gradients(name: str) -> None:
    """Of the library's and of SDPA, against the reference, whatever the layout that each of them likes."""
    inputs = random_inputs(SIZE)
    until = None if name in (CAUSAL, CAUSAL_BY_TIME) else visible_until(name, inputs.scores, SIZE)
    q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out = retained_attention(q, k, v, until, None, backend="reference")
    gradients = torch.autograd.grad(out, (q, k, v), inputs.grad)

    def by_time(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2) if name == CAUSAL else x

    torch.testing.assert_close(by_time(attention_work(name, inputs, backward=False)()), out, atol=1e-5, rtol=1e-4)
    for found, expected in zip(attention_work(name, inputs, backward=True)(), gradients, strict=True):
        torch.testing.assert_close(by_time(found), expected, atol=1e-5, rtol=1e-4)


def test_pairs_of_sparse_attention_are_those_that_its_blocks_say() -> None:
    size = SparseSize(
        batch=2, tokens=45, heads=4, kv_heads=2, head_dim=8, block_size=6, num_blocks=4, window=7, device="cpu",
        dtype=torch.float64, seed=1,
    )  # fmt: skip
    q, k, v, _, gates = size.inputs()
    _, blocks = native_sparse_attention(q, k, v, gates, block_size=6, num_blocks=4, window=7)
    query, key = torch.arange(45)[:, None], torch.arange(45)
    chosen = (blocks[..., None] == key // 6).any(-2) & (key <= query)[None, :, None]  # [B, T, Hkv, T]
    means = ((torch.arange(7) + 1) * 6 - 1 <= query).sum()
    recent = ((key <= query) & (key > query - 7)).sum()
    assert pairs_read(SPARSE, size) == 2 * chosen.sum() + 8 * (means + recent)
    assert pairs_read(CAUSAL, size) == 8 * 45 * 46 // 2


@pytest.mark.parametrize("backward", [False, True])
def test_the_work_of_sparse_attention(backward: bool) -> None:
    size = SparseSize(
        batch=1, tokens=20, heads=4, kv_heads=2, head_dim=8, block_size=5, num_blocks=4, window=20, device="cpu",
        dtype=torch.float32, seed=1,
    )  # fmt: skip
    q, k, v, grad, _ = size.inputs()
    full = sparse_work(CAUSAL, size, backward)()
    shapes = [tuple(x.shape) for x in (q, k, v)]
    if backward:
        assert [tuple(x.transpose(1, 2).shape) for x in full] == shapes
        assert [tuple(x.shape) for x in sparse_work(SPARSE, size, backward)()] == [*shapes, (1, 20, 4, 3)]
    else:
        torch.testing.assert_close(full.transpose(1, 2), retained_attention(q, k, v, None, None))
        assert sparse_work(SPARSE, size, backward)().shape == grad.shape
