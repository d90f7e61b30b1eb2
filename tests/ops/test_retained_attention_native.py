"""retained_attention in C++ against the reference, and what happens without a compiler."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from retained_attention_inputs import KINDS, assert_like_reference, tensors, visibility

from holdfast.ops import native as building
from holdfast.ops.native import load_library
from holdfast.ops.retained_attention import blocked, native, retained_attention

needs_compiler = pytest.mark.skipif(not native.is_available(), reason="there is no C++ compiler")


@pytest.fixture
def library_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the library's functions that have been called; short sequences are none of PyTorch's here."""
    monkeypatch.setattr(blocked, "_FEW_TOKENS", 0)
    calls: list[str] = []
    run = native._Call.run
    monkeypatch.setattr(native._Call, "run", lambda self, name, **kw: (calls.append(name), run(self, name, **kw))[1])
    return calls


@needs_compiler
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "window"), [(17, 3), (96, 8), (257, 40), (390, 380), (130, 500), (300, 1)])
def test_lengths_and_windows(length: int, window: int | None, kind: str, library_calls: list[str]) -> None:
    inputs = tensors(length, dtype=torch.float32)
    until = visibility(kind, inputs[1], window)
    assert_like_reference(inputs, until, window, "blocked")
    plain = until is None and (window is None or window >= length - 1)
    assert library_calls == ([] if plain else ["holdfast_forward", "holdfast_backward"])


@needs_compiler
def test_short_sequences_without_eviction_are_pytorchs(
    library_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "_FEW_TOKENS", 40)
    for length in (1, 17, 40):
        inputs = tensors(length, dtype=torch.float32)
        assert_like_reference(inputs, visibility("all", inputs[1], 3), 3, "blocked")
        until = visibility("nothing", inputs[1], 40)
        assert_like_reference(inputs, until, 40, "blocked")
    assert library_calls == []
    until[0, 0, 0] = 38  # the last query no longer sees the first key
    assert_like_reference(inputs, until, 40, "blocked")
    assert library_calls


@needs_compiler
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"),
    [(2, 2, 64, 64), (6, 2, 40, 7), (32, 1, 16, 33), (3, 3, 1, 128), (40, 1, 8, 8)],
)
def test_heads_and_channels(heads: int, kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype) -> None:
    inputs = tensors(190, 150, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim, dtype=dtype)
    assert_like_reference(inputs, visibility("budget", inputs[1], 20), 20, "blocked")
    assert_like_reference(inputs, visibility("random", inputs[1], 20), 20, "blocked")


@needs_compiler
@pytest.mark.parametrize("kind", ["all", "documents", "pads", "random"])
def test_no_window(kind: str) -> None:
    inputs = tensors(390, 250, heads=4, dtype=torch.float32)
    assert_like_reference(inputs, visibility(kind, inputs[1], None), None, "blocked")


@needs_compiler
def test_large_scores_and_not_a_number() -> None:
    q, k, v = (x.detach() for x in tensors(100, batch=1, heads=1, kv_heads=1, dtype=torch.float32))
    until = visibility("some", k, 10)
    large = (q * 40, k * 40, v)  # powers of some thousands, rounded to 2^-12
    exact = retained_attention(*(x.double() for x in large), until, 10, backend="reference")
    torch.testing.assert_close(retained_attention(*large, until, 10).double(), exact, atol=5e-3, rtol=0)
    q[0, 50] = torch.nan
    out = retained_attention(q, k, v, until, 10)
    assert out[0, 50].isnan().all()
    assert not out[0, :50].isnan().any()
    assert not out[0, 51:].isnan().any()


@needs_compiler
def test_threads_give_the_same_bits() -> None:
    inputs = tensors(300, batch=2, heads=6, kv_heads=3, dtype=torch.float32)
    until = visibility("budget", inputs[1], 30)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            out = torch.ops.holdfast.retained_attention_tiled(*inputs, until, 30, 0.25)[0]
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    finally:
        torch.set_num_threads(threads)
    for one, four in zip(*results, strict=True):
        assert torch.equal(one, four)


@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_serves_where_there_is_no_library(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "is_available", lambda: False)
    inputs = tensors(130, heads=4, dtype=torch.float32)
    assert_like_reference(inputs, visibility(kind, inputs[1], 20), 20, "blocked")


@pytest.fixture
def fresh_loader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder for compiled libraries, and no memory of those loaded before."""
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    load_library.cache_clear()
    yield tmp_path
    load_library.cache_clear()


@needs_compiler
def test_a_library_is_compiled_once_and_again_when_its_source_changes(fresh_loader: Path) -> None:
    source = fresh_loader / "seven.cpp"
    for number in (7, 8, 7):
        source.write_text(f'extern "C" int answer() {{ return {number}; }}')
        load_library.cache_clear()
        library = load_library(source)
        assert library is not None
        assert library.answer() == number
    assert len(list((fresh_loader / "cache").iterdir())) == 2


def test_a_failing_compiler_is_mentioned_once(fresh_loader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fresh_loader / "broken.cpp"
    source.write_text("this is not C++")
    with pytest.warns(UserWarning, match="slower PyTorch code"):
        assert load_library(source) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_library(source) is None
    monkeypatch.setenv("HOLDFAST_NATIVE", "0")
    monkeypatch.setattr(building.subprocess, "run", None)
    load_library.cache_clear()
    assert load_library(source) is None
