"""The gated delta rule: every implementation against the token-by-token definition."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from gated_delta_inputs import HV, NAMES, B, K, V, assert_all_close, make_inputs, run, values_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.ops.gated_delta_rule import chunked, gated_delta_rule, gated_delta_step, native

# C++ computes in float32 only.
NATIVE = ["native"] if native.is_available() else []


@pytest.fixture
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every op called with NaN in fresh memory, also through new_empty and empty_like."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize(
    ("T", "with_state"),
    [(T, True) for T in (1, 2, 31, 32, 33, 63, 64, 65, 130, 257)] + [(T, False) for T in (1, 2, 33, 65)],
)
def test_chunked_equals_reference_in_float64(T: int, with_state: bool) -> None:
    inputs = make_inputs(T, seed=T)
    if not with_state:
        del inputs["state"]
    expected = values_and_gradients(inputs, backend="reference")
    assert_all_close(values_and_gradients(inputs, backend="chunked"), expected, 1e-12)


@pytest.mark.parametrize("sizes", [{"K": 64, "V": 64}, {"K": 128, "V": 24}, {"K": 7, "V": 100}, {"HK": 1, "HV": 3}])
def test_chunked_equals_reference_at_other_sizes(sizes: dict[str, int]) -> None:
    inputs = make_inputs(131, seed=3, **sizes)
    expected = values_and_gradients(inputs, backend="reference")
    assert_all_close(values_and_gradients(inputs, backend="chunked"), expected, 1e-12)


@pytest.mark.parametrize("length", [16, 32, 64])
def test_every_chunk_length(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_chunk_length", lambda *_: length)
    inputs = make_inputs(150, seed=4)
    expected = values_and_gradients(inputs, backend="reference")
    assert_all_close(values_and_gradients(inputs, backend="chunked"), expected, 1e-12)


@pytest.mark.parametrize("T", [1, 2, 65, 130])
def test_float32(T: int) -> None:
    inputs = make_inputs(T, seed=T, dtype=torch.float32)
    exact = {n: x.double() for n, x in inputs.items()}
    expected = {n: x.float() for n, x in values_and_gradients(exact, backend="reference").items()}
    for backend in ("chunked", "reference", *NATIVE, None):
        assert_all_close(values_and_gradients(inputs, backend=backend), expected, 1e-5)


@pytest.mark.parametrize("T", [1, 65, 130])
@pytest.mark.parametrize("backend", ["reference", "chunked", *NATIVE, None])
def test_bfloat16_computes_in_float32(T: int, backend: str | None) -> None:
    inputs = make_inputs(T, seed=T, dtype=torch.bfloat16)
    exact = values_and_gradients({n: x.double() for n, x in inputs.items()}, backend="reference")
    actual = values_and_gradients(inputs, backend=backend)
    assert actual["out"].dtype == torch.bfloat16
    assert actual["final_state"].dtype == torch.float32
    # The state has seen no rounding but float32's; the rest carries one rounding to bfloat16.
    assert_all_close({"s": actual.pop("final_state")}, {"s": exact.pop("final_state").float()}, 1e-5)
    assert_all_close(actual, {n: exact[n].to(x.dtype) for n, x in actual.items()}, 1e-2)


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("backend", ["reference", "chunked", *NATIVE, None])
def test_autocast_does_not_lower_float32(T: int, backend: str | None) -> None:
    inputs = make_inputs(T, dtype=torch.float32)
    expected, expected_state = run(inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = run(inputs, backend=backend)
    assert torch.equal(out, expected)
    assert torch.equal(state, expected_state)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    sizes = {"B": (1, 3), "HK": (1, 3), "K": (1, 20), "V": (1, 20)}
    drawn = {name: data.draw(st.integers(*bounds), label=name) for name, bounds in sizes.items()}
    T, groups = data.draw(st.integers(1, 70), label="T"), data.draw(st.integers(1, 3), label="groups")
    inputs = make_inputs(T, seed=T, HV=drawn["HK"] * groups, **drawn)
    expected = values_and_gradients(inputs, backend="reference", scale=0.7)
    assert_all_close(values_and_gradients(inputs, backend="chunked", scale=0.7), expected, 1e-11)
    assert_all_close(values_and_gradients(inputs, scale=0.7), expected, 1e-11)


def test_reference_is_the_published_recurrence() -> None:
    """One head, written out with plain vectors: S ← e^g·S; S ← S + k ⊗ β(v − kᵀS); out = K^-½·qᵀS."""
    inputs = make_inputs(5, B=1, HK=1, HV=2)
    out, final_state = run(inputs, backend="reference")
    q, k, v, g, beta, state = (inputs[n][0] for n in NAMES)
    for h in range(2):
        S = state[h]
        for t in range(5):
            S = S * g[t, h].exp()
            S = S + torch.outer(k[t, 0], beta[t, h] * (v[t, h] - k[t, 0] @ S))
            torch.testing.assert_close(out[0, t, h], K**-0.5 * q[t, 0] @ S)
        torch.testing.assert_close(final_state[0, h], S)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [1, 40, 64, 99])
def test_carrying_the_state_equals_one_pass(backend: str, cut: int) -> None:
    inputs = make_inputs(100, seed=cut)
    whole, final_state = run(inputs, backend=backend)
    first = {n: x if n == "state" else x[:, :cut] for n, x in inputs.items()}
    head, state = run(first, backend=backend)
    rest = {n: state if n == "state" else x[:, cut:] for n, x in inputs.items()}
    tail, state = run(rest)
    torch.testing.assert_close(torch.cat((head, tail), dim=1), whole)
    torch.testing.assert_close(state, final_state)


def test_gradients_reach_through_a_carried_state() -> None:
    inputs = make_inputs(90)
    leaf = inputs["k"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(run(inputs | {"k": leaf}, backend="reference")[0].square().sum(), leaf)
    head, state = run({n: x if n == "state" else x[:, :50] for n, x in (inputs | {"k": leaf}).items()})
    tail, _ = run({n: state if n == "state" else x[:, 50:] for n, x in (inputs | {"k": leaf}).items()})
    (actual,) = torch.autograd.grad(head.square().sum() + tail.square().sum(), leaf)
    torch.testing.assert_close(actual, expected)


def test_steps_equal_one_pass() -> None:
    inputs = make_inputs(30)
    expected, final_state = run(inputs, backend="reference")
    state = inputs["state"]
    for t in range(30):
        before = state.clone()
        out, new_state = gated_delta_step(*(inputs[n][:, t : t + 1] for n in NAMES[:5]), state)
        assert torch.equal(state, before)
        torch.testing.assert_close(out, expected[:, t : t + 1])
        state = new_state
    torch.testing.assert_close(state, final_state)


@pytest.mark.parametrize("backend", ["reference", "chunked", *NATIVE, None])
@pytest.mark.parametrize("T", [1, 5, 70])
def test_pads_leave_the_state_untouched_to_the_bit(backend: str | None, T: int) -> None:
    inputs = make_inputs(T, dtype=torch.float32)
    inputs |= {n: torch.zeros_like(inputs[n]) for n in ("g", "beta")}
    _, final_state = run(inputs, backend=backend)
    assert torch.equal(final_state, inputs["state"])


def test_pads_among_tokens_change_nothing() -> None:
    inputs = make_inputs(75)
    real = torch.rand(75, generator=torch.Generator().manual_seed(5)) < 0.6
    pad = ~real[None, :, None]
    inputs |= {n: inputs[n].masked_fill(pad, 0) for n in ("g", "beta")}
    expected, final_state = run({n: x if n == "state" else x[:, real] for n, x in inputs.items()}, backend="reference")
    out, state = run(inputs)
    torch.testing.assert_close(out[:, real], expected)
    torch.testing.assert_close(state, final_state)


@pytest.mark.parametrize("backend", ["chunked", *NATIVE])
@pytest.mark.parametrize("decay", [0.0, -1e-4, -50.0, -5000.0, -float("inf")])
def test_extreme_decays(decay: float, backend: str) -> None:
    inputs = make_inputs(100, dtype=torch.float32)
    strong = torch.rand(inputs["g"].shape, generator=torch.Generator().manual_seed(1)) < 0.5
    for g in (torch.full_like(inputs["g"], decay), inputs["g"].masked_fill(strong, decay)):
        actual = values_and_gradients(inputs | {"g": g}, backend=backend)
        expected = values_and_gradients(inputs | {"g": g}, backend="reference")
        # e^(G_i − G_j) is as exact as the running sum G, whose unit in the last place is 2e-4 at 32 · 105; C++ sums in
        # float64.
        assert_all_close(actual, expected, 1e-5 if decay > -1 or backend == "native" else 2e-4)


def test_no_decay_and_full_writes_recall_the_last_value_of_a_key() -> None:
    inputs = make_inputs(50, dtype=torch.float32)
    inputs |= {"g": torch.zeros_like(inputs["g"]), "beta": torch.ones_like(inputs["beta"]), "q": inputs["k"]}
    out, _ = run(inputs, scale=1.0)
    torch.testing.assert_close(out, inputs["v"], atol=1e-5, rtol=0)


PACKINGS = [[0, 100], [0, 1, 2, 40, 100], [0, 0, 30, 30, 30, 64, 100, 100], [0, 16, 32, 48, 100], [0, 0, 100]]


@pytest.mark.parametrize("offsets", PACKINGS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "chunked", None])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_equals_separate_with_gradients(offsets: list[int], backend: str | None, dtype: torch.dtype) -> None:
    inputs = make_inputs(100, B=1)
    del inputs["state"]
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    weight = torch.randn(inputs["v"].shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    cu_seqlens = torch.tensor(offsets, dtype=dtype)
    packed, _ = gated_delta_rule(*leaves.values(), cu_seqlens=cu_seqlens, backend=backend)
    pieces = [
        gated_delta_rule(*(x[:, a:b] for x in leaves.values()), backend="reference")[0]
        for a, b in itertools.pairwise(offsets)
    ]
    separate = torch.cat(pieces, dim=1)
    torch.testing.assert_close(packed, separate)
    actual, expected = (torch.autograd.grad((out * weight).sum(), list(leaves.values())) for out in (packed, separate))
    for name, a, e in zip(leaves, actual, expected, strict=True):
        torch.testing.assert_close(a, e, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["chunked", *NATIVE])
def test_packed_sequences_do_not_leak_at_all(backend: str) -> None:
    inputs, other = (make_inputs(70, seed=seed, B=1, dtype=torch.float32) for seed in (0, 9))
    changed = {n: torch.cat((other[n][:, :37], inputs[n][:, 37:]), dim=1) for n in NAMES[:5]}
    cu_seqlens = torch.tensor([0, 37, 70])
    first, second = (
        gated_delta_rule(*(x[n] for n in NAMES[:5]), cu_seqlens=cu_seqlens, backend=backend)[0]
        for x in (inputs, changed)
    )
    assert not torch.equal(first[:, :37], second[:, :37])
    assert torch.equal(first[:, 37:], second[:, 37:])


@pytest.mark.parametrize("backend", ["reference", "chunked", "native", "fla", None])
def test_no_tokens(backend: str | None) -> None:
    inputs = make_inputs(0, dtype=torch.bfloat16)
    out, state = run(inputs, backend=backend)
    assert out.shape == (B, 0, HV, V)
    assert out.dtype == torch.bfloat16
    assert torch.equal(state, inputs["state"])


def test_no_rows() -> None:
    out, state = run({n: x[:0] for n, x in make_inputs(5, dtype=torch.float32).items()})
    assert out.shape == (0, 5, HV, V)
    assert state.shape == (0, HV, K, V)


def test_final_state_only_on_request() -> None:
    inputs = make_inputs(3)
    for T in (0, 1, 3):
        assert gated_delta_rule(*(inputs[n][:, :T] for n in NAMES[:5]))[1] is None


def test_gradcheck() -> None:
    inputs = make_inputs(19, B=1, HK=1, HV=2, K=3, V=2)
    leaves = tuple(inputs[n].requires_grad_() for n in NAMES)

    def function(*xs: Tensor) -> tuple[Tensor, Tensor | None]:
        return gated_delta_rule(*xs[:5], initial_state=xs[5], output_final_state=True)

    assert torch.autograd.gradcheck(function, leaves)


def test_memory_grows_linearly() -> None:
    """What autograd keeps for T tokens is twice that for T/2."""

    def saved_bytes(T: int) -> int:
        inputs = {n: x.requires_grad_() for n, x in make_inputs(T, dtype=torch.float32, B=1).items()}
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            kept = run(inputs, backend="chunked")
        assert kept[0].requires_grad
        return sum(storages.values())

    assert saved_bytes(4096) < 2.1 * saved_bytes(2048)
