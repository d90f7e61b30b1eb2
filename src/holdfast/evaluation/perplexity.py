"""How well a model predicts text, overall and by position in the context."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from holdfast.data.progress import track
from holdfast.data.text import collate_isolated
from holdfast.evaluation.inference import device_of, evaluating, perplexity

__all__ = ["PerplexityResult", "PositionBin", "evaluate_perplexity"]

IGNORED = -100  # labels that are not predicted
TOKENS_AT_ONCE = 1024  # whose logits are held in fp32


@dataclasses.dataclass(frozen=True)
class PositionBin:
    """Predicted tokens at positions `start` to `stop` − 1 of their document or block; position 0 is its first token."""

    start: int
    stop: int
    tokens: int
    mean_nll: float | None

    @property
    def perplexity(self) -> float | None:
        """exp of the mean negative log-likelihood, None without tokens."""
        return None if self.mean_nll is None else perplexity(self.mean_nll)


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """Result of `evaluate_perplexity`.

    Attributes:
        blocks: blocks read.
        tokens: tokens predicted; the first of a block has nothing to be predicted from and does not count.
        mean_nll: mean negative log-likelihood of a token, in nats.
        bins: the same by position, in rising order.
    """

    blocks: int
    tokens: int
    mean_nll: float
    bins: tuple[PositionBin, ...]

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; V for a model that finds all V tokens equally likely."""
        return perplexity(self.mean_nll)

    @property
    def bits_per_token(self) -> float:
        """Mean negative log-likelihood in bits; bits per byte with the byte tokenizer."""
        return self.mean_nll / math.log(2)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for JSON."""
        return {
            "blocks": self.blocks,
            "tokens": self.tokens,
            "mean_nll": self.mean_nll,
            "perplexity": self.perplexity,
            "bits_per_token": self.bits_per_token,
            "bins": [dataclasses.asdict(part) | {"perplexity": part.perplexity} for part in self.bins],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PerplexityResult":
        """Inverse of `to_dict`."""
        return cls(
            blocks=data["blocks"],
            tokens=data["tokens"],
            mean_nll=data["mean_nll"],
            bins=tuple(
                PositionBin(part["start"], part["stop"], part["tokens"], part["mean_nll"]) for part in data["bins"]
            ),
        )


def evaluate_perplexity(
    model: nn.Module,
    blocks: Iterable[dict[str, torch.Tensor]],
    *,
    batch_size: int = 8,
    max_blocks: int | None = None,
    position_bins: int = 8,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> PerplexityResult:
    """Predict every token of the blocks from those before it in its block, or in its document where blocks isolate.

    Blocks may be longer than those of training: that is how extrapolation is measured. The model is read in eval mode
    without gradients, and put back in the mode that it came in. Beside the model's own memory, O(1,024 · V).

    Args:
        model: called as `model(input_ids=…, use_cache=False)`, int64 [B, L]; its `.logits` are [B, L, V]. Blocks with
            `cu_seqlens` are joined, and it is called with `input_ids` [1, B·L] and `cu_seqlens`. It stays where it is.
        blocks: such as a `PackedText`: dictionaries with `input_ids`, int64 [L], all of one length, and optionally
            `labels` (aligned; −100 is not counted) and `cu_seqlens`.
        batch_size: blocks per call B, at least 1.
        max_blocks: read the first blocks only; None reads all.
        position_bins: number of bins of (nearly) equal width over the positions.
        device: where the inputs go; None is the device of the model's first parameter, or the CPU.
        progress: show a progress bar when standard error is a terminal.

    Raises:
        ValueError: a count is below 1, blocks differ in length, or there is no token to predict.
    """
    counts = {"batch_size": batch_size, "position_bins": position_bins, "max_blocks": max_blocks}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; give at least 1.")
    device = device_of(model) if device is None else torch.device(device)
    total = math.ceil(min(len(blocks), max_blocks or len(blocks)) / batch_size) if isinstance(blocks, Sized) else None
    read = length = 0
    positions: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    with evaluating(model):
        for batch in track(
            _batches(itertools.islice(blocks, max_blocks), batch_size), "perplexity", total=total, progress=progress
        ):
            length = length or len(batch[0]["input_ids"])
            _check_lengths(batch, length, read)
            read += len(batch)
            position, nll = _predict(model, batch, device)
            positions.append(position)
            losses.append(nll)
    if not sum(map(len, losses)):
        raise ValueError("the blocks hold no token to predict; give blocks of 2 tokens or more with labels.")
    position, nll = np.concatenate(positions), np.concatenate(losses)
    return PerplexityResult(read, len(nll), float(nll.mean()), _by_position(position, nll, length, position_bins))


def _batches(blocks: Iterable[dict[str, torch.Tensor]], size: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    blocks = iter(blocks)
    while batch := list(itertools.islice(blocks, size)):
        yield batch


def _check_lengths(batch: list[dict[str, torch.Tensor]], length: int, first: int) -> None:
    for index, block in enumerate(batch, start=first):
        if len(block["input_ids"]) != length:
            raise ValueError(
                f"block {index} has {len(block['input_ids'])} tokens, block 0 has {length}; give blocks of one length."
            )


def _predict(
    model: nn.Module, batch: list[dict[str, torch.Tensor]], device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Position (in its document or block) and negative log-likelihood (float64) of every predicted token of a batch."""
    if "cu_seqlens" in batch[0]:
        joined = collate_isolated(batch)
        arguments = {"cu_seqlens": joined["cu_seqlens"].to(device)}
        starts = joined["cu_seqlens"][:-1].repeat_interleave(joined["cu_seqlens"].diff())
    else:
        names = [name for name in ("input_ids", "labels") if name in batch[0]]
        joined = {name: torch.stack([block[name] for block in batch]) for name in names}
        arguments = {}
        starts = torch.zeros(joined["input_ids"].shape[1], dtype=torch.int64)
    labels = joined.get("labels", joined["input_ids"])[:, 1:]
    position = (torch.arange(len(starts)) - starts)[1:].expand_as(labels)
    logits = model(input_ids=joined["input_ids"].to(device), use_cache=False, **arguments).logits[:, :-1]
    nll = torch.stack([_nll(row, targets) for row, targets in zip(logits, labels.to(device), strict=True)]).cpu()
    counted = labels != IGNORED
    return position[counted].numpy(), nll[counted].double().numpy()


def _nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods, fp32 [T], of logits [T, V] and labels [T]; 0 where the label is −100."""
    pieces = zip(logits.split(TOKENS_AT_ONCE), labels.split(TOKENS_AT_ONCE), strict=True)
    return torch.cat([F.cross_entropy(part.float(), target, reduction="none") for part, target in pieces])


def _by_position(position: np.ndarray, nll: np.ndarray, length: int, count: int) -> tuple[PositionBin, ...]:
    edges = np.unique(np.linspace(0, length, count + 1).round().astype(np.int64))
    bins = []
    for start, stop in itertools.pairwise(edges.tolist()):
        selected = nll[(start <= position) & (position < stop)]
        bins.append(PositionBin(start, stop, len(selected), float(selected.mean()) if len(selected) else None))
    return tuple(bins)
