"""What `evaluate_perplexity` finds: sums over each block, and the numbers and intervals that follow from them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from holdfast.evaluation.inference import perplexity
from holdfast.evaluation.ratios import Estimate

__all__ = ["BlockSums", "PerplexityResult", "PositionBin", "exp_interval"]


@dataclasses.dataclass(frozen=True)
class PositionBin:
    """Predicted tokens at positions `start` to `stop` − 1 of their block; position 0 is its first token.

    Where blocks isolate, positions count from the start of the document, or from that of the block if the document
    began in an earlier one: the rest of a long document counts as a document of its own.

    Attributes:
        tokens: predicted.
        mean_nll: mean negative log-likelihood of a token, in nats; None without tokens.
        interval: 95 % interval of that over blocks, None where fewer than two have tokens here.
        bytes: of text that the tokens stand for; None where that is not known.
    """

    start: int
    stop: int
    tokens: int
    mean_nll: float | None
    interval: tuple[float, float] | None = None
    bytes: int | None = None

    @property
    def perplexity(self) -> float | None:
        """exp of the mean negative log-likelihood, None without tokens."""
        return None if self.mean_nll is None else perplexity(self.mean_nll)

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        """exp of the ends of the interval."""
        return exp_interval(self.interval)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            **dataclasses.asdict(self),
            "interval": _listed(self.interval),
            "perplexity": self.perplexity,
            "perplexity_interval": _listed(self.perplexity_interval),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PositionBin":
        """Inverse of `to_dict`; of what was written before there were intervals and bytes too."""
        interval = data.get("interval")
        return cls(
            data["start"],
            data["stop"],
            data["tokens"],
            data["mean_nll"],
            None if interval is None else (interval[0], interval[1]),
            data.get("bytes"),
        )


@dataclasses.dataclass(frozen=True)
class BlockSums:
    """What was found in one block: from these all numbers and intervals follow.

    Attributes:
        block: its `block_digest`; models that have read the same blocks can be compared block by block.
        tokens: predicted ones, by bin of positions.
        nll: sums of their negative log-likelihoods, in nats.
        bytes: of text that they stand for; None where that is not known.
    """

    block: str
    tokens: tuple[int, ...]
    nll: tuple[float, ...]
    bytes: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """Result of `evaluate_perplexity`.

    Intervals are those of 95 % of a ratio of sums over blocks (`holdfast.evaluation.ratios`): they tell what other
    blocks like these would give this model, and nothing of other seeds of its training.

    Attributes:
        blocks: blocks read.
        tokens: tokens predicted; the first of a block has nothing to be predicted from and does not count.
        mean_nll: mean negative log-likelihood of a token, in nats.
        bins: the same by position, in rising order.
        bytes: UTF-8 bytes of text that the predicted tokens stand for; None where that is not known.
        by_block: what was found in each block; empty in results that were written without.
    """

    blocks: int
    tokens: int
    mean_nll: float
    bins: tuple[PositionBin, ...]
    bytes: int | None = None
    by_block: tuple[BlockSums, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; V for a model that finds all V tokens equally likely."""
        return perplexity(self.mean_nll)

    @property
    def bits_per_token(self) -> float:
        """Mean negative log-likelihood in bits; with the byte tokenizer per byte, ends of documents counted too."""
        return self.mean_nll / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits of all predicted tokens, ends of documents too, per byte of text that they stand for.

        Unlike perplexities these can be compared between tokenizers, on the same text. None where the bytes are not
        known.
        """
        return self.mean_nll * self.tokens / self.bytes / math.log(2) if self.bytes else None

    @property
    def loss(self) -> Estimate | None:
        """The mean negative log-likelihood with its error; None if the blocks are not known."""
        return self._loss(None)

    def _loss(self, part: int | None) -> Estimate | None:
        """Of the tokens of one bin, or of all."""
        chosen = slice(None) if part is None else slice(part, part + 1)
        nll = [sum(each.nll[chosen]) for each in self.by_block]
        return Estimate.ratio(nll, [sum(each.tokens[chosen]) for each in self.by_block])

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean negative log-likelihood; None with fewer than two blocks."""
        return None if self.loss is None else self.loss.interval

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        """Of the perplexity: exp of the ends of `interval`."""
        return exp_interval(self.interval)

    @property
    def bits_per_byte_interval(self) -> tuple[float, float] | None:
        """Of the bits per byte."""
        if self.bytes is None:
            return None
        bits = [sum(each.nll) / math.log(2) for each in self.by_block]
        found = Estimate.ratio(bits, [sum(each.bytes or ()) for each in self.by_block])
        return None if found is None else found.interval

    def difference(self, reference: "PerplexityResult", part: int | None = None) -> Estimate | None:
        """Mean negative log-likelihood beyond that of `reference`, block by block; None unless both read the same.

        With `part` it is that of one of the bins, None where it has no tokens.
        """
        same = [(each.block, each.tokens) for each in self.by_block] == [
            (each.block, each.tokens) for each in reference.by_block
        ]
        mine, others = self._loss(part), reference._loss(part)
        return mine - others if same and mine is not None and others is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for JSON."""
        known = [each.bytes for each in self.by_block if each.bytes is not None]
        return {
            "blocks": self.blocks,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "mean_nll": self.mean_nll,
            "interval": _listed(self.interval),
            "perplexity": self.perplexity,
            "perplexity_interval": _listed(self.perplexity_interval),
            "bits_per_token": self.bits_per_token,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_byte_interval": _listed(self.bits_per_byte_interval),
            "bins": [part.to_dict() for part in self.bins],
            "by_block": {
                "block": [each.block for each in self.by_block],
                "tokens": [list(each.tokens) for each in self.by_block],
                "nll": [list(each.nll) for each in self.by_block],
                "bytes": [list(counts) for counts in known] or None,
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PerplexityResult":
        """Inverse of `to_dict`; of what was written before there were blocks in it too."""
        found = data.get("by_block") or {"block": [], "tokens": [], "nll": [], "bytes": None}
        counts = found["bytes"] or [None] * len(found["block"])
        columns = zip(found["block"], found["tokens"], found["nll"], counts, strict=True)
        return cls(
            blocks=data["blocks"],
            tokens=data["tokens"],
            mean_nll=data["mean_nll"],
            bins=tuple(PositionBin.from_dict(part) for part in data["bins"]),
            bytes=data.get("bytes"),
            by_block=tuple(
                BlockSums(name, tuple(tokens), tuple(nll), None if size is None else tuple(size))
                for name, tokens, nll, size in columns
            ),
        )


def exp_interval(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """Interval of a perplexity, which is at least 1, from that of a mean negative log-likelihood."""
    return None if interval is None else (perplexity(max(0.0, interval[0])), perplexity(max(0.0, interval[1])))


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
