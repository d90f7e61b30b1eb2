"""streaming_retention: which key is forgotten when."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.ops.retention import FOREVER, _compiled_store, streaming_retention, streaming_retention_reference
from holdfast.ops.threads import in_threads

NAN, INF = float("nan"), float("inf")


def column(*scores: float) -> Tensor:
    return torch.tensor(scores)[None, :, None]


def until(*args: object, **kwargs: object) -> list[int]:
    return streaming_retention(*args, **kwargs).flatten().tolist()  # type: ignore[arg-type]


def simulate(scores: list[float], budget: int, window: int, sinks: int, starts: list[bool]) -> list[int]:
    """Query by query, as a decoder lives through it: the last query at which each key is held anywhere."""
    last_seen = [-1] * len(scores)
    store: list[int] = []
    closed: list[int] = []  # the stores of the sequences before
    begin = 0
    score = list(scores)
    for query in range(len(scores) + window + 1):
        leaving = query - window - 1
        if 0 <= leaving < len(scores):
            if starts[leaving]:
                closed, store, begin = closed + store, [], leaving
            if leaving - begin < sinks:
                score[leaving] = INF
            if score[leaving] > 0:
                store.append(leaving)
            if len(store) > budget:
                store.remove(min(store, key=lambda j: (score[j], -j)))
        for j in [*closed, *store, *range(max(0, query - window), min(query + 1, len(scores)))]:
            last_seen[j] = query
    final = len(scores) + window
    return [FOREVER if last == final else last for last in last_seen]


def test_a_store_of_two_worked_by_hand() -> None:
    #        key 0 stays until 3 takes its slot; 2 is worthless; 4 is lower than both; 5 replaces 1
    scores = column(1.0, 2.0, -1.0, 3.0, 0.5, 2.5)
    assert until(scores, 2, 10) == [13, 15, 12, FOREVER, 14, FOREVER]


def test_the_earlier_key_wins_a_tie() -> None:
    assert until(column(1.0, 1.0, 1.0), 1, 0) == [FOREVER, 1, 2]
    # Two equal lowest scores: the later of them makes room.
    assert until(column(1.0, 1.0, 2.0), 2, 5) == [FOREVER, 7, FOREVER]


def test_zero_negative_and_nan_are_not_worth_keeping() -> None:
    scores = column(0.0, -0.0, -1.0, NAN, -INF, 1e-30)
    expected = [3, 4, 5, 6, 7, FOREVER]
    assert until(scores, 10, 3) == expected
    assert until(scores, None, 3) == expected
    assert streaming_retention_reference(scores, 10, 3).flatten().tolist() == expected


def test_sinks_are_never_forgotten() -> None:
    scores = column(-1.0, NAN, 1.0, INF, 5.0, INF)
    assert until(scores, 2, 1, 2) == [FOREVER, FOREVER, 3, 4, 5, 6]
    assert until(scores, 3, 1, 2) == [FOREVER, FOREVER, 4, FOREVER, 5, 6]
    assert until(scores, None, 1, 2) == [FOREVER] * 6


def test_a_new_sequence_empties_the_store_and_has_sinks_of_its_own() -> None:
    scores = column(3.0, -1.0, 1.0, -2.0, 2.0)
    starts = torch.tensor([[True, False, True, False, False]])
    assert until(scores, 1, 4, starts=starts) == [FOREVER, 5, 8, 7, FOREVER]
    assert until(scores, 1, 4, 1, starts=starts) == [FOREVER, 5, FOREVER, 7, 8]
    assert until(scores, None, 4, 2, starts=starts) == [FOREVER] * 5
    # The beginning of the row needs no mark.
    starts[0, 0] = False
    assert until(scores, 1, 4, 1, starts=starts) == [FOREVER, 5, FOREVER, 7, 8]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(0, 40),
    budget=st.sampled_from([0, 1, 2, 3, 5, 8, 100]),
    window=st.integers(0, 6),
    sinks=st.integers(0, 4),
    ties=st.booleans(),
    packed=st.booleans(),
    backend=st.sampled_from([None, "numba"]),
)
def test_equals_the_reference_and_the_simulation(
    seed: int, length: int, budget: int, window: int, sinks: int, ties: bool, packed: bool, backend: str | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, length, 2, generator=generator)
    if ties:
        values = torch.tensor([-1.0, 0.0, 0.25, 0.5, 0.75, INF, NAN])
        scores = values[torch.randint(len(values), scores.shape, generator=generator)]
    starts = (torch.rand(2, length, generator=generator) < 0.2) & packed
    sinks = min(sinks, budget)

    result = streaming_retention(scores, budget, window, sinks, starts=starts, backend=backend)
    assert torch.equal(result, streaming_retention_reference(scores, budget, window, sinks, starts=starts))
    for b in range(2):
        for h in range(2):
            row = simulate(scores[b, :, h].tolist(), budget, window, sinks, starts[b].tolist())
            assert result[b, :, h].tolist() == row


def test_no_more_keys_than_the_budget_are_alive_beyond_the_window() -> None:
    torch.manual_seed(0)
    length, budget, window = 400, 12, 20
    last = streaming_retention(torch.randn(2, length, 3), budget, window, 4)
    j = torch.arange(length)[None, :, None]
    assert bool((last >= j + window).all())
    for query in range(length):
        alive = ((j + window < query) & (last >= query)).sum(dim=1)
        assert int(alive.max()) <= budget


def test_an_uncapped_store_keeps_what_a_large_one_keeps() -> None:
    torch.manual_seed(1)
    scores, starts = torch.randn(3, 70, 2), torch.rand(3, 70) < 0.1
    for sinks in (0, 3):
        large = streaming_retention(scores, 1000, 5, sinks, starts=starts, backend="numba")
        assert torch.equal(streaming_retention(scores, None, 5, sinks, starts=starts), large)


@pytest.mark.parametrize("length", [0, 1, 6, 7, 8])
def test_as_many_slots_as_keys_need_no_store(length: int) -> None:
    """Around that number the answer comes by one way or the other, and is the same."""
    torch.manual_seed(7)
    scores, starts = torch.randn(2, length, 3), torch.rand(2, length) < 0.3
    for sinks, begins in ((0, None), (2, None), (2, starts), (7, starts)):
        chosen, by_hand = (streaming_retention(scores, 7, 3, sinks, starts=begins, backend=b) for b in (None, "numba"))
        assert chosen.dtype == by_hand.dtype
        assert torch.equal(chosen, by_hand)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    scores = torch.randn(2, 100, 2).to(dtype)
    result = streaming_retention(scores, 7, 3, 2)
    assert torch.equal(result, streaming_retention_reference(scores, 7, 3, 2))
    assert result.dtype == torch.int64


def test_float64_scores_are_not_rounded_before_they_are_compared() -> None:
    scores = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)[None, :, None]
    assert until(scores, 1, 0) == [1, FOREVER]


def test_many_scores_take_the_threaded_path_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    scores, starts = torch.randn(3, 200, 5), torch.rand(3, 200) < 0.02
    alone = streaming_retention(scores, 9, 4, 2, starts=starts)
    monkeypatch.setattr("holdfast.ops.retention._THREADED_SIZE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    parts: list[tuple[int, int]] = []

    def recorded(run: Callable[[int, int], object], count: int, workers: int) -> None:
        assert workers == 4
        in_threads(lambda *part: (parts.append(part), run(*part)), count, workers)

    monkeypatch.setattr("holdfast.ops.retention.in_threads", recorded)
    assert torch.equal(streaming_retention(scores, 9, 4, 2, starts=starts), alone)
    assert len(parts) > 1


def test_non_contiguous_scores_that_need_gradients() -> None:
    torch.manual_seed(4)
    scores = torch.randn(2, 3, 50, requires_grad=True).transpose(1, 2)
    result = streaming_retention(scores, 5, 4)
    assert not result.requires_grad
    assert torch.equal(result, streaming_retention(scores.detach().contiguous(), 5, 4))


def test_empty_inputs() -> None:
    assert streaming_retention(torch.empty(2, 0, 3), 4, 1).shape == (2, 0, 3)
    assert streaming_retention(torch.empty(0, 5, 3), 4, 1).shape == (0, 5, 3)


def test_the_operator_is_well_registered() -> None:
    scores, starts = torch.randn(2, 9, 3), torch.zeros(2, 9, dtype=torch.bool)
    torch.library.opcheck(torch.ops.holdfast.streaming_retention, (scores, 4, 2, 1, starts))
    torch.library.opcheck(torch.ops.holdfast.streaming_retention, (scores, 4, 2, 1, None))


def test_compiles_without_a_graph_break() -> None:
    def model(scores: Tensor) -> Tensor:
        return streaming_retention(scores.sin(), 3, 2) + streaming_retention(scores.sin(), None, 2)

    scores = torch.randn(1, 20, 2)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(scores), model(scores))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "floating", {"scores": torch.ones(1, 3, 1, dtype=torch.int64)}),
        (ValueError, r"\[B, T, Hkv\]", {"scores": torch.ones(3, 1)}),
        (ValueError, "budget must not be negative", {"budget": -1}),
        (ValueError, "window must not be negative", {"window": -1}),
        (ValueError, "sinks must not be negative", {"sinks": -1}),
        (ValueError, "5 sinks do not fit in a budget of 4", {"sinks": 5}),
        (TypeError, "starts must be bool", {"starts": torch.zeros(1, 3)}),
        (ValueError, "starts must have the shape", {"starts": torch.zeros(1, 4, dtype=torch.bool)}),
    ],
)
def test_wrong_arguments_are_named(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    given_arguments = {"scores": torch.ones(1, 3, 1), "budget": 4, "window": 2, "sinks": 0} | arguments
    with pytest.raises(error, match=message):
        streaming_retention(**given_arguments)  # type: ignore[arg-type]


def test_the_store_is_compiled_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])  # none of them finds a folder
    run = _compiled_store.__wrapped__()
    until = np.empty((1, 3), dtype=np.int64)
    run(0, 1, np.array([[1.0, 2.0, -1.0]], dtype=np.float32), np.zeros((1, 3), dtype=bool), until, 1, 1, 1, 0)
    assert until.tolist() == [[2, FOREVER, 3]]
