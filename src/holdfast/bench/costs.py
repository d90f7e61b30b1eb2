"""What `efficiency` measures of a model, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.bench.scorer_share import ScorerShare
from holdfast.bench.timing import Timing
from holdfast.cache import HybridCache
from holdfast.mixers.native_sparse_attention import NativeSparseState
from holdfast.mixers.softmax_attention import FullState
from holdfast.mixers.window_state import WindowState

__all__ = ["Cost", "Held", "ModelCosts", "held_pairs"]


@dataclass(frozen=True)
class Held:
    """Pairs of key and value that a head holds: mean, least and most over layers, KV heads and rows. Native sparse
    attention holds all and reads a part of them for each token.

    `stored` is the mean of those in stores of learned eviction, outside the window; None without such a layer.
    """

    mean: float
    least: int
    most: int
    stored: float | None


@dataclass(frozen=True)
class Cost:
    """One model after `context` tokens in each of `batch` rows.

    Attributes:
        prefill: seconds to read the context.
        decode: seconds of a step, in which each row gets a token: the latency per token.
        cache_bytes: allocated, all rows.
        peak_bytes: beyond the weights while the context is read, the cache included; None: not measured.
        held: None for a model without softmax attention, whose memory is a state.
        scorer: share of the retention scorers in the time; None for a model without.
        limit: seconds after which no further turn was taken; 0 where that was not noted.
    """

    context: int
    batch: int
    prefill: Timing
    decode: Timing
    cache_bytes: int
    peak_bytes: int | None
    held: Held | None
    scorer: ScorerShare | None
    limit: float = 0.0

    def is_whole(self, repeats: int, steps: int) -> bool:
        """Whether all was timed that was asked for; else the limit came first."""
        warmed_up = self.prefill.warmed_up and self.decode.warmed_up
        return warmed_up and len(self.prefill.turns) >= repeats and len(self.decode.samples) >= steps

    @property
    def prefill_rate(self) -> float:
        """Tokens per second read, all rows together, by the median."""
        return self.context * self.batch / self.prefill.summary.median

    @property
    def decode_rate(self) -> float:
        """Tokens per second generated, all rows together, by the median."""
        return self.batch / self.decode.summary.median

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: every sample, and what follows from them."""
        rates = {"prefill_tokens_per_second": self.prefill_rate, "decode_tokens_per_second": self.decode_rate}
        summary = self.decode.summary
        latency = {"p50": summary.median, "p90": summary.p90, "p99": summary.p99}
        return {**rates, "latency_seconds": latency, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cost:
        """Inverse of `to_dict`."""
        values = {field.name: data[field.name] for field in dataclasses.fields(cls) if field.name != "limit"}
        values["limit"] = data.get("limit", 0.0)  # which older logs do not have
        kinds = {"prefill": Timing, "decode": Timing, "held": Held, "scorer": ScorerShare}
        built = {name: None if values[name] is None else kind(**values[name]) for name, kind in kinds.items()}
        return cls(**values | built)


@dataclass(frozen=True)
class ModelCosts:
    """Everything measured of one model.

    Attributes:
        heads: query heads and key/value heads of each kind of softmax attention among the mixers, by name.
        flops_per_token: operations of one forward token by context.
        missing: why a context and batch size was not measured.
        resumed: how many costs came from the log.
    """

    mixers: tuple[str, ...]
    heads: Mapping[str, tuple[int, int]]
    trained: bool
    parameters: Mapping[str, int]
    weight_bytes: int
    flops_per_token: Mapping[int, int]
    scorer_flops_per_token: int
    costs: tuple[Cost, ...]
    missing: Mapping[tuple[int, int], str]
    resumed: int

    def at(self, context: int, batch: int) -> Cost | None:
        """What was measured there."""
        return next((cost for cost in self.costs if (cost.context, cost.batch) == (context, batch)), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        reasons = [{"context": at[0], "batch": at[1], "reason": reason} for at, reason in self.missing.items()]
        return {
            "mixers": list(self.mixers),
            "heads": {name: {"query": query, "kv": kv} for name, (query, kv) in self.heads.items()},
            "trained": self.trained,
            "total_parameters": sum(self.parameters.values()),
            "parameters": dict(self.parameters),
            "weight_bytes": self.weight_bytes,
            "flops_per_token": {str(context): count for context, count in self.flops_per_token.items()},
            "scorer_flops_per_token": self.scorer_flops_per_token,
            "costs": [cost.to_dict() for cost in self.costs],
            "not_measured": reasons,
            "resumed": self.resumed,
        }


def held_pairs(cache: HybridCache) -> Held | None:
    """How many pairs each head of a cache holds now. Pads, which a growing cache holds too, do not count."""
    counts, stored = [], []
    for state in cache.layers:
        if isinstance(state, WindowState):
            held = state.seen.clamp(max=state.ring_size).unsqueeze(1).expand(-1, state.num_kv_heads)
            if state.budget:
                kept = (state.positions >= 0).sum(-1)
                stored.append(kept.flatten())
                held = held + kept
            counts.append(held.flatten())
        elif isinstance(state, FullState | NativeSparseState):
            assert cache.seen is not None
            counts.append(cache.seen.repeat_interleave(state.num_kv_heads))
    if not counts:
        return None
    every = torch.cat(counts).double()
    mean_stored = torch.cat(stored).double().mean().item() if stored else None
    return Held(every.mean().item(), int(every.min()), int(every.max()), mean_stored)
