"""Which blocks a model with native sparse attention reads at the end of a sequence, and a picture of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from holdfast.evaluation.arguments import check_model
from holdfast.evaluation.inference import device_of, evaluating, one_sequence
from holdfast.evaluation.token_rows import Span, TokenRow, plot_token_rows
from holdfast.mixers import NativeSparseAttention
from holdfast.modeling import HybridForCausalLM

__all__ = ["LayerSelection", "plot_selected_blocks", "selection_map"]


@dataclass(frozen=True)
class LayerSelection:
    """What the last of T tokens reads in one layer.

    Attributes:
        layer: its number in the model.
        blocks: [Hkv, n] int64, numbers of the blocks read in full, −1 where there are fewer.
        selected: [T, Hkv] bool: tokens in these blocks.
        recent: [T] bool: tokens in its window.
        block_size: tokens of a block.
    """

    layer: int
    blocks: Tensor
    selected: Tensor
    recent: Tensor
    block_size: int


def selection_map(model: HybridForCausalLM, input_ids: Tensor) -> list[LayerSelection]:
    """Read one sequence and see what its last token reads in full.

    Args:
        model: with at least one layer of native sparse attention.
        input_ids: [T] or [1, T], int64.

    Returns:
        One entry per layer of native sparse attention, on the CPU.

    Raises:
        TypeError: if they are no model and no token ids.
        ValueError: if the model has no such layer, or if there is more than one sequence.
    """
    check_model(model, hybrid=True)
    ids = one_sequence(input_ids)
    blocks = [block.attn for block in model.model.layers]
    mixers = [(n, mixer) for n, mixer in enumerate(blocks) if isinstance(mixer, NativeSparseAttention)]
    if not mixers:
        raise ValueError("the model has no layer of native sparse attention, so no blocks are selected.")
    with evaluating(model):
        output = model(input_ids=ids.to(device_of(model)), use_cache=False, output_selection=True, logits_to_keep=1)
    position = torch.arange(ids.shape[1])
    layers = []
    for (number, mixer), selection in zip(mixers, output.selection, strict=True):
        options, chosen = mixer.options, selection[0, -1].cpu()
        selected = (position[:, None, None] // options.block_size == chosen).any(-1)
        recent = position > ids.shape[1] - 1 - options.window
        layers.append(LayerSelection(number, chosen, selected, recent, options.block_size))
    return layers


def plot_selected_blocks(
    layers: Sequence[LayerSelection], kinds: Sequence[str], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Draw what the last token reads: tokens along x, coloured by kind, one row per layer and head.

    Args:
        layers: from `selection_map`.
        kinds: the kind of every token, keys of `holdfast.evaluation.token_rows.COLOURS`.
        path: file to write; its ending gives the format (png, svg, pdf). Replaced only when the picture is complete.
        title: above the picture.

    Returns:
        The path written.

    Raises:
        ValueError: if there is no layer, the kinds are not one per token, or one has no colour.
    """
    if not layers:
        raise ValueError("layers is empty; give what selection_map returns.")
    rows = []
    for layer in layers:
        total = -(-len(layer.recent) // layer.block_size)
        for head, chosen in enumerate(layer.blocks):
            note = f"{int((chosen >= 0).sum())} of {total} blocks"
            rows.append(TokenRow(f"layer {layer.layer}, head {head}", note, layer.selected[:, head], layer.recent))
    spans = [Span.of(layers[0].recent, "window of the last token")]
    return plot_token_rows(rows, kinds, spans, path, pale="in the window", absent="in block means only", title=title)
