"""retained_attention: every backend against the dense reference, forward and backward."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from retained_attention_inputs import KINDS, assert_like_reference, outputs_and_gradients, tensors, visibility
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from holdfast.ops.retained_attention import BACKENDS, FOREVER, blocked, retained_attention

# Triton has tests of its own: the interpreter takes no float64 and a second a call.
FAST_BACKENDS = [name for name in BACKENDS if name not in ("reference", "triton")]


@pytest.fixture(params=FAST_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "window"), [(1, 0), (63, 8), (65, 0), (257, 16), (257, None), (130, 500)])
def test_lengths_and_windows(length: int, window: int | None, kind: str, backend: str) -> None:
    inputs = tensors(length)
    assert_like_reference(inputs, visibility(kind, inputs[1], window), window, backend)


@pytest.mark.parametrize("kind", ["some", "budget", "random"])
def test_a_thousand_tokens(kind: str, backend: str) -> None:
    inputs = tensors(1000, batch=1, heads=4, dim=64, dtype=torch.float32)
    assert_like_reference(inputs, visibility(kind, inputs[1], 40), 40, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 128), (4, 2, 60), (4, 1, 64), (3, 3, 16), (6, 2, 1)])
def test_heads_dims_and_dtypes(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, backend: str) -> None:
    inputs = tensors(150, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=dim + 3, dtype=dtype)
    assert_like_reference(inputs, visibility("budget", inputs[1], 20), 20, backend)
    assert_like_reference(inputs, None, 20, backend)
    assert_like_reference(inputs, None, None, backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 9, None])
@pytest.mark.parametrize("queries", [1, 2, 16, 17, 100])
def test_queries_behind_cached_keys(queries: int, window: int | None, kind: str, backend: str) -> None:
    inputs = tensors(200, queries, heads=4, dim=8)
    assert_like_reference(inputs, visibility(kind, inputs[1], window), window, backend)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.tuples(st.integers(1, 180), st.integers(0, 150)),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    window=st.one_of(st.none(), st.integers(0, 200)),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    lengths: tuple[int, int],
    heads: tuple[int, int, int],
    dims: tuple[int, int],
    window: int | None,
    kind: str,
    seed: int,
) -> None:
    (keys, behind), (batch, kv_heads, groups), (dim, value_dim) = lengths, heads, dims
    shape = {"batch": batch, "heads": kv_heads * groups, "kv_heads": kv_heads, "dim": dim, "value_dim": value_dim}
    inputs = tensors(keys, max(1, keys - behind), seed=seed, **shape)
    for name in FAST_BACKENDS:
        assert_like_reference(inputs, visibility(kind, inputs[1], window, seed), window, name)


@pytest.mark.parametrize("kind", ["some", "budget", "pads", "random"])
def test_the_window_divides_the_work_and_changes_nothing(kind: str, backend: str) -> None:
    q, k, v = tensors(140, heads=4)
    until = visibility(kind, k, 10)
    whole = retained_attention(q, k, v, until, None, backend=backend)
    for window in (0, 3, 10, 64, 1000):
        torch.testing.assert_close(retained_attention(q, k, v, until, window, backend=backend), whole)


@pytest.mark.parametrize("kind", ["plain", "some", "budget"])
def test_chunks_of_any_length_equal_one_pass(kind: str, backend: str) -> None:
    q, k, v = (tensor.detach() for tensor in tensors(160, heads=4))
    until = visibility(kind, k, 12)
    whole = retained_attention(q, k, v, until, 12, backend=backend)
    start = 0
    for chunk in (1, 70, 16, 1, 20, 1, 1, 50):
        end = start + chunk
        seen_until = None if until is None else until[:, :end]
        part = retained_attention(q[:, start:end], k[:, :end], v[:, :end], seen_until, 12, backend=backend)
        torch.testing.assert_close(part, whole[:, start:end])
        start = end
    assert start == 160


def test_plain_cases_are_those_of_fused_attention(backend: str) -> None:
    q, k, v = (tensor.detach() for tensor in tensors(90, heads=4))
    heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    causal = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(retained_attention(q, k, v, None, None, scale=0.3, backend=backend), causal)
    band = torch.ones(90, 90, dtype=torch.bool).tril().triu(-7)
    sliding = F.scaled_dot_product_attention(*heads_first, attn_mask=band, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(retained_attention(q, k, v, None, 7, backend=backend), sliding)


@pytest.mark.parametrize("queries", [1, 5, 16, 17, 150])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(queries: int, dtype: torch.dtype, backend: str) -> None:
    q, k, v = tensors(150, queries, heads=4, dtype=dtype)
    until = torch.full(k.shape[:3], FOREVER)
    until[0] = -1
    until[1, :, 1] = -1
    out, dq, dk, dv = outputs_and_gradients(
        lambda q, k, v: retained_attention(q, k, v, until, 20, backend=backend), q, k, v
    )
    for of_query in (out, dq):
        assert not of_query[0].any()
        assert not of_query[1, :, 2:].any()
        assert bool(of_query[1, :, :2].isfinite().all())
        assert bool(of_query[1, :, :2].any())
    for of_key in (dk, dv):
        assert not of_key[0].any()
        assert not of_key[1, :, 1].any()
        assert bool(of_key[1, :, 0].any())


def test_pads_never_touch_what_is_real(backend: str) -> None:
    q, k, v = (tensor.detach().clone() for tensor in tensors(100, batch=1))
    until = torch.full((1, 100, 1), FOREVER)
    until[:, :30] = -1
    padded = retained_attention(q, k, v, until, 10, backend=backend)
    alone = retained_attention(q[:, 30:], k[:, 30:], v[:, 30:], until[:, 30:], 10, backend=backend)
    torch.testing.assert_close(padded[:, 30:], alone)
    k[:, :30], v[:, :30] = 1e4, -1e4
    assert torch.equal(retained_attention(q, k, v, until, 10, backend=backend), padded)


def test_large_scores_do_not_overflow(backend: str) -> None:
    q, k, v = tensors(200, dtype=torch.float32)
    with torch.no_grad():
        q.mul_(100.0)
        k.mul_(100.0)
    until = visibility("some", k, 16)
    for tensor in outputs_and_gradients(
        lambda q, k, v: retained_attention(q, k, v, until, 16, backend=backend), q, k, v
    ):
        assert bool(tensor.isfinite().all())


def test_gradients_by_finite_differences(backend: str) -> None:
    q, k, v = tensors(21, 19, batch=1, heads=2, kv_heads=1, dim=2)
    until = visibility("random", k, 3)
    attend = functools.partial(retained_attention, visible_until=until, window=3, backend=backend)
    assert torch.autograd.gradcheck(attend, (q, k, v))


def test_small_tiles_of_single_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows apart, the far keys of each of another number."""
    monkeypatch.setattr(blocked, "_CPU_SCORES", 1)
    for kind in ("plain", "some", "budget", "pads", "random"):
        inputs = tensors(90, heads=4)
        assert_like_reference(inputs, visibility(kind, inputs[1], 7), 7, "blocked")


def test_nothing_is_read_from_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fill(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-(1 << 40))

        return fill

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert bool(torch.empty(3).isnan().all())
    inputs = tensors(130, heads=4)
    for kind in KINDS:
        assert_like_reference(inputs, visibility(kind, inputs[1], 9), 9, "blocked")


def test_views_and_expanded_gradients(backend: str) -> None:
    """Inputs cut out of one projection, heads first, and the gradient of a sum."""
    generator = torch.Generator().manual_seed(5)
    packed = torch.randn(2, 6, 80, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    until = visibility("some", packed[:, :2].transpose(1, 2), 9)

    def gradient(name: str) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in packed.split(2, dim=1))
        return torch.autograd.grad(retained_attention(q, k, v, until, 9, backend=name).sum(), packed)[0]

    torch.testing.assert_close(gradient(backend), gradient("reference"))


def test_under_checkpointing_and_autocast(backend: str) -> None:
    q, k, v = tensors(100, dtype=torch.float32)
    until = visibility("some", k, 9)
    attend = functools.partial(retained_attention, visible_until=until, window=9, backend=backend)
    direct = outputs_and_gradients(attend, q, k, v)
    again = outputs_and_gradients(lambda *inputs: checkpoint(attend, *inputs, use_reentrant=False), q, k, v)
    for ours, theirs in zip(again, direct, strict=True):
        assert torch.equal(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(outputs_and_gradients(attend, q, k, v), direct, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("queries", [1, 40])
def test_inside_a_compiled_function(queries: int) -> None:
    q, k, v = tensors(40, queries)
    until = visibility("some", k, 9)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return retained_attention(q.sin(), k, v, until, 9).cos()

    compiled = outputs_and_gradients(torch.compile(model, backend="aot_eager", fullgraph=True), q, k, v)
    for ours, theirs in zip(compiled, outputs_and_gradients(model, q, k, v), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("kind", "heads"), [("plain", 2), ("some", 4)])
def test_operators_are_registered_as_pytorch_asks(kind: str, heads: int) -> None:
    q, k, v = tensors(33, 29, heads=heads, dim=6, value_dim=5)
    until = visibility(kind, k, 4)
    arguments = (q, k, v, None if until is None else until.expand(*k.shape[:3]), 4, 0.3)
    torch.library.opcheck(torch.ops.holdfast.retained_attention_tiled, arguments)
    detached = [tensor.detach() for tensor in (q, k, v)]
    out, log_sum = torch.ops.holdfast.retained_attention_tiled(*detached, *arguments[3:])
    backward = (*detached, arguments[3], out, log_sum, torch.ones_like(out), 4, 0.3)
    torch.library.opcheck(torch.ops.holdfast.retained_attention_tiled_backward, backward)


@pytest.mark.parametrize("kind", ["plain", "budget", "pads"])
def test_memory_grows_linearly(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_CPU_SCORES", 1 << 14)
    largest, saved = [], []
    for length in (1024, 4096):
        q, k, v = tensors(length, batch=1, heads=1, kv_heads=1, dim=4, dtype=torch.float32)
        until = visibility("budget" if kind == "pads" else kind, k, 16)
        if kind == "pads" and until is not None:
            until[:, :100] = -1
        kept_bytes = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept_bytes
            kept_bytes += tensor.nbytes
            return tensor

        with LargestTensor() as mode, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            retained_attention(q, k, v, until, 16, backend="blocked").sum().backward()
        largest.append(mode.elements)
        saved.append(kept_bytes)
    assert largest[1] <= 4 * largest[0]
    assert largest[1] < 4096 * 4096 // 64
    assert 0 < saved[1] <= 4 * saved[0]


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 40, 40), (2, 0, 0), (2, 0, 30)])
@pytest.mark.parametrize("window", [3, None])
def test_empty_inputs(batch: int, queries: int, keys: int, window: int | None, backend: str) -> None:
    inputs = tensors(keys, queries, batch=batch, heads=4)
    assert_like_reference(inputs, torch.zeros(inputs[1].shape[:3], dtype=torch.int64), window, backend)
    assert_like_reference(inputs, None, window, backend)


def test_the_default_backend_agrees() -> None:
    q, k, v = (tensor.detach() for tensor in tensors(30))
    until = visibility("some", k, 4)
    expected = retained_attention(q, k, v, until, 4, backend="reference")
    torch.testing.assert_close(retained_attention(q, k, v, until, 4), expected)


GOOD: dict[str, Any] = {
    "q": torch.zeros(2, 5, 4, 8),
    "k": torch.zeros(2, 7, 2, 8),
    "v": torch.zeros(2, 7, 2, 3),
    "visible_until": torch.zeros(2, 7, 2, dtype=torch.int64),
    "window": 3,
}


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [
        (ValueError, r"q must have the shape \[B, T, heads, D\]", {"q": torch.zeros(5, 4, 8)}),
        (ValueError, "v must have the shape", {"v": torch.zeros(2, 7, 2)}),
        (TypeError, "k is torch.float64 and q torch.float32", {"k": torch.zeros(2, 7, 2, 8, dtype=torch.float64)}),
        (TypeError, "floating", {"q": torch.zeros(2, 5, 4, 8, dtype=torch.int64)}),
        (ValueError, "k is on meta", {"k": torch.zeros(2, 7, 2, 8, device="meta")}),
        (ValueError, "do not fit", {"k": torch.zeros(3, 7, 2, 8)}),
        (ValueError, "do not fit", {"k": torch.zeros(2, 7, 2, 9)}),
        (ValueError, "do not fit", {"v": torch.zeros(2, 6, 2, 3)}),
        (
            ValueError,
            "4 query heads are not a multiple of 3",
            {"k": torch.zeros(2, 7, 3, 8), "v": torch.zeros(2, 7, 3, 3)},
        ),
        (ValueError, "0 query heads are not a multiple of 2", {"q": torch.zeros(2, 5, 0, 8)}),
        (ValueError, "has no channels", {"q": torch.zeros(2, 5, 4, 0), "k": torch.zeros(2, 7, 2, 0)}),
        (ValueError, "9 queries need at least as many keys", {"q": torch.zeros(2, 9, 4, 8)}),
        (ValueError, "window must not be negative", {"window": -1}),
        (TypeError, "visible_until must be int64", {"visible_until": torch.zeros(2, 7, 2)}),
        (TypeError, "visible_until must be int64", {"visible_until": torch.zeros(2, 7, 2, dtype=torch.int32)}),
        (ValueError, "visible_until must have the shape", {"visible_until": torch.zeros(2, 5, 2, dtype=torch.int64)}),
        (ValueError, "visible_until is on meta", {"visible_until": GOOD["visible_until"].to("meta")}),
        (ValueError, "backend 'quick' does not exist: choose one of 'reference'", {"backend": "quick"}),
    ],
)
def test_wrong_arguments_are_named(error: type[Exception], message: str, wrong: dict[str, Any]) -> None:
    assert retained_attention(**GOOD).shape == (2, 5, 4, 3)
    with pytest.raises(error, match=message):
        retained_attention(**(GOOD | wrong))
