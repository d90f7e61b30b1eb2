"""window_step: every backend makes the same state and the same output as the reference, step after step."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from torch import Tensor

from holdfast.ops import one_token, threads
from holdfast.ops.threads import openmp
from holdfast.ops.window_step import Slots, window_step

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NATIVE = DEVICE == "cpu" and one_token.serves(torch.ones(1))
FAST = [
    "pytorch",
    pytest.param("native", marks=pytest.mark.skipif(not NATIVE, reason="there is no C++ compiler, or a GPU")),
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")),
]
NAN = float("nan")


def empty(batch: int, kv_heads: int, ring: int, budget: int, dim: int, dtype: torch.dtype = torch.float32) -> Slots:
    shape = (batch, kv_heads, budget + ring)
    keys, values = (torch.zeros(*shape, dim, dtype=dtype, device=DEVICE) for _ in range(2))
    seen = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    if not budget:
        return Slots(keys, values, seen)
    positions = torch.full((*shape[:2], budget), -1, dtype=torch.int32, device=DEVICE)
    return Slots(keys, values, seen, torch.full(shape, -torch.inf, device=DEVICE), positions)


def selected(slots: Slots, rows: Tensor | None = None) -> Slots:
    """A copy with these rows; None: all."""
    rows = torch.arange(len(slots.seen), device=DEVICE) if rows is None else rows
    fields = {field.name: getattr(slots, field.name) for field in dataclasses.fields(slots)}
    return Slots(**{name: None if x is None else x.index_select(0, rows) for name, x in fields.items()})


def assert_same_state(actual: Slots, expected: Slots) -> None:
    for field in dataclasses.fields(expected):
        ours, theirs = getattr(actual, field.name), getattr(expected, field.name)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=field.name)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("ring", "budget", "delay", "sinks", "groups", "dim"),
    [(4, 3, 2, 2, 3, 20), (2, 5, 2, 0, 1, 16), (1, 2, 0, 1, 2, 8), (3, 0, 0, 0, 2, 24)],
)
def test_random_steps(backend: str, ring: int, budget: int, delay: int, sinks: int, groups: int, dim: int) -> None:
    """Ties, NaN, pads, rows that are reordered; a delay as long as the ring: the leaving pair's score comes with it."""
    generator = torch.Generator().manual_seed(ring)
    grades = torch.tensor([-0.3, 0.0, 0.1, 0.2, 0.3, NAN])
    expected = empty(3, 2, ring, budget, dim)
    actual = selected(expected)
    entered = 0
    for number in range(11):
        q, key, value = (torch.randn(3, heads, dim, generator=generator).to(DEVICE) for heads in (2 * groups, 2, 2))
        score = grades[torch.randint(len(grades), (3, 2), generator=generator)].to(DEVICE) if budget else None
        real = (torch.rand(3, generator=generator) < 0.8).to(DEVICE) if number % 3 else None
        settings = {"score": score, "real": real, "sinks": sinks, "delay": delay}
        ours = window_step(q, key, value, actual, backend=backend, **settings)
        theirs = window_step(q, key, value, expected, backend="reference", **settings)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert_same_state(actual, expected)
        entered += 0 if expected.positions is None else int((expected.positions >= 0).sum())
        if number % 5 == 4:
            order = torch.tensor([2, 0, 0], device=DEVICE)
            actual, expected = selected(actual, order), selected(expected, order)
    assert entered > 0 or not budget


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_autocast_changes_nothing(backend: str) -> None:
    slots = empty(1, 1, 5, 0, 16)
    slots.keys.normal_(), slots.values.normal_()
    tensors = [torch.randn(1, heads, 16, device=DEVICE) for heads in (2, 1, 1)]
    expected = window_step(*tensors, selected(slots), backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = window_step(*tensors, slots, backend=backend)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_the_reference_computes_16_bit_inputs_in_fp32() -> None:
    slots = empty(2, 1, 40, 0, 16, torch.bfloat16)
    slots.keys.normal_(), slots.values.normal_()
    slots.seen.fill_(40)
    tensors = [torch.randn(2, heads, 16, device=DEVICE).bfloat16() for heads in (2, 1, 1)]
    wide = dataclasses.replace(selected(slots), keys=slots.keys.float(), values=slots.values.float())
    expected = window_step(*(x.float() for x in tensors), wide, backend="reference")
    assert torch.equal(window_step(*tensors, slots, backend="reference"), expected.bfloat16())


@pytest.mark.parametrize("backend", FAST)
def test_a_row_without_tokens_gives_zeros(backend: str) -> None:
    slots = empty(1, 1, 3, 2, 16)
    tensors = (torch.randn(1, 1, 16, device=DEVICE) for _ in range(3))
    real = torch.zeros(1, dtype=torch.bool, device=DEVICE)
    out = window_step(*tensors, slots, score=torch.ones(1, 1, device=DEVICE), real=real, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    assert_same_state(slots, empty(1, 1, 3, 2, 16))


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("programs", [1, 4, 64])
def test_split_over_many_slots(programs: int, dtype: torch.dtype) -> None:
    """Whatever the split, the parts merge to the same; fresh memory full of NaN is never read."""
    from holdfast.ops.window_step import triton

    ring, budget, dim = 150, 70, 40
    generator = torch.Generator().manual_seed(0)
    slots = empty(2, 1, ring, budget, dim, dtype)
    slots.keys.normal_(), slots.values.normal_()
    slots.seen[:] = torch.tensor([40, 900])
    slots.positions[1], slots.scores[1] = torch.randperm(budget).int(), torch.rand(1, ring + budget)
    q, key, value = (torch.randn(2, heads, dim, generator=generator).to(DEVICE, dtype) for heads in (3, 1, 1))
    score = torch.full((2, 1), 0.5, device=DEVICE)
    expected = selected(slots)
    wide = dataclasses.replace(expected, keys=expected.keys.float(), values=expected.values.float())
    theirs = window_step(q.float(), key.float(), value.float(), wide, score=score, delay=3, backend="reference")

    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        ours = triton.step(q, key, value, slots, score, None, 0, 3, dim**-0.5, programs)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-2)
    assert_same_state(slots, dataclasses.replace(wide, keys=wide.keys.to(dtype), values=wide.values.to(dtype)))


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("budget", [0, 2])
def test_the_operator_is_well_registered(budget: int) -> None:
    slots = empty(2, 1, 2, budget, 16)
    q, key, value = torch.randn(2, 2, 16), torch.randn(2, 1, 16), torch.randn(2, 1, 16)
    score = torch.rand(2, 1) if budget else None
    arguments = (q, key, value, score, None, *(getattr(slots, field.name) for field in dataclasses.fields(slots)))
    arguments = tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments)
    torch.library.opcheck(torch.ops.holdfast.window_step, (*arguments, 0, 1, 0.25))


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "score is missing", {"score": None}),
        (ValueError, "delay must lie between 0 and the ring's 3", {"delay": 4}),
        (ValueError, "sinks must lie between 0 and the budget of 2", {"sinks": 3}),
        (ValueError, "backend 'cuda' does not exist", {"backend": "cuda"}),
        (ValueError, "score must have the shape", {"score": torch.ones(1, 2, device=DEVICE)}),
        (TypeError, "real must be bool", {"real": torch.ones(1, device=DEVICE)}),
    ],
)
def test_wrong_arguments_are_named(error: type[Exception], message: str, changes: dict[str, object]) -> None:
    tensors = (torch.randn(1, 1, 8, device=DEVICE) for _ in range(3))
    settings: dict[str, object] = {"score": torch.ones(1, 1, device=DEVICE)} | changes
    with pytest.raises(error, match=message):
        window_step(*tensors, empty(1, 1, 3, 2, 8), **settings)  # type: ignore[arg-type]


@pytest.mark.skipif(not NATIVE, reason="there is no C++ compiler, or a GPU")
def test_rows_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[int] = []
    call = one_token._call
    monkeypatch.setattr(threads, "_THREADED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(one_token, "_call", lambda *given: (workers.append(given[-1]), call(*given))[1])
    expected = empty(3, 2, 4, 3, 16)
    actual = selected(expected)
    for _ in range(9):
        q, key, value = (torch.randn(3, heads, 16) for heads in (4, 2, 2))
        score = torch.randn(3, 2)
        ours = window_step(q, key, value, actual, score=score, backend="native")
        theirs = window_step(q, key, value, expected, score=score, backend="reference")
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert_same_state(actual, expected)
    assert workers == [4 if openmp() else 1] * 9
