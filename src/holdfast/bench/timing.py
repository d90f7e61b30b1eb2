"""Timing variants of the same work so that they can be compared on a machine whose speed drifts.

The variants take turns in one process, in an order that rotates, after a warm-up each. Quoted are medians, and ratios
of samples taken in the same round.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from holdfast.data.progress import track

__all__ = ["Summary", "Timing", "Variant", "measure", "speed_ratio", "turn_order"]


_RESOLUTION = 1e-6  # seconds that a call takes at least


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Variant:
    """One way to do the work.

    Attributes:
        name: what the results call it.
        run: the work; timed.
        prepare: what makes the state that a turn begins with; called at the beginning of every turn, not timed.
        samples_per_turn: calls of `run` that are timed in a turn. With several, one call that is not timed goes
            first, since it finds the caches full of what other variants have read.
        samples: at the most, in all turns; the last turn times what is left of them. None: as many as the turns have.
        shortest_sample: seconds; with one sample per turn. Of work that takes less, it is the mean over as many calls
            as take that long, after two that are not counted: a single call of some microseconds measures the clock and
            cold caches. On CUDA the calls follow each other without waiting.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing
    samples_per_turn: int = 1
    samples: int | None = None
    shortest_sample: float = 0.0


@dataclass
class Timing:
    """Seconds of one variant, by turn. Without `warmed_up` the only turn is the first call."""

    turns: list[list[float]] = field(default_factory=list)
    warmed_up: bool = True

    @property
    def samples(self) -> list[float]:
        """Seconds of all turns, in order."""
        return [seconds for turn in self.turns for seconds in turn]

    @property
    def summary(self) -> Summary:
        return Summary.of(self.samples)


@dataclass(frozen=True)
class Summary:
    """Where samples lie: `median`, `low` and `high` (the quartiles), the 90th and 99th percentile, and the ends."""

    count: int
    median: float
    low: float
    high: float
    p90: float
    p99: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Raises ValueError if there are none."""
        if not samples:
            raise ValueError("there are no samples to summarise; measure at least once.")
        minimum, low, median, high, p90, p99, maximum = np.percentile(samples, [0, 25, 50, 75, 90, 99, 100]).tolist()
        return cls(len(samples), median, low, high, p90, p99, minimum, maximum)


def speed_ratio(slow: Timing, fast: Timing) -> Summary:
    """How many times as long `slow` takes as `fast`: the ratios of their medians, turn by turn.

    Turns of the same number were measured one after the other, so that a machine that slows down slows both.
    """
    pairs = zip(slow.turns, fast.turns, strict=False)
    return Summary.of([float(np.median(one) / np.median(other)) for one, other in pairs])


def measure(
    variants: Sequence[Variant],
    *,
    turns: int,
    limit: float,
    device: torch.device,
    description: str = "measuring",
    progress: bool = True,
) -> dict[str, Timing]:
    """Time the variants in rotation. The garbage collector rests meanwhile.

    Args:
        variants: with names of their own.
        turns: of each variant, at least 1, after one call to warm up.
        limit: seconds after which a variant takes no further turn. A warm-up that takes as long stays its only
            sample.
        device: where the work is done; on CUDA by events, between synchronisations.
        description: of the progress bar.
        progress: show it, where standard error is a terminal.

    Returns:
        Timings by name, in the order of the variants; each has at least one turn.
    """
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    timings = {variant.name: Timing() for variant in variants}
    spent = dict.fromkeys(timings, 0.0)
    with _garbage_kept():
        for variant in track(variants, f"{description}: warming up", progress=progress):
            variant.prepare()
            first = clock(variant.run)
            if first >= limit:
                timings[variant.name] = Timing([[first]], warmed_up=False)
                spent[variant.name] = first
        for turn in track(range(turns), description, progress=progress):
            for index in turn_order(len(variants), turn):
                variant = variants[index]
                left = _samples_left(variant, timings[variant.name])
                if spent[variant.name] < limit and left:
                    started = time.perf_counter()
                    timings[variant.name].turns.append(_take_turn(variant, left, clock))
                    spent[variant.name] += time.perf_counter() - started
    return timings


def turn_order(count: int, turn: int) -> list[int]:
    """Indices of `count` variants in the order of this turn: each turn begins with the next one, so that no variant
    always comes first.
    """
    return [(turn + index) % count for index in range(count)]


def _samples_left(variant: Variant, timing: Timing) -> int:
    """That the next turn takes."""
    if variant.samples is None:
        return variant.samples_per_turn
    return min(variant.samples_per_turn, variant.samples - len(timing.samples))


def _take_turn(variant: Variant, samples: int, clock: Callable[[Callable[[], object]], float]) -> list[float]:
    variant.prepare()
    if variant.shortest_sample:
        return [_sample_short_work(variant, clock)]
    if variant.samples_per_turn > 1:
        variant.run()
    return [clock(variant.run) for _ in range(samples)]


def _sample_short_work(variant: Variant, clock: Callable[[Callable[[], object]], float]) -> float:
    """Seconds of one call; of many, after two that are not counted, where one is too short to be a sample."""
    first = clock(variant.run)
    if first >= variant.shortest_sample:
        return first
    calls = math.ceil(variant.shortest_sample / max(clock(variant.run), _RESOLUTION))
    return clock(functools.partial(_repeat, variant.run, calls)) / calls


def _repeat(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()


def _cpu_seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _cuda_seconds(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
