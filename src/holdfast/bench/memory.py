"""How much memory a piece of work needs at its peak."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

__all__ = ["peak_bytes", "resident_bytes"]

_STATUS = Path("/proc/self/status")


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
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_grown_by, work, tuple(arguments), tuple(warm_up)).result()


def _grown_by(work: Callable[..., object], arguments: tuple[Any, ...], warm_up: tuple[Any, ...]) -> int:
    work(*warm_up)
    before = resident_bytes()
    work(*arguments)
    return max(0, resident_bytes(peak=True) - before)


def resident_bytes(*, peak: bool = False) -> int:
    """Resident memory of this process now, or at its peak; always at its peak where Linux's files are missing.

    Linux's own accounting goes first because getrusage there counts the peak of the process that started this one.
    """
    field = "VmHWM" if peak else "VmRSS"
    if _STATUS.is_file():
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
