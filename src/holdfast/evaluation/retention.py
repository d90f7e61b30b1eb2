"""Which tokens a model with learned eviction holds at the end of a sequence, and a picture of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from holdfast.data.needle import NeedleTask
from holdfast.evaluation.inference import device_of, evaluating
from holdfast.mixers import LearnedEviction
from holdfast.mixers.window_state import WindowState
from holdfast.modeling import HybridForCausalLM
from holdfast.pictures import picture

__all__ = ["COLOURS", "LayerRetention", "needle_kinds", "plot_kept_tokens", "retention_map"]

COLOURS = {"noise": "#8c8c8c", "key": "#0072b2", "value": "#d55e00", "question": "#009e73"}
"""Colours of the kinds of tokens, told apart by people with any colour vision (Okabe and Ito)."""
DROPPED = "#f0f0f0"
WINDOW_TINT = 0.55  # how far the colours of the window go towards white


@dataclass(frozen=True)
class LayerRetention:
    """What one layer holds after T tokens.

    Attributes:
        layer: its number in the model.
        scores: [T, Hkv] fp32, s = σ(logit) − ½ of every pair, dropped ones too. The last R // 2 are not final.
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
        ValueError: if the model has no such layer, or if there is more than one sequence.
    """
    ids = input_ids.reshape(1, -1) if input_ids.dim() == 1 else input_ids
    if ids.shape[0] != 1:
        raise ValueError(f"input_ids holds {ids.shape[0]} sequences; give one.")
    if not model.model.has_scorers:
        raise ValueError("the model has no layer of learned eviction, so nothing is chosen to be kept.")
    with evaluating(model):
        output = model(input_ids=ids.to(device_of(model)), use_cache=True)
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


def needle_kinds(task: NeedleTask, token_ids: Sequence[int]) -> list[str]:
    """The kind of each token of a needle sample: noise (the begin marker included), key, value or question.

    A question is the query marker and everything after it.
    """
    kinds: list[str] = []
    for token in token_ids:
        if "question" in kinds[-1:] or token == task.query_token_id:
            kinds.append("question")
        elif token < task.first_key_id:
            kinds.append("noise")
        else:
            kinds.append("key" if token < task.first_value_id else "value")
    return kinds


def plot_kept_tokens(
    layers: Sequence[LayerRetention], kinds: Sequence[str], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Draw what every head holds: tokens along x, coloured by kind, one row per layer and head.

    Args:
        layers: from `retention_map`.
        kinds: the kind of every token, keys of `COLOURS`.
        path: file to write; its ending gives the format (png, svg, pdf). Replaced only when the picture is complete.
        title: above the picture.

    Returns:
        The path written.

    Raises:
        ValueError: if there is no layer, the kinds are not one per token, or one has no colour.
    """
    if not layers:
        raise ValueError("layers is empty; give what retention_map returns.")
    length = len(layers[0].recent)
    if len(kinds) != length:
        raise ValueError(f"there are {len(kinds)} kinds for {length} tokens; give one each.")
    if unknown := sorted(set(kinds) - set(COLOURS)):
        raise ValueError(f"no colour for {', '.join(unknown)}; kinds are {', '.join(COLOURS)}.")
    rows = sum(layer.scores.shape[1] for layer in layers)
    with picture(path, (10, 1.9 + 0.3 * (rows + 1))) as figure:
        axes = figure.add_subplot()
        _draw_cells(axes, layers, kinds)
        _label_rows(axes, layers)
        _mark_window(axes, layers, rows)
        _draw_legend(figure, [kind for kind in COLOURS if kind in kinds])
        if title:
            axes.set_title(title, loc="left", pad=24)
    return Path(path)


def _draw_cells(axes: Axes, layers: Sequence[LayerRetention], kinds: Sequence[str]) -> None:
    """The top row has all tokens; below it each head's, blank where it has dropped them."""
    colours = np.array([to_rgb(COLOURS[kind]) for kind in kinds])
    tinted = np.array([_tinted(COLOURS[kind]) for kind in kinds])
    image = [colours]
    for layer in layers:
        for head in layer.stored.T.numpy():
            cells = np.where(layer.recent.numpy()[:, None], tinted, np.array(to_rgb(DROPPED)))
            image.append(np.where(head[:, None], colours, cells))
    axes.imshow(np.stack(image), aspect="auto", interpolation="nearest")
    rows, length = len(image), len(kinds)
    axes.hlines(np.arange(1, rows) - 0.5, -0.5, length - 0.5, color="white", linewidth=2)
    axes.hlines(0.5, -0.5, length - 0.5, color="white", linewidth=7)
    if length <= 256:
        axes.vlines(np.arange(1, length) - 0.5, -0.5, rows - 0.5, color="white", linewidth=0.8)


def _label_rows(axes: Axes, layers: Sequence[LayerRetention]) -> None:
    names, counts = ["all tokens"], [""]
    for layer in layers:
        for head in range(layer.stored.shape[1]):
            names.append(f"layer {layer.layer}, head {head}")
            counts.append(f"{int(layer.stored[:, head].sum())} of {layer.budget} slots")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(counts)), counts)
    right.tick_params(axis="y", length=0)
    right.spines[:].set_visible(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("position of the token")


def _mark_window(axes: Axes, layers: Sequence[LayerRetention], rows: int) -> None:
    """Brackets around the sinks and the window of the last token, named above."""
    recent = layers[0].recent.nonzero().flatten()
    spans = [(int(recent[0]), int(recent[-1]), "window of the last token")]
    if sinks := min(layers[0].sinks, len(layers[0].recent)):
        spans.append((0, sinks - 1, "sink" if sinks == 1 else "sinks"))
    for first, last, name in spans:
        frame = Rectangle((first - 0.5, -0.5), last - first + 1, rows + 1, fill=False, clip_on=False, zorder=5)
        axes.add_patch(frame)
        alignment = "left" if first == 0 else "right"
        at = first - 0.5 if first == 0 else last + 0.5
        axes.annotate(
            name, (at, -0.5), (0, 4), textcoords="offset points", ha=alignment, va="bottom", annotation_clip=False
        )


def _draw_legend(figure: Figure, kinds: Sequence[str]) -> None:
    entries: dict[str, Any] = {kind: Patch(color=COLOURS[kind]) for kind in kinds}
    entries["in the window"] = tuple(Patch(color=_tinted(COLOURS[kind])) for kind in kinds)
    entries["dropped"] = Patch(facecolor=DROPPED, edgecolor="0.75")
    figure.legend(
        list(entries.values()),
        list(entries),
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="outside lower center",
        ncols=len(entries),
        frameon=False,
    )


def _tinted(colour: str) -> tuple[float, float, float]:
    red, green, blue = (part + (1 - part) * WINDOW_TINT for part in to_rgb(colour))
    return red, green, blue
