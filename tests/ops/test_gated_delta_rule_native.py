"""The gated delta rule in C++ against the token-by-token definition, gradients included."""

import itertools
import math

import pytest
import torch
from gated_delta_inputs import NAMES, assert_all_close, make_inputs, run, values_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.ops.gated_delta_rule import gated_delta_rule, native

pytestmark = pytest.mark.skipif(not native.is_available(), reason="there is no C++ compiler")


def assert_like_reference(inputs: dict[str, Tensor], tolerance: float = 1e-5, **options: object) -> None:
    """Against the definition in float64; the same numbers from "native"."""
    exact = values_and_gradients({n: x.double() for n, x in inputs.items()}, backend="reference", **options)
    actual = values_and_gradients(inputs, backend="native", **options)
    assert_all_close(actual, {n: x.float() for n, x in exact.items()}, tolerance)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("T", [1, 2, 11, 12, 13, 31, 32, 33, 63, 64, 65, 96, 130, 257])
def test_lengths(T: int) -> None:
    inputs = make_inputs(T, seed=T, dtype=torch.float32)
    assert_like_reference(inputs)
    del inputs["state"]
    assert_like_reference(inputs)


SIZES = [
    {"K": 64, "V": 64},
    {"K": 128, "V": 128},
    {"K": 128, "V": 24},
    {"K": 7, "V": 100},
    {"K": 1, "V": 1},
    {"K": 33, "V": 17, "HK": 1, "HV": 3},
    {"HK": 3, "HV": 6},
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes: dict[str, int]) -> None:
    assert_like_reference(make_inputs(131, seed=3, dtype=torch.float32, **sizes))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("length", [1, 5, 16, 48, 100])
def test_every_chunk_length(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_chunk_length", lambda *_: length)
    assert_like_reference(make_inputs(150, seed=4, dtype=torch.float32))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    bounds = {"B": (1, 3), "HK": (1, 3), "K": (1, 40), "V": (1, 40)}
    drawn = {name: data.draw(st.integers(*ends), label=name) for name, ends in bounds.items()}
    T, groups = data.draw(st.integers(1, 100), label="T"), data.draw(st.integers(1, 3), label="groups")
    inputs = make_inputs(T, seed=T, HV=drawn["HK"] * groups, dtype=torch.float32, **drawn)
    assert_like_reference(inputs, scale=0.7)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "offsets", [[0, 100], [0, 1, 2, 40, 100], [0, 0, 30, 30, 30, 64, 100, 100], [0, 16, 32, 48, 100], [0, 0, 100]]
)
def test_packed_equals_separate_with_gradients(offsets: list[int], dtype: torch.dtype) -> None:
    inputs = make_inputs(100, B=1, dtype=torch.float32)
    del inputs["state"]
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    exact = {n: x.double().requires_grad_() for n, x in inputs.items()}
    cu_seqlens = torch.tensor(offsets, dtype=dtype)
    packed, _ = gated_delta_rule(*leaves.values(), cu_seqlens=cu_seqlens, backend="native")
    spans = [(a, b) for a, b in itertools.pairwise(offsets) if a < b]
    pieces = [gated_delta_rule(*(x[:, a:b] for x in exact.values()), backend="reference")[0] for a, b in spans]
    separate = torch.cat(pieces, dim=1)
    weight = torch.randn(packed.shape)
    actual = torch.autograd.grad((packed * weight).sum(), list(leaves.values()))
    expected = torch.autograd.grad((separate * weight.double()).sum(), list(exact.values()))
    assert_all_close({"out": packed.detach()}, {"out": separate.detach().float()}, 1e-5)
    named = (dict(zip(leaves, gradients, strict=True)) for gradients in (actual, expected))
    actual_named, expected_named = named
    assert_all_close(actual_named, {n: x.float() for n, x in expected_named.items()}, 1e-5)


def test_what_is_not_a_number_stays_in_its_sequence_and_head() -> None:
    """Memory of the tasks before, which a thread uses again, reaches nothing."""
    inputs = make_inputs(100, dtype=torch.float32, HK=2, HV=4)
    expected = values_and_gradients(inputs, backend="native")
    spoiled = {n: x.clone() for n, x in inputs.items()}
    for name in ("k", "v", "g"):
        spoiled[name][0, 70:, 0] = math.nan
    actual = values_and_gradients(spoiled, backend="native")
    assert actual["out"][0, 70:, 0].isnan().all()
    assert torch.equal(actual["out"][0, :60], expected["out"][0, :60])
    for name, x in expected.items():
        if x.ndim == 4:
            heads = x.shape[1 if "state" in name else 2]
            rest = slice(heads // 2, None)  # of the other key head
            rest = (slice(None), rest) if "state" in name else (slice(None), slice(None), rest)
            assert torch.equal(actual[name][rest], x[rest]), name
        assert torch.equal(actual[name][1], x[1]), name


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_change_nothing(threads: int) -> None:
    inputs = make_inputs(70, dtype=torch.float32, B=3, HK=1, HV=2)
    before = torch.get_num_threads()
    expected = values_and_gradients(inputs, backend="native")
    try:
        torch.set_num_threads(threads)
        actual = values_and_gradients(inputs, backend="native")
    finally:
        torch.set_num_threads(before)
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name


def test_one_gradient_only() -> None:
    """Of the final state alone, of the output alone, for one input that is no leaf and not contiguous."""
    inputs = make_inputs(70, dtype=torch.float32)
    wide = torch.randn(*inputs["v"].shape[:-1], 50)
    for which in range(2):
        gradients = []
        for backend, dtype in (("native", torch.float32), ("reference", torch.float64)):
            leaf = wide.to(dtype).requires_grad_()
            leaves = {n: x.to(dtype) for n, x in inputs.items()} | {"v": leaf.exp()[..., 3:23]}
            gradients.append(torch.autograd.grad(run(leaves, backend=backend)[which].sin().sum(), leaf)[0].float())
        assert_all_close({"v": gradients[0]}, {"v": gradients[1]}, 1e-5)


def test_states_are_kept_for_gradients_only(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    call = native._run
    monkeypatch.setattr(native, "_run", lambda *a, **kw: (kept.append("states" in kw), call(*a, **kw))[1])
    inputs = make_inputs(70, dtype=torch.float32)
    run(inputs, backend="native")
    with torch.no_grad():
        run({n: x.clone().requires_grad_() for n, x in inputs.items()}, backend="native")
    run({n: x.clone().requires_grad_() for n, x in inputs.items()}, backend="native")
    assert kept == [False, False, True]


def cases(packed: bool) -> tuple[tuple, tuple]:
    inputs = make_inputs(100, B=1, dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 30, 30, 100]) if packed else None
    forward = (*(inputs[n] for n in NAMES), cu_seqlens, 0.5, True)
    out, final_state, errors, states = native._forward(*forward)
    gradients = torch.randn_like(out), None if packed else torch.randn_like(final_state)
    return forward, (*gradients, *(inputs[n] for n in NAMES[:5]), errors, states, cu_seqlens, 0.5)


@pytest.mark.parametrize("packed", [False, True])
def test_well_formed_custom_ops(packed: bool) -> None:
    forward, backward = cases(packed)
    leaves = tuple(
        x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in forward
    )
    torch.library.opcheck(native._forward, leaves)
    torch.library.opcheck(native._backward, backward)


def test_an_exported_program_can_be_trained() -> None:
    class Model(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return gated_delta_rule(*given, backend="native")[0]

    given = [make_inputs(70, dtype=torch.float32)[n] for n in NAMES[:5]]
    program = torch.export.export(Model(), tuple(given)).module()
    leaf = given[2].clone().requires_grad_()
    found, expected = (
        torch.autograd.grad(model(*given[:2], leaf, *given[3:]).sin().sum(), leaf)[0] for model in (program, Model())
    )
    assert torch.equal(found, expected)


def test_compiled_packings_are_one_graph_and_are_checked() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def packed(*given: Tensor) -> Tensor:
        return gated_delta_rule(*given[:5], cu_seqlens=given[5], backend="native")[0]

    compiled = torch.compile(packed, backend=counter, fullgraph=True, dynamic=True)
    inputs = [make_inputs(100, B=1, dtype=torch.float32)[n] for n in NAMES[:5]]
    for count in (3, 4, 5, 6, 7):
        offsets = torch.linspace(0, 100, count + 1).long()
        torch.testing.assert_close(compiled(*inputs, offsets), packed(*inputs, offsets))
    assert counter.frame_count <= 2
    for offsets in ([0, 30, 130], [0, 30, 90], [5, 30, 100], [0, 40, 30, 100]):
        with pytest.raises(ValueError, match="rise from 0 to T = 100"):
            compiled(*inputs, torch.tensor(offsets))


def test_derivatives_forwards() -> None:
    inputs = make_inputs(20, dtype=torch.float32)
    given = [inputs[n] for n in NAMES[:5]]
    _, actual = torch.func.jvp(lambda v: gated_delta_rule(*given[:2], v, *given[3:])[0], (given[2],), (given[2],))
    torch.testing.assert_close(actual, gated_delta_rule(*given)[0])  # linear in v, from a state of zeros


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="at most float32"):
        run(make_inputs(5), backend="native")
    monkeypatch.setattr(native, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler"):
        run(make_inputs(5, dtype=torch.float32), backend="native")
