"""`holdfast kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.progress import track
from rich.table import Table

from holdfast.cli.common import error_console, output_console
from holdfast.cli.errors import UsageError
from holdfast.cli.parsing import parse
from holdfast.files import write_json
from holdfast.settings import suggest

if TYPE_CHECKING:
    from holdfast.kernels import CompiledKernel

DESCRIPTION = """\
Compile every shipped Triton kernel ahead of time, without a GPU. Fails where registers spill or shared memory is short.

examples:
  holdfast kernels
  holdfast kernels window_step streaming_retention --targets sm_90 gfx942
  holdfast kernels --json kernels.json
"""

_KINDS = ("all", "matrix", "float", "memory", "shared", "local")


@dataclass(frozen=True)
class Kernels:
    """Compile every shipped kernel."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Only kernels whose names contain one of these."""
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
    """Architectures."""
    json: Path | None = None
    """Write all numbers to this file."""


def run(arguments: Sequence[str]) -> None:
    """Parse, compile, show; raises RuntimeError where a kernel must not be shipped."""
    settings = parse(Kernels, arguments, prog="holdfast kernels", description=DESCRIPTION)

    from holdfast.kernels import TARGETS, compile_kernel, require_compiler, selected_kernels

    if unknown := [target for target in settings.targets if target not in TARGETS]:
        raise UsageError(f"There is no target {unknown[0]!r}{suggest(unknown[0], TARGETS)}.")
    require_compiler()
    jobs = selected_kernels(settings.names, settings.targets)
    if not jobs:
        raise UsageError(f"No kernel of these targets is called {' or '.join(settings.names)}.")
    console = error_console()
    steps = track(jobs, "compiling", console=console, transient=True, disable=not console.is_terminal)
    results, faults = [], []
    for kernel, target in steps:
        try:
            result = compile_kernel(kernel, target)
        except RuntimeError as error:
            faults.append(" ".join(str(error).split()))
            continue
        results.append(result)
        faults += result.faults
    output_console().print(_table(results))
    if settings.json is not None:
        write_json(settings.json, {"kernels": [result.to_dict() for result in results], "faults": faults})
    for fault in faults:
        console.print(fault, soft_wrap=True)
    if faults:
        raise RuntimeError(f"{len(faults)} of {len(jobs)} compilations are not fit to ship.")


def _table(results: Sequence[CompiledKernel]) -> Table:
    table = Table()
    for name in ("kernel", "target"):
        table.add_column(name, no_wrap=True)
    for name in ("registers", "spills", "shared", *(f"{kind} instr." if kind == "all" else kind for kind in _KINDS)):
        table.add_column(name, justify="right")
    for result in results:
        numbers = (result.registers, result.spills, result.shared)
        mix = (str(result.instructions.get(kind, "–")) for kind in _KINDS)
        table.add_row(result.name, result.target, *map(str, numbers), *mix)
    return table
