"""How much memory a piece of work needs at its peak."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from holdfast.bench.fresh import call_in_new_process

__all__ = ["available_bytes", "peak_bytes", "resident_bytes"]

_STATUS, _MEMORY = Path("/proc/self/status"), Path("/proc/meminfo")
_FORGET = Path("/proc/self/clear_refs")


def peak_bytes(
    work: Callable[..., object], arguments: Sequence[Any], *, warm_up: Sequence[Any], device: torch.device
) -> int:
    """Bytes that `work(*arguments)` adds at its peak to what the process held before, inputs that it makes included.

    On CUDA: of the allocator. Elsewhere: resident memory of a new process, since one that has run other work keeps
    some of its memory; `work` and the arguments must then be picklable.

    Args:
        work: a function of a module.
        arguments: of the measured call.
        warm_up: arguments of a call before it, with little memory, so that libraries are loaded and code is compiled.
        device: where the work is done.
    """
    if device.type == "cuda":
        work(*warm_up)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work(*arguments)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    return call_in_new_process(_grown_by, work, tuple(arguments), tuple(warm_up))


def _grown_by(work: Callable[..., object], arguments: tuple[Any, ...], warm_up: tuple[Any, ...]) -> int:
    work(*warm_up)
    with contextlib.suppress(OSError):  # where the system keeps the peak, that of loading and warming up may be higher
        _FORGET.write_text("5")
    before = resident_bytes()
    work(*arguments)
    return max(0, resident_bytes(peak=True) - before)


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where the system does not tell."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return _kibibytes(_MEMORY, "MemAvailable") if _MEMORY.is_file() else None


def resident_bytes(*, peak: bool = False) -> int:
    """Resident memory of this process now, or at its peak; always at its peak where Linux's files are missing.

    Linux's own accounting goes first because getrusage there counts the peak of the process that started this one.
    """
    field = "VmHWM" if peak else "VmRSS"
    if _STATUS.is_file():
        return _kibibytes(_STATUS, field)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _kibibytes(path: Path, field: str) -> int:
    """The number that a file of Linux gives for `field` in kB, in bytes."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
