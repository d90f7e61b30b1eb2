"""What a model holds and reads at every step of one sequence, as data and as a page to look at."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from holdfast.evaluation.arguments import check_model
from holdfast.evaluation.inference import device_of, evaluating, one_sequence
from holdfast.files import write_text
from holdfast.mixers import LearnedEviction, NativeSparseAttention
from holdfast.modeling import HybridForCausalLM
from holdfast.ops.retention import streaming_retention
from holdfast.pages import fill_template

__all__ = ["InspectedEviction", "InspectedSelection", "inspect_sequence", "write_inspection"]


@dataclass(frozen=True)
class InspectedEviction:
    """A layer of learned eviction over T tokens.

    Attributes:
        layer: its number in the model.
        scores: per KV head, T retention scores (fp32, above 0: worth keeping); the last R // 2 are not final.
        until: per KV head and token, the last step that can see its pair; T where that is the last one or later.
        window: past tokens that a query sees besides the store.
        budget: slots of the store, per head.
        sinks: first tokens, never dropped.
    """

    layer: int
    scores: list[list[float]]
    until: list[list[int]]
    window: int
    budget: int
    sinks: int


@dataclass(frozen=True)
class InspectedSelection:
    """A layer of native sparse attention over T tokens.

    Attributes:
        layer: its number in the model.
        blocks: per KV head and step, the numbers of the blocks read in full.
        window: tokens that a query sees in any case, itself included.
        block_size: tokens of a block.
    """

    layer: int
    blocks: list[list[list[int]]]
    window: int
    block_size: int


def inspect_sequence(model: HybridForCausalLM, input_ids: Tensor) -> list[InspectedEviction | InspectedSelection]:
    """Read one sequence in one pass; what a cache would hold at each step follows from the scores.

    Args:
        model: with at least one layer of learned eviction or native sparse attention.
        input_ids: [T] or [1, T], int64.

    Returns:
        One entry per such layer, first to last. O(T) numbers per head, O(T · n) for selections of n blocks.

    Raises:
        TypeError: if they are no model and no token ids.
        ValueError: if the model has no such layer, if there is more than one sequence, or no token.
    """
    check_model(model, hybrid=True)
    ids = one_sequence(input_ids)
    if ids.shape[1] == 0:
        raise ValueError("there is nothing to inspect: the sequence is empty.")
    mixers = [(number, block.attn) for number, block in enumerate(model.model.layers)]
    looked_at = [(n, mixer) for n, mixer in mixers if isinstance(mixer, LearnedEviction | NativeSparseAttention)]
    if not looked_at:
        raise ValueError("the model neither evicts nor selects: no layer of learned eviction or sparse attention.")
    selects = any(isinstance(mixer, NativeSparseAttention) for _, mixer in looked_at)
    with evaluating(model):
        output = model(input_ids=ids.to(device_of(model)), use_cache=False, output_selection=selects, logits_to_keep=1)
    scores = iter(output.retention.scores if output.retention is not None else ())
    selections = iter(output.selection or ())
    return [
        _eviction(n, mixer, next(scores))
        if isinstance(mixer, LearnedEviction)
        else _selection(n, mixer, next(selections))
        for n, mixer in looked_at
    ]


def _eviction(number: int, mixer: LearnedEviction, scores: Tensor) -> InspectedEviction:
    options = mixer.options
    until = streaming_retention(scores.float(), options.budget, options.window, options.sinks)
    until = until[0].clamp(max=scores.shape[1]).T.cpu()
    rounded = [[round(score, 4) for score in head] for head in scores[0].float().T.cpu().tolist()]
    return InspectedEviction(number, rounded, until.tolist(), options.window, options.budget, options.sinks)


def _selection(number: int, mixer: NativeSparseAttention, chosen: Tensor) -> InspectedSelection:
    options = mixer.options
    blocks = [[[b for b in step if b >= 0] for step in head] for head in chosen[0].transpose(0, 1).cpu().tolist()]
    return InspectedSelection(number, blocks, options.window, options.block_size)


def write_inspection(
    layers: Sequence[InspectedEviction | InspectedSelection],
    tokens: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str,
) -> Path:
    """Write one HTML page that needs neither network nor server. What the tokens say is shown, never run.

    Args:
        layers: from `inspect_sequence`.
        tokens: text of each token.
        path: file to write, replaced only when the page is complete.
        title: heading of the page, such as the name of the model.

    Returns:
        The path written.

    Raises:
        ValueError: if there is no layer, or the tokens are not as many as in the layers.
    """
    if not layers:
        raise ValueError("layers is empty; give what inspect_sequence returns.")
    length = len(layers[0].until[0]) if isinstance(layers[0], InspectedEviction) else len(layers[0].blocks[0])
    if len(tokens) != length:
        raise ValueError(f"there are {len(tokens)} texts for {length} tokens; give one each.")
    data = json.dumps({"tokens": list(tokens), "layers": [asdict(layer) for layer in layers]}, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # none of them may end the script element, or a line of it
        data = data.replace(character, f"\\u{ord(character):04x}")
    values = {"title": html.escape(title), "data": data}
    return write_text(path, fill_template("holdfast.evaluation", "inspection.html", values))
