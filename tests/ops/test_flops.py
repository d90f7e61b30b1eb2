"""What FLOP counters see of operators that they cannot look into."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from gated_delta_inputs import make_inputs
from native_sparse_inputs import tensors as sparse_tensors
from retained_attention_inputs import tensors, visibility
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from holdfast.ops.gated_delta_rule import gated_delta_rule, native
from holdfast.ops.gated_delta_rule.chunked import _scan
from holdfast.ops.native_sparse_attention import native_sparse_attention
from holdfast.ops.native_sparse_attention.blocked import sliding_attention
from holdfast.ops.retained_attention import retained_attention

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="Triton's interpreter is needed"
)


def count(op: Callable[..., Any], inputs: Any) -> tuple[int, int]:
    """Operations of the forward and of the backward pass."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with FlopCounterMode(display=False) as counter:
        out = op(*leaves)
        out = out if isinstance(out, Tensor) else out[0]
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.skipif(not native.is_available(), reason="there is no C++ compiler")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"K": 64, "V": 24}, {"K": 7, "V": 100, "HK": 1, "HV": 3}], ids=str)
def test_the_delta_rule_in_cpp_counts_as_in_pytorch(sizes: dict[str, int], packed: bool) -> None:
    given = make_inputs(131, seed=0, dtype=torch.float32, **sizes)
    options: dict[str, Any] = {}
    inputs = [given[name] for name in ("q", "k", "v", "g", "beta")]
    if packed:
        inputs, options = [x[:1] for x in inputs], {"cu_seqlens": torch.tensor([0, 50, 131])}
    found, expected = (
        count(partial(gated_delta_rule, backend=backend, **options), inputs) for backend in ("native", "chunked")
    )
    assert found == expected
    assert min(found) > 0


def test_the_reference_of_the_delta_rule_counts_token_by_token() -> None:
    given = make_inputs(131, seed=0, dtype=torch.float32)
    inputs = [given[name] for name in ("q", "k", "v", "g", "beta")]
    found, in_chunks = (
        count(partial(gated_delta_rule, backend=backend), inputs)[0] for backend in ("reference", "chunked")
    )
    assert 0 < found < in_chunks


def test_the_passage_from_state_to_state_counts_its_products() -> None:
    N, M, C, K, V = 3, 2, 8, 5, 7
    shapes = (N, M, C, V), (N, M, C, K), (N, M, C, K), (N, M, C, C), (N, M, 1, 1), (M, K, V)

    def in_pytorch(
        v: Tensor, k_entry: Tensor, k_exit: Tensor, solution: Tensor, across: Tensor, state: Tensor
    ) -> Tensor:
        out = []
        for n in range(N):
            out.append(solution[n] @ (v[n] - k_entry[n] @ state))
            state = state * across[n] + k_exit[n].mT @ out[-1]
        return torch.stack([*(x.sum() for x in out), state.sum()])

    def as_operator(*inputs: Tensor) -> Tensor:
        corrections, _, final_state, _ = _scan(*inputs)
        return corrections.sum() + final_state.sum()

    inputs = [torch.randn(shape) for shape in shapes]
    assert count(as_operator, inputs) == count(in_pytorch, inputs)


@pytest.mark.parametrize("queries", [40, 70])
@pytest.mark.parametrize(
    ("kind", "window"), [("plain", 9), ("nothing", 9), ("some", 9), ("budget", 5), ("documents", None), ("random", 3)]
)
def test_attention_counts_the_pairs_that_are_seen(kind: str, window: int | None, queries: int) -> None:
    """Of what PyTorch counts for all pairs of its own attention, the share that is seen."""
    q, k, v = tensors(70, queries, heads=4, value_dim=24, dtype=torch.float32)
    until = visibility(kind, k, window)
    key, query = torch.arange(70), torch.arange(70 - queries, 70)[:, None]
    last = (key + (window or 0))[None, :, None] if until is None else until
    last = last.expand(2, 70, 2).transpose(1, 2).unsqueeze(2)  # [B, Hkv, 1, Tk]
    seen, pairs = int(((key <= query) & (query <= last)).sum()), 2 * 2 * queries * 70
    shapes = [x.transpose(1, 2).shape for x in (q, k, v)]
    out_shape = (2, 4, queries, 24)
    whole = sdpa_flop_count(*shapes), sdpa_backward_flop_count(out_shape, *shapes)
    found = count(lambda *x: retained_attention(*x, until, window, backend="blocked"), (q, k, v))
    assert found == tuple(number * seen // pairs for number in whole)


def test_the_reference_of_attention_counts_all_pairs() -> None:
    q, k, v = tensors(70, 40, heads=4, value_dim=24, dtype=torch.float32)
    found, _ = count(lambda *x: retained_attention(*x, None, 9, backend="reference"), (q, k, v))
    assert found == sdpa_flop_count(*(x.transpose(1, 2).shape for x in (q, k, v)))


@needs_triton
@pytest.mark.parametrize(("kind", "window"), [("plain", 9), ("budget", 5), ("documents", None)])
def test_attention_in_triton_counts_as_in_pytorch(kind: str, window: int | None) -> None:
    inputs = tensors(40, heads=2, kv_heads=1, dtype=torch.float32)
    until = visibility(kind, inputs[1], window)
    found, expected = (
        count(lambda *x, name=name: retained_attention(*x, until, window, backend=name), inputs)
        for name in ("triton", "blocked")
    )
    assert found == expected
    assert min(found) > 0


def sparse(backend: str, **options: Any) -> Callable[..., Any]:
    return partial(native_sparse_attention, block_size=8, num_blocks=3, window=9, backend=backend, **options)


@pytest.mark.parametrize("queries", [50, 5])
def test_sparse_attention_counts_the_pairs_that_are_seen(queries: int) -> None:
    inputs = sparse_tensors(50, queries, dtype=torch.float32)
    (batch, _, heads, dim), kv_heads, value_dim = inputs[0].shape, inputs[1].shape[2], inputs[2].shape[3]
    lengths = torch.tensor([50, 33])[:batch]
    found = count(sparse("blocked", lengths=lengths), inputs)
    with torch.no_grad():
        _, blocks = sparse("blocked", lengths=lengths)(*inputs)
    pairs = 0
    for row, length in enumerate(lengths.tolist()):
        for query in range(queries):
            at = length - queries + query
            if at < 0:
                continue
            chosen = {block * 8 + key for block in range(50) for key in range(8) if block * 8 + key <= at}
            for head in range(kv_heads):
                read = [key for key in chosen if key // 8 in blocks[row, query, head].tolist()]
                pairs += (heads // kv_heads) * ((at + 1) // 8 + len(read))
    expected = 2 * pairs * (dim + value_dim), 2 * pairs * (3 * dim + 2 * value_dim)
    window = partial(sliding_attention, window=9, lengths=lengths, visible_until=None, scale=1.0, dtype=torch.float32)
    sliding = count(window, inputs[:3])
    assert found == tuple(one + other for one, other in zip(expected, sliding, strict=True))


@needs_triton
@pytest.mark.parametrize("options", [{}, {"cu_seqlens": torch.tensor([0, 13, 40])}], ids=["one", "packed"])
def test_sparse_attention_in_triton_counts_as_in_pytorch(options: dict[str, Any]) -> None:
    inputs = sparse_tensors(40, batch=1, heads=2, kv_heads=1, dtype=torch.float32)
    found, expected = (count(sparse(name, **options), inputs) for name in ("triton", "blocked"))
    assert found == expected
    assert min(found) > 0


def test_without_values_all_pairs_in_order_count() -> None:
    q, k, v = tensors(40, dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x.detach()) for x in (q, k, v)]
        until = mode.from_tensor(torch.full((2, 40, 2), 3))
        with FlopCounterMode(display=False) as counter:
            retained_attention(*fake, until, 4)
    assert counter.get_total_flops() == 2 * (2 * 2 * 40 * 41 // 2) * 32
