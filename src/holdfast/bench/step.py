"""`holdfast bench ops --only step`: one decoding step over the window and the store, by each way to compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from holdfast.bench.results import Case, Result
from holdfast.bench.settings import OpsSettings
from holdfast.bench.setup import Setup
from holdfast.bench.timing import Variant
from holdfast.ops.window_step import Slots, window_step

__all__ = ["step_cases"]

KIND = "decoding step"
_DELAY = 6  # tokens that the published scorer reads ahead
_SINKS = 4
_SHORTEST_SAMPLE = 5e-3  # seconds


def step_cases(setup: Setup[OpsSettings]) -> Iterator[Case]:
    """At each of `step_batches`: evict or keep, insert and attend, with every slot taken."""
    settings = setup.settings
    generator = torch.Generator().manual_seed(settings.seed)
    names = {"holdfast": None} | ({"PyTorch": "pytorch"} if settings.peers else {})
    for batch in settings.step_batches:
        slots = _full_slots(setup, batch, generator)
        kv_heads, dim = slots.keys.shape[1], slots.keys.shape[3]
        q, key, value = (
            torch.randn(batch, heads, dim, generator=generator).to(setup.device, setup.dtype)
            for heads in (settings.heads, kv_heads, kv_heads)
        )
        score = torch.rand(batch, kv_heads, generator=generator).to(setup.device)
        works = {name: _work(q, key, value, slots, score, backend) for name, backend in names.items()}
        variants = [Variant(name, work, shortest_sample=_SHORTEST_SAMPLE) for name, work in works.items()]
        timings = setup.measure(variants, f"{KIND}, {batch} rows")
        flops = 4 * dim * settings.heads * batch * slots.keys.shape[2]
        # The output is as large as q.
        moved = sum(x.nbytes for x in (slots.keys, slots.values, slots.scores, slots.positions, q, q) if x is not None)
        cache = sum(x.nbytes for x in (slots.keys, slots.values))
        results = tuple(
            Result(name, timing, flops, moved, tokens=batch, cache_bytes=cache) for name, timing in timings.items()
        )
        parameters = {"rows": batch, "heads": settings.heads, "slots": slots.keys.shape[2], "dim": dim}
        yield Case(KIND, parameters, results)


def _full_slots(setup: Setup[OpsSettings], batch: int, generator: torch.Generator) -> Slots:
    """Slots as a long context leaves them: the store full of pairs from before the window."""
    settings = setup.settings
    budget, ring = settings.kept, settings.window + 1
    shape = (batch, settings.kv_heads or settings.heads, budget + ring)
    keys, values = (
        torch.randn(*shape, settings.head_dim, generator=generator).to(setup.device, setup.dtype) for _ in range(2)
    )
    scores = torch.rand(shape, generator=generator).to(setup.device)
    positions = torch.arange(budget, dtype=torch.int32, device=setup.device).expand(*shape[:2], -1).contiguous()
    seen = torch.full((batch,), 2 * (budget + ring), dtype=torch.int64, device=setup.device)
    return Slots(keys, values, seen, scores, positions)


def _work(
    q: Tensor, key: Tensor, value: Tensor, slots: Slots, score: Tensor, backend: str | None
) -> Callable[[], Tensor]:
    return torch.no_grad()(
        lambda: window_step(q, key, value, slots, score=score, sinks=_SINKS, delay=_DELAY, backend=backend)
    )
