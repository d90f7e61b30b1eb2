"""The gated delta rule: compilation, refusals, choice of backend, and the adapter to fla-core."""

import importlib.util
import sys
import types
import warnings

import pytest
import torch
from gated_delta_inputs import HV, NAMES, K, V, assert_all_close, make_inputs, run, values_and_gradients
from torch import Tensor

from holdfast.ops import gated_delta_rule as package
from holdfast.ops.gated_delta_rule import chunked, gated_delta_rule, gated_delta_step


def test_scan_is_a_well_formed_custom_op() -> None:
    N, M, C = 3, 2, 4
    gen = torch.Generator().manual_seed(0)
    shapes = ((N, M, C, V), (N, M, C, K), (N, M, C, K), (N, M, C, C), (N, M, 1, 1), (M, K, V))
    args = tuple(torch.randn(s, generator=gen, dtype=torch.float64).requires_grad_() for s in shapes)
    torch.library.opcheck(chunked._scan, args)


def test_compiles_without_graph_breaks() -> None:
    inputs = make_inputs(40, dtype=torch.float32)
    compiled = torch.compile(values_only, backend="aot_eager", fullgraph=True)
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    expected, actual = values_only(leaves), compiled(leaves)
    torch.testing.assert_close(actual, expected)
    expected_grad, actual_grad = (torch.autograd.grad(x[0].sum(), leaves["k"])[0] for x in (expected, actual))
    torch.testing.assert_close(actual_grad, expected_grad)


def test_packing_compiles_without_graph_breaks() -> None:
    inputs = [make_inputs(40, B=1, dtype=torch.float32)[n] for n in NAMES[:5]]
    cu_seqlens = torch.tensor([0, 9, 9, 40])
    compiled = torch.compile(gated_delta_rule, backend="aot_eager", fullgraph=True)
    expected, _ = gated_delta_rule(*inputs, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(compiled(*inputs, cu_seqlens=cu_seqlens)[0], expected)


def values_only(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    return gated_delta_rule(*(inputs[n] for n in NAMES[:5]), initial_state=inputs["state"], output_final_state=True)


def test_meta_tensors_give_shapes() -> None:
    inputs = {n: x.to("meta") for n, x in make_inputs(40).items()}
    out, state = run(inputs)
    assert (out.shape, state.shape) == (inputs["v"].shape, inputs["state"].shape)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": lambda x: x[:, 1:]}, ValueError, "q has shape"),
        ({"k": lambda x: x[..., :1, :]}, ValueError, "q has shape"),
        ({"v": lambda x: x[:, :, :3]}, ValueError, "3 heads"),
        ({"v": lambda x: x[0]}, ValueError, "heads, dimension"),
        ({"g": lambda x: x[..., None]}, ValueError, "g has shape"),
        ({"beta": lambda x: x[:1]}, ValueError, "beta has shape"),
        ({"beta": lambda x: x.long()}, TypeError, "beta has dtype"),
        ({"k": lambda x: x.to("meta")}, ValueError, "k is on meta"),
        ({"state": lambda x: x.mT}, ValueError, "state has shape"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], words: str) -> None:
    inputs = make_inputs(6)
    inputs |= {n: f(inputs[n]) for n, f in change.items()}
    with pytest.raises(error, match=words):
        run(inputs)


def test_unknown_backend_and_long_step() -> None:
    inputs = make_inputs(6)
    with pytest.raises(TypeError, match="scale is a tensor"):
        run(inputs, scale=torch.tensor(0.5))
    with pytest.raises(ValueError, match="reference, chunked, native, fla"):
        run(inputs, backend="triton")
    with pytest.raises(ValueError, match="one token but got 6"):
        gated_delta_step(*inputs.values())


@pytest.mark.parametrize(
    ("cu_seqlens", "rows", "error", "words"),
    [
        ([0, 5], 1, ValueError, "from 0 to T = 6"),
        ([1, 6], 1, ValueError, "from 0 to T = 6"),
        ([0, 4, 3, 6], 1, ValueError, "from 0 to T = 6"),
        ([[0, 6]], 1, ValueError, "offsets"),
        ([0.0, 6.0], 1, TypeError, "int32 or int64"),
        ([0, 6], 2, ValueError, "batch of 1"),
    ],
)
def test_bad_packings_are_named(cu_seqlens: list, rows: int, error: type[Exception], words: str) -> None:
    inputs = make_inputs(6, B=rows)
    with pytest.raises(error, match=words):
        gated_delta_rule(*(inputs[n] for n in NAMES[:5]), cu_seqlens=torch.tensor(cu_seqlens))


@pytest.mark.parametrize("options", [{"initial_state": torch.zeros(1, HV, K, V)}, {"output_final_state": True}])
def test_packing_excludes_states(options: dict) -> None:
    inputs = make_inputs(6, B=1)
    with pytest.raises(ValueError, match="excludes"):
        gated_delta_rule(*(inputs[n] for n in NAMES[:5]), cu_seqlens=torch.tensor([0, 6]), **options)


class TestFla:
    """The adapter, with a stand-in for the kernels: what they are called with, and that the answer comes through."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
        calls: list[dict] = []

        def chunk_gated_delta_rule(**kwargs: object) -> tuple[Tensor, Tensor | None]:
            calls.append(kwargs)
            inputs = [kwargs[n] for n in NAMES[:5]]
            options = {n: kwargs[n] for n in ("scale", "initial_state", "output_final_state", "cu_seqlens")}
            return gated_delta_rule(*inputs, **options, backend="reference")

        module = types.ModuleType("fla.ops.gated_delta_rule")
        module.chunk_gated_delta_rule = chunk_gated_delta_rule
        for name in ("fla", "fla.ops"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
        monkeypatch.setattr(package.fla, "is_available", lambda: True)
        return calls

    def test_answer_comes_through(self, calls: list[dict]) -> None:
        inputs = make_inputs(20, dtype=torch.float32)
        assert_all_close(
            values_and_gradients(inputs, backend="fla"), values_and_gradients(inputs, backend="reference"), 1e-6
        )
        assert calls[0]["q"].shape[2] == calls[0]["k"].shape[2] == HV

    def test_kernels_see_no_empty_sequence(self, calls: list[dict]) -> None:
        inputs = make_inputs(20, B=1, dtype=torch.bfloat16)
        cu_seqlens = torch.tensor([0, 0, 7, 7, 20, 20], dtype=torch.int32)
        gated_delta_rule(*(inputs[n] for n in NAMES[:5]), cu_seqlens=cu_seqlens, backend="fla")
        assert calls[0]["cu_seqlens"].tolist() == [0, 7, 20]
        assert calls[0]["initial_state"] is None
        assert [calls[0][n].dtype for n in NAMES[:5]] == [torch.bfloat16] * 3 + [torch.float32] * 2


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="fla-core is installed")
def test_missing_fla_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"holdfast\[cuda\]"):
        run(make_inputs(6), backend="fla")


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def best(device: str, dtype: torch.dtype) -> str:
        x = types.SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(2, 9, 3, 4))
        return package._best_backend(x, x)

    monkeypatch.setattr(package.native, "is_available", lambda: True)
    for threads, expected in ((12, "native"), (13, "chunked"), (1, "native")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert best("cpu", torch.float32) == best("cpu", torch.bfloat16) == expected
    assert best("cpu", torch.float64) == "chunked"
    monkeypatch.setattr(package.native, "is_available", lambda: False)
    assert best("cpu", torch.float32) == "chunked"
    monkeypatch.setattr(package.fla, "is_available", lambda: True)
    monkeypatch.setattr(package.fla, "allows_tf32", lambda: False)
    assert best("cuda", torch.bfloat16) == "fla"
    assert best("cuda", torch.float64) == "chunked"
    assert best("cuda", torch.float32) == "chunked"
    monkeypatch.setattr(package.fla, "allows_tf32", lambda: True)
    assert best("cuda", torch.float32) == "fla"


def test_slow_fallback_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.fla, "is_available", lambda: False)
    package._warn_slow.cache_clear()
    v = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="fla-core is not installed"):
        assert package._best_backend(v, v) == "chunked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert package._best_backend(v, v) == "chunked"


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("fla") is None, reason="needs a GPU and fla-core"
)
@pytest.mark.parametrize("T", [2, 65, 257])
def test_fla_equals_reference(T: int) -> None:
    inputs = {n: x.cuda() for n, x in make_inputs(T, K=64, V=64, dtype=torch.bfloat16).items()}
    expected = values_and_gradients({n: x.double() for n, x in inputs.items()}, backend="reference")
    actual = values_and_gradients(inputs, backend="fla")
    assert_all_close(actual, {n: expected[n].to(x.dtype) for n, x in actual.items()}, 2e-2)
