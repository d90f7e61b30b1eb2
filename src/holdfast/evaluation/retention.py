"""Which tokens a model with learned eviction holds at the end of a sequence, and a picture of it."""

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
from holdfast.mixers import LearnedEviction
from holdfast.mixers.window_state import WindowState
from holdfast.modeling import HybridForCausalLM

__all__ = ["LayerRetention", "plot_kept_tokens", "retention_map"]


@dataclass(frozen=True)
class LayerRetention:
    """What one layer holds after T tokens.

    Attributes:
        layer: its number in the model.
        scores: [T, Hkv] fp32, s = σ(logit) − threshold of every pair, dropped ones too. The last R // 2 are not final.
        stored: [T, Hkv] bool: pairs in the store, outside the window.
        recent: [T] bool: pairs that the last token's window covers.
        sinks: first tokens of the sequence, never dropped.
        budget: slots of the store, per head.
    """

    layer: int
    scores: Tensor
    stored: Tensor
    recent: Tensor
    sinks: int
    budget: int

    @property
    def visible(self) -> Tensor:
        """[T, Hkv] bool: pairs that the last token can attend to."""
        return self.stored | self.recent.unsqueeze(1)


def retention_map(model: HybridForCausalLM, input_ids: Tensor) -> list[LayerRetention]:
    """Read one sequence and look into the cache.

    Args:
        model: with at least one layer of learned eviction.
        input_ids: [T] or [1, T], int64.

    Returns:
        One entry per layer of learned eviction, on the CPU.

    Raises:
        TypeError: if they are no model and no token ids.
        ValueError: if the model has no such layer, or if there is more than one sequence.
    """
    check_model(model, hybrid=True)
    ids = one_sequence(input_ids)
    if not model.model.has_scorers:
        raise ValueError("the model has no layer of learned eviction, so nothing is chosen to be kept.")
    with evaluating(model):
        output = model(input_ids=ids.to(device_of(model)), use_cache=True, logits_to_keep=1)
    mixers = [(n, block.attn) for n, block in enumerate(model.model.layers) if isinstance(block.attn, LearnedEviction)]
    layers = []
    for (number, mixer), scores in zip(mixers, output.retention.scores, strict=True):
        state = output.past_key_values.layers[number]
        assert isinstance(state, WindowState)
        positions = state.positions[0].cpu().long()  # [Hkv, budget], −1 where empty
        stored = torch.zeros(len(positions), ids.shape[1] + 1, dtype=torch.bool)
        stored.scatter_(1, positions + 1, True)  # empty slots fall into a column in front, which is cut off
        ring = state.ring_positions()[0].cpu()
        recent = torch.zeros(ids.shape[1], dtype=torch.bool)
        recent[ring[ring >= 0]] = True
        options = mixer.options
        layers.append(
            LayerRetention(number, scores[0].float().cpu(), stored[:, 1:].T, recent, options.sinks, options.budget)
        )
    return layers


def plot_kept_tokens(
    layers: Sequence[LayerRetention], kinds: Sequence[str], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Draw what every head holds: tokens along x, coloured by kind, one row per layer and head.

    Args:
        layers: from `retention_map`.
        kinds: the kind of every token, keys of `holdfast.evaluation.token_rows.COLOURS`.
        path: file to write; its ending gives the format (png, svg, pdf). Replaced only when the picture is complete.
        title: above the picture.

    Returns:
        The path written.

    Raises:
        ValueError: if there is no layer, the kinds are not one per token, or one has no colour.
    """
    if not layers:
        raise ValueError("layers is empty; give what retention_map returns.")
    rows = [
        TokenRow(f"layer {layer.layer}, head {head}", f"{int(held.sum())} of {layer.budget} slots", held, layer.recent)
        for layer in layers
        for head, held in enumerate(layer.stored.T)
    ]
    spans = [Span.of(layers[0].recent, "window of the last token")]
    if sinks := min(layers[0].sinks, len(layers[0].recent)):
        spans.append(Span(0, sinks - 1, "sink" if sinks == 1 else "sinks"))
    return plot_token_rows(rows, kinds, spans, path, pale="in the window", absent="dropped", title=title)
