"""Positions, pads and packed documents are decided once, in `TokenLayout`."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.mixers.layout import (
    TokenLayout,
    document_of_column,
    gapped_columns,
    left_aligned_order,
    pads_first,
    plain_layout,
    restore_order,
)


def packed(ends: list[int]) -> TokenLayout:
    offsets = torch.tensor([0, *ends])
    columns = torch.arange(ends[-1])
    starts = offsets[document_of_column(offsets, ends[-1])]
    return TokenLayout(torch.zeros(1, dtype=torch.long), (columns - starts).unsqueeze(0), cu_seqlens=offsets)


@given(mask=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3))
def test_left_alignment_keeps_the_order_of_the_tokens_and_can_be_undone(mask: list[list[bool]]) -> None:
    real = torch.tensor(mask)
    columns = torch.arange(7).expand_as(real)
    order = left_aligned_order(real)
    moved = columns.gather(1, order)
    for row, flags in zip(moved, real, strict=True):
        pads = int((~flags).sum())
        assert row[pads:].tolist() == flags.nonzero().flatten().tolist()
    assert torch.equal(restore_order(moved, order), columns)
    wide = torch.rand(len(mask), 7, 2, 3)
    assert torch.equal(restore_order(wide.gather(1, order[:, :, None, None].expand_as(wide)), order), wide)


@given(past=st.integers(0, 5), pads=st.lists(st.integers(0, 6), min_size=1, max_size=3))
def test_pads_move_before_the_past(past: int, pads: list[int]) -> None:
    length = 6
    rows = torch.arange(past + length).expand(len(pads), -1).unsqueeze(2)
    moved = pads_first(rows, past, torch.tensor(pads)).squeeze(2)
    for row, count in zip(moved.tolist(), pads, strict=True):
        chunk = list(range(past, past + length))
        assert row == chunk[:count] + list(range(past)) + chunk[count:]
    assert pads_first(rows, past, None) is rows


def test_plain_layout() -> None:
    layout = plain_layout(2, 5)
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert layout.num_real.tolist() == [5, 5]
    assert layout.num_pads is layout.starts is layout.last_columns is None
    assert torch.equal(layout.token_positions, layout.positions)
    assert layout.followed_by(2).tolist() == [[True, True, True, False, False]] * 2


def test_pads_have_no_position() -> None:
    real = torch.tensor([[False, False, True, True], [True, True, True, True]])
    layout = TokenLayout(torch.tensor([3, 0]), torch.tensor([[3, 3, 3, 4], [0, 1, 2, 3]]), real)
    assert layout.token_positions.tolist() == [[-1, -1, 3, 4], [0, 1, 2, 3]]
    assert layout.num_pads.tolist() == [2, 0]
    assert layout.num_real.tolist() == [2, 4]
    assert layout.followed_by(1).tolist() == [[False, False, True, False], [True, True, True, False]]


def test_packed_documents_some_of_them_empty() -> None:
    layout = packed([3, 3, 5, 5])
    assert layout.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert layout.starts.tolist() == [[True, False, False, True, False]]
    assert layout.last_columns.tolist() == [[2, 2, 2, 4, 4]]
    assert layout.followed_by(1).tolist() == [[True, True, False, True, False]]
    columns, length = gapped_columns(layout.cu_seqlens, 5, gap=2)
    assert columns.tolist() == [0, 1, 2, 7, 8]
    assert length == 5 + 2 * 4


def test_rotary_tables_are_made_once() -> None:
    layout = plain_layout(1, 4)
    assert layout.rotary(8, 10000.0)[0] is layout.rotary(8, 10000.0)[0]
    assert layout.rotary(4, 10000.0)[0].shape == (1, 4, 2)
