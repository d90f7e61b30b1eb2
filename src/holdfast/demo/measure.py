"""What a trained model of the demonstration can do, and what its memory costs."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.cache import HybridCache
from holdfast.data.needle import NeedleTask
from holdfast.evaluation.inference import evaluating
from holdfast.evaluation.needle import NeedleResult, evaluate_needle
from holdfast.modeling import HybridForCausalLM

__all__ = ["Measurement", "cache_bytes_after", "generation_speed", "measure"]

LONGER = 10
"""How many times the length of a sample the cache is measured at again, to show whether it grows."""
CHUNK = 256
HELD_OUT_SEED = 20_251_020
"""Of the questions asked. Training draws its samples from other streams, whatever its seed."""


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model.

    Attributes:
        needle: recall, by distance.
        cache_bytes: bytes of the cache (fp32, one row) after so many tokens; allocated, not computed.
        tokens_per_second: written by `generate` after a sample, on one thread.
        parameters: all parameters.
        stored: pairs in a head's store after a sample, at the end of training; None without eviction.
        training: the run's summary.json.
    """

    needle: NeedleResult
    cache_bytes: dict[int, int]
    tokens_per_second: float
    parameters: int
    stored: float | None
    training: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        cache_bytes = {str(tokens): count for tokens, count in self.cache_bytes.items()}
        return values | {"needle": self.needle.to_dict(), "cache_bytes": cache_bytes}


def measure(directory: Path, task: NeedleTask, samples: int) -> Measurement:
    """Load the model that a finished run left in `directory` and measure it."""
    from holdfast.training.metrics import read_metrics

    model = HybridForCausalLM.from_pretrained(directory)
    longer = dataclasses.replace(task, length=LONGER * task.length)
    stored = [line["stored_mean"] for line in read_metrics(directory / "metrics.jsonl") if "stored_mean" in line]
    return Measurement(
        needle=evaluate_needle(model, task, samples=samples, seed=HELD_OUT_SEED, progress=False),
        cache_bytes={
            each.length: cache_bytes_after(model, each.sample(HELD_OUT_SEED, 1)["input_ids"]) for each in (task, longer)
        },
        tokens_per_second=generation_speed(model, task.sample(HELD_OUT_SEED, 1)["input_ids"]),
        parameters=model.num_parameters(),
        stored=stored[-1] if stored else None,
        training=json.loads((directory / "summary.json").read_text(encoding="utf-8")),
    )


def cache_bytes_after(model: Any, input_ids: Tensor) -> int:
    """Bytes that the cache has allocated once a `HybridForCausalLM` has read input_ids [B, T], in chunks."""
    cache = HybridCache(model.config)
    with evaluating(model):
        for chunk in input_ids.split(CHUNK, dim=1):
            model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache.nbytes


def generation_speed(model: Any, input_ids: Tensor, new_tokens: int = 64) -> float:
    """Tokens per second that `generate` writes after input_ids [1, T], on one thread; the fastest of three calls,
    since whatever else the machine does can only slow one down.
    """
    rates = []
    with evaluating(model), _one_thread():
        for _ in range(3):
            cache = HybridCache(model.config)
            model(input_ids=input_ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            started = time.perf_counter()
            model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=cache,
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
            )
            rates.append(new_tokens / (time.perf_counter() - started))
    return max(rates)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
