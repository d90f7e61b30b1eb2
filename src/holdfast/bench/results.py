"""Measurements as data: what JSON holds, and what tables and plots read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.bench.ceilings import Ceilings
from holdfast.bench.timing import Timing, speed_ratio
from holdfast.files import UnreadableError, write_json

__all__ = ["FORMAT", "Case", "Report", "Result", "read_report"]

FORMAT = 1
"""Of the JSON; a reader refuses others."""


@dataclass(frozen=True)
class Result:
    """One variant of one case.

    Attributes:
        name: of the variant.
        timing: seconds of every sample.
        tokens: that one sample treats; None where tokens per second mean nothing.
        flops: operations that the result needs (multiply-adds × 2), not those that an implementation makes.
        moved_bytes: bytes that must be read and written at least once.
        peak_bytes: memory at the peak, inputs included; None: not measured.
        cache_bytes: of the model's memory of the past; None: there is none.
        notes: whatever else a reader should know.
    """

    name: str
    timing: Timing
    flops: float
    moved_bytes: float
    tokens: int | None = None
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.tokens is None else self.tokens / self.timing.summary.median

    def share(self, ceilings: Ceilings) -> float:
        """The machine's least time for these operations and bytes, over the median: 1 is the ceiling."""
        return ceilings.floor_seconds(self.flops, self.moved_bytes) / self.timing.summary.median


@dataclass(frozen=True)
class Case:
    """The same work by several variants, measured in turn; the first is this library's.

    Attributes:
        kind: what is measured, such as "attention".
        parameters: its size, such as tokens and pass.
    """

    kind: str
    parameters: Mapping[str, Any]
    results: tuple[Result, ...]


@dataclass(frozen=True)
class Report:
    """Everything that one benchmark has measured.

    Attributes:
        benchmark: "ops", "prefill", "decode" or "train".
        settings: what was chosen, as plain values.
        machine: `holdfast.machine.describe_machine()`.
    """

    benchmark: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    ceilings: Ceilings
    cases: tuple[Case, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: every sample, and what was computed from them."""
        return {
            "format": FORMAT,
            "benchmark": self.benchmark,
            "settings": dict(self.settings),
            "machine": dict(self.machine),
            "ceilings": dataclasses.asdict(self.ceilings),
            "cases": [self._case(case) for case in self.cases],
        }

    def write(self, path: Path) -> Path:
        """Write the JSON file and return its path."""
        return write_json(path, self.to_dict())

    def _case(self, case: Case) -> dict[str, Any]:
        ours = case.results[0].timing
        return {
            "kind": case.kind,
            "parameters": dict(case.parameters),
            "results": [
                {
                    "name": result.name,
                    "seconds": dataclasses.asdict(result.timing.summary),
                    "times_as_long_as_first": dataclasses.asdict(speed_ratio(result.timing, ours)),
                    "tokens": result.tokens,
                    "tokens_per_second": result.tokens_per_second,
                    "flops": result.flops,
                    "moved_bytes": result.moved_bytes,
                    "share_of_ceiling": result.share(self.ceilings),
                    "peak_bytes": result.peak_bytes,
                    "cache_bytes": result.cache_bytes,
                    "warmed_up": result.timing.warmed_up,
                    "notes": dict(result.notes),
                    "turns": result.timing.turns,
                }
                for result in case.results
            ],
        }


def read_report(path: Path) -> Report:
    """The report that `Report.write` wrote.

    Raises:
        UnreadableError: if the file holds something else.
        OSError: if it cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise UnreadableError(f"{path} has the format {data['format']}, not {FORMAT}; measure again.")
        cases = tuple(_read_case(case) for case in data["cases"])
        return Report(data["benchmark"], data["settings"], data["machine"], Ceilings(**data["ceilings"]), cases)
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UnreadableError(f"{path} holds no results of `holdfast bench`; give a file of its --output.") from error


def _read_case(data: Mapping[str, Any]) -> Case:
    kept = ("name", "flops", "moved_bytes", "tokens", "peak_bytes", "cache_bytes", "notes")
    results = (
        Result(timing=Timing(entry["turns"], entry["warmed_up"]), **{name: entry[name] for name in kept})
        for entry in data["results"]
    )
    return Case(data["kind"], data["parameters"], tuple(results))
