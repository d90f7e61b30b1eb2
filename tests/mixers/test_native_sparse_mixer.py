"""The growing state of native sparse attention, and the blocks that a model says it read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from holdfast import HybridCache, HybridForCausalLM
from holdfast.mixers import MIXERS
from holdfast.mixers.layout import TokenLayout
from holdfast.mixers.native_sparse_attention import NativeSparseOptions, NativeSparseState, tokens_first

ModelFactory = Callable[..., HybridForCausalLM]


def append(state: NativeSparseState, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor) -> None:
    """Put tokens where `real` [B, T] into a state, as the mixer does; pads stand in front."""
    seen = append.seen if state.columns else torch.zeros(k.shape[0], dtype=torch.long)  # type: ignore[attr-defined]
    positions = seen.unsqueeze(1) + (real.cumsum(1) - 1).clamp(min=0)
    layout = TokenLayout(seen, positions, None if real.all() else real, None, state.columns == 0)
    state.append(tokens_first(k, layout), tokens_first(v, layout), layout)
    state.advance(k.shape[1])
    append.seen = seen + layout.num_real  # type: ignore[attr-defined]


@pytest.mark.parametrize("block_size", [1, 3, 8, 50])
def test_rows_and_means_are_those_of_each_rows_tokens(block_size: int) -> None:
    """However unequal the rows: token p in row p, and the mean of each complete block."""
    generator = torch.Generator().manual_seed(block_size)
    state = NativeSparseState(2, 4, block_size)
    kept: list[list[torch.Tensor]] = [[], [], []]
    for length in (5, 1, 30, 1, 1, 17):
        k, v = torch.randn(2, 3, length, 2, 4, generator=generator)
        pads = torch.randint(0, length + 1, (3, 1), generator=generator)
        pads[0] = 0
        real = torch.arange(length) >= pads
        append(state, k, v, real)
        for row in range(3):
            kept[row].append(torch.cat([k, v], dim=-1)[row, real[row]])
    keys, values, (mean_keys, mean_values) = state.pairs(0)
    for row in range(3):
        pairs = torch.cat(kept[row])
        assert torch.equal(torch.cat([keys, values], dim=-1)[row, : len(pairs)], pairs)
        complete = len(pairs) // block_size
        expected = pairs[: complete * block_size].view(complete, block_size, 2, 8).mean(1)
        torch.testing.assert_close(torch.cat([mean_keys, mean_values], dim=-1)[row, :complete], expected)


def test_growing_copies_seldom_and_wastes_little() -> None:
    state = NativeSparseState(1, 4, 4)
    moves, address = 0, None
    k = torch.ones(1, 1, 1, 4)
    for tokens in range(1, 3001):
        append(state, k, k, torch.ones(1, 1, dtype=torch.bool))
        moves, address = moves + (state.keys.data_ptr() != address), state.keys.data_ptr()
        assert tokens <= state.keys.shape[2] < tokens * 1.125 + 4
        assert state.nbytes == state.bytes_for(1, torch.float32, tokens)
    assert moves < 100


def test_half_precision_sums_its_means_in_fp32() -> None:
    state = NativeSparseState(1, 4, 512)
    k = torch.full((1, 1, 1, 4), 1.0 + 2**-7, dtype=torch.bfloat16)
    for _ in range(512):
        append(state, k, k, torch.ones(1, 1, dtype=torch.bool))
    assert (state.keys.dtype, state.mean_keys.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(state.mean_keys[0, 0, 0], k[0, 0, 0].float(), atol=1e-5, rtol=0)


def test_the_selection_is_returned_where_asked_for_however_tokens_arrive(small_model: ModelFactory) -> None:
    model = small_model("native_sparse_attention", "gated_deltanet", "native_sparse_attention")
    ids = torch.stack([torch.randperm(100, generator=torch.Generator().manual_seed(n))[:40] for n in range(2)])
    with torch.no_grad():
        assert model(ids).selection is None
        whole = model(ids, use_cache=False, output_selection=True).selection
        assert [blocks.shape for blocks in whole] == [(2, 40, 2, 4)] * 2
        assert all(blocks.dtype == torch.int64 for blocks in whole)
        cache, parts = HybridCache(model.config), []
        for chunk in ids.split([7, 1, 1, 20, 11], dim=1):
            parts.append(model(chunk, past_key_values=cache, output_selection=True).selection)
        for blocks, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(pieces, dim=1), blocks)
        mask = torch.ones(2, 50)
        mask[0, 30:40], mask[1, :10] = 0, 0
        padded = torch.zeros(2, 50, dtype=torch.long)
        padded[mask.bool()] = ids.flatten()
        selection = model(padded, attention_mask=mask, use_cache=False, output_selection=True).selection
        packed = model(ids.view(1, 80), cu_seqlens=torch.tensor([0, 40, 80]), output_selection=True).selection
    for blocks, others, joined in zip(whole, selection, packed, strict=True):
        assert torch.equal(others[mask.bool()], blocks.flatten(0, 1))
        assert bool((others[~mask.bool()] == -1).all())
        assert torch.equal(joined.view_as(blocks), blocks)


def test_models_without_blocks_have_an_empty_selection(small_model: ModelFactory) -> None:
    out = small_model("gated_deltanet")(torch.arange(9).view(1, -1), output_selection=True)
    assert out.selection == ()


@pytest.mark.parametrize("name", ["block_size", "num_blocks", "window"])
def test_options_out_of_range_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"'native_sparse_attention': {name} must be at least 1, got 0"):
        MIXERS["native_sparse_attention"].Options.from_mapping("native_sparse_attention", {"num_heads": 2, name: 0})
    assert NativeSparseOptions(num_heads=4).block_size == 64
