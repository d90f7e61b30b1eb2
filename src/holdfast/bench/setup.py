"""What every benchmark begins and ends with: the device, the ceilings of the machine, and a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from holdfast.bench.ceilings import Ceilings, measure_ceilings
from holdfast.bench.results import Case, Report
from holdfast.bench.settings import BenchSettings
from holdfast.bench.timing import Timing, Variant, measure
from holdfast.machine import describe_machine

__all__ = ["Setup"]

S = TypeVar("S", bound=BenchSettings)


@dataclass(frozen=True)
class Setup(Generic[S]):
    """Settings that hold, where and in which dtype to compute, and what the machine can do at best."""

    settings: S
    device: torch.device
    dtype: torch.dtype
    ceilings: Ceilings

    @classmethod
    def of(cls, settings: S) -> Setup[S]:
        """Seed PyTorch, set its threads, measure the ceilings; raises ValueError where the device is missing."""
        settings = settings.effective()
        device, dtype = settings.resolve()
        return cls(settings, device, dtype, measure_ceilings(device, dtype, quick=settings.quick))

    def measure(self, variants: Sequence[Variant], description: str, turns: int | None = None) -> dict[str, Timing]:
        """`holdfast.bench.timing.measure` with these settings; turns: the repeats unless given."""
        return measure(
            variants,
            turns=turns or self.settings.repeats,
            limit=self.settings.limit,
            device=self.device,
            description=description,
        )

    def report(self, benchmark: str, cases: Iterable[Case]) -> Report:
        """The cases with all that belongs to them."""
        return Report(benchmark, self.settings.to_dict(), describe_machine(), self.ceilings, tuple(cases))
