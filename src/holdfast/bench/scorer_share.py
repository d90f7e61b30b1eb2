"""Which part of a model's time its retention scorers take."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.modeling import HybridForCausalLM

__all__ = ["ScorerShare", "scorer_share"]

READINGS = 3


@dataclass(frozen=True)
class ScorerShare:
    """Seconds in the scorers' networks over seconds of the whole model, while reading and while generating."""

    prefill: float
    decode: float


def scorer_share(
    model: HybridForCausalLM,
    read: Callable[[], object],
    step: Callable[[], object],
    *,
    steps: int,
    device: torch.device,
) -> ScorerShare | None:
    """Time the scorers' calls inside of the model's; None where it has none.

    Args:
        model: that `read` and `step` call.
        read: reads a chunk; called `READINGS` times.
        step: generates a token; called `steps` times.
        steps: how often.
        device: where the work is done; on CUDA by events, so that nothing waits in between.

    Returns:
        Medians over the calls, after one of each to warm up.
    """
    if not model.model.eviction_layers():
        return None
    with _clocked(model, device) as (scorers, whole):

        def share(work: Callable[[], object]) -> float:
            scorers.clear()
            whole.clear()
            whole.start()
            work()
            whole.stop()
            return scorers.seconds() / whole.seconds()

        def median(work: Callable[[], object], calls: int) -> float:
            work()
            return statistics.median(share(work) for _ in range(calls))

        return ScorerShare(prefill=median(read, READINGS), decode=median(step, steps))


class _Clock:
    """Adds up the time between `start` and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.clear()

    def clear(self) -> None:
        self.spans: list[tuple[Any, Any]] = []
        self.started: Any = None

    def start(self, *_: Any) -> None:
        self.started = self._now()

    def stop(self, *_: Any) -> None:
        self.spans.append((self.started, self._now()))

    def seconds(self) -> float:
        if self.on_cuda:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in self.spans) / 1000
        return sum(end - start for start, end in self.spans)

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextlib.contextmanager
def _clocked(model: HybridForCausalLM, device: torch.device) -> Iterator[tuple[_Clock, _Clock]]:
    """A clock that runs while a scorer does, by hooks that are taken away at the end, and one for the whole."""
    scorers = _Clock(device)
    networks = {id(layer.router): layer.router for layer in model.model.eviction_layers()}  # one may serve all layers
    handles = []
    try:
        for network in networks.values():
            handles.append(network.register_forward_pre_hook(scorers.start))
            handles.append(network.register_forward_hook(scorers.stop))
        yield scorers, _Clock(device)
    finally:
        for handle in handles:
            handle.remove()
