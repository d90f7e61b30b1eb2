"""The store, token by token and in chunks, holds what the rule of specification §3.3 says, ties included."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from holdfast.mixers.layout import TokenLayout
from holdfast.mixers.softmax_attention import gather_rows
from holdfast.mixers.window_state import WindowState
from holdfast.ops.retention import streaming_retention, streaming_retention_reference

SCORES = st.lists(st.sampled_from([-0.3, 0.0, 0.1, 0.2, 0.3]), min_size=1, max_size=30)


def pair(position: Tensor | int) -> Tensor:
    """A key or value [..., 2] that says where it comes from."""
    return torch.as_tensor(position, dtype=torch.float32).unsqueeze(-1).expand(*torch.as_tensor(position).shape, 2)


def layout_at(start: int, length: int) -> TokenLayout:
    return TokenLayout(torch.tensor([start]), torch.arange(start, start + length).unsqueeze(0), fresh=start == 0)


def stored(state: WindowState) -> set[int]:
    return {position for position in state.positions[0, 0].tolist() if position >= 0}


def alive(scores: Tensor, budget: int, window: int, sinks: int) -> set[int]:
    """Positions outside the window that the next query's predecessor still sees."""
    last = scores.shape[1] - 1
    until = streaming_retention_reference(scores, budget, window, sinks)[0, :, 0]
    return {j for j in range(last - window) if until[j] >= last}


@given(
    scores=SCORES, budget=st.integers(1, 4), window=st.integers(1, 6), sinks=st.integers(0, 2), reach=st.integers(0, 2)
)
def test_single_tokens(scores: list[float], budget: int, window: int, sinks: int, reach: int) -> None:
    sinks = min(sinks, budget)
    state = WindowState(1, 2, window, budget, delay=reach)
    state.allocate(1, torch.float32, "cpu")
    for position in range(len(scores)):
        final = torch.tensor([[scores[position - reach] if position >= reach else -9.0]])
        new = pair(position)[None, None]
        state.steps(new[None], new[None], new[None], final[None], sinks, None)
        expected = alive(torch.tensor(scores[: position + 1])[None, :, None], budget, window, sinks)
        assert stored(state) == expected
        for slot, held in enumerate(state.positions[0, 0].tolist()):
            assert held < 0 or state.keys[0, 0, slot, 0] == state.values[0, 0, slot, 0] == held
        recent = state.keys[0, 0, budget:, 0][state.ring_positions()[0] >= 0].tolist()
        assert sorted(recent) == list(range(max(0, position - window), position + 1))


@given(
    scores=SCORES, lengths=st.lists(st.integers(1, 9), max_size=5), budget=st.integers(1, 4), window=st.integers(0, 6)
)
def test_chunks(scores: list[float], lengths: list[int], budget: int, window: int) -> None:
    state = WindowState(1, 2, window, budget)
    state.allocate(1, torch.float32, "cpu")
    start = 0
    for length in [*lengths, len(scores)]:
        chunk = torch.tensor(scores[start : start + length])[None, :, None]
        if chunk.shape[1] == 0:
            break
        new = pair(torch.arange(start, start + chunk.shape[1]))[None, :, None]
        layout = layout_at(start, chunk.shape[1])
        rows = gather_rows(new, new, chunk, layout, state)
        ranked = rows.scores.masked_fill(rows.positions < 0, -torch.inf)
        state.write_rows(rows, streaming_retention(ranked, budget, window), layout)
        start += chunk.shape[1]
        expected = alive(torch.tensor(scores[:start])[None, :, None], budget, window, 0)
        assert stored(state) == expected
        for slot, held in enumerate(state.positions[0, 0].tolist()):
            assert held < 0 or state.keys[0, 0, slot, 0] == held
        past = state.past_rows()
        filled = past.positions[0, :, 0] >= 0
        positions = past.positions[0, filled, 0].tolist()
        assert positions == sorted(positions)
        assert past.keys[0, filled, 0, 0].tolist() == positions
