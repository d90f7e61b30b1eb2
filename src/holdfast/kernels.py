"""Compile every shipped Triton kernel ahead of time, without a GPU, and report what the compiler made of it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from holdfast.ops.kernels import TARGETS, ShippedKernel

SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that one program may have, by architecture (CUDA C++ guide, table of compute capabilities)."""

_MIX = {
    "matrix": ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "v_mfma"),
    "float": ("FFMA", "FADD", "FMUL", "DFMA", "DADD", "DMUL", "v_fma", "v_pk_fma", "v_add_f", "v_mul_f", "v_fmac"),
    "memory": ("LDG", "STG", "LDGSTS", "UTMALDG", "global_", "buffer_", "flat_"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ds_"),
    "local": ("LDL", "STL", "scratch_"),
}


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler made of one kernel.

    Attributes:
        registers: per thread (vector registers on AMD).
        spills: bytes of memory per thread that hold what the registers had no room for.
        shared: bytes per program.
        instructions: how many of each kind stand in the machine code; empty where there is no disassembler.
    """

    name: str
    target: str
    registers: int
    spills: int
    shared: int
    instructions: dict[str, int]

    @property
    def faults(self) -> list[str]:
        """One line for each reason not to ship it."""
        faults = []
        if self.spills:
            faults.append(f"{self.name} on {self.target} spills ({self.spills}): take smaller tiles or more warps.")
        limit = SHARED_LIMITS[self.target]
        if self.shared > limit:
            faults.append(f"{self.name} on {self.target} takes {self.shared} of {limit} bytes of shared memory.")
        return faults

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_compiler() -> None:
    """Raises RuntimeError: Triton cannot compile here."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed: install it with `pip install triton` (Linux).")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 makes Triton interpret kernels: unset it to compile them.")


def shipped_kernels() -> Iterator[ShippedKernel]:
    """Those of every module of `holdfast.ops` whose name ends in "triton". Imports Triton."""
    ops = importlib.import_module("holdfast.ops")
    for module in pkgutil.walk_packages(ops.__path__, "holdfast.ops."):
        if module.name.endswith("triton"):
            yield from importlib.import_module(module.name).shipped_kernels()


def selected_kernels(words: Sequence[str], targets: Sequence[str]) -> list[tuple[ShippedKernel, str]]:
    """Kernel and target of everything to compile: kernels whose name contains one of `words` (none: all)."""
    return [
        (kernel, target)
        for kernel in shipped_kernels()
        if not words or any(word in kernel.name for word in words)
        for target in targets
        if target in kernel.targets
    ]


def compile_kernel(kernel: ShippedKernel, target: str) -> CompiledKernel:
    """Compile for `target`, one of `TARGETS`. Seconds, unless Triton has it in its cache.

    Raises:
        ValueError: `target` is none of `TARGETS`.
        RuntimeError: the compiler refuses the kernel.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r} does not exist: choose one of {', '.join(TARGETS)}.")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    # Triton wants the arguments in the kernel's order, constants among them.
    signature = {name: kernel.signature.get(name, "constexpr") for name in kernel.kernel.arg_names}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in kernel.aligned
    }
    source = ASTSource(kernel.kernel, signature, {**kernel.constexprs}, aligned)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    try:
        compiled = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # the compiler's own errors share no class
        raise RuntimeError(f"{kernel.name} does not compile for {target}: {error}") from error
    inspect: Callable[[Any], tuple[int, int, Counter[str]]] = _inspect_amd if amd else _inspect_nvidia
    registers, spills, instructions = inspect(compiled.asm)
    mix = {kind: _count(instructions, prefixes) for kind, prefixes in _MIX.items()}
    mix = mix | {"all": instructions.total()} if instructions else {}
    return CompiledKernel(kernel.name, target, registers, spills, compiled.metadata.shared, mix)


def _count(instructions: Counter[str], prefixes: tuple[str, ...]) -> int:
    return sum(count for name, count in instructions.items() if name.startswith(prefixes))


def _inspect_nvidia(asm: Any) -> tuple[int, int, Counter[str]]:
    """Registers, bytes spilled, instructions by name, from the binary."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(directory) / "kernel.cubin"
        binary.write_bytes(asm["cubin"])
        usage = _output(str(tools / "cuobjdump"), "--dump-resource-usage", str(binary))
        code = _output(str(tools / "nvdisasm"), "-c", str(binary)) if (tools / "nvdisasm").is_file() else ""
    registers, stack = (max(map(int, re.findall(rf"{field}:(\d+)", usage))) for field in ("REG", "STACK"))
    names = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code, re.MULTILINE))
    # Triton's programs have no arrays of their own: what lies on the stack was spilled. But the compiler also leaves a
    # few bytes there that no instruction reads or writes.
    touched = not names or _count(names, _MIX["local"])
    return registers, stack if touched else 0, names


def _inspect_amd(asm: Any) -> tuple[int, int, Counter[str]]:
    """The same from the assembly, whose end says what was used.

    Spilled is what lies in scratch memory. The compiler's own count of spilled scalar registers is left out: they go
    into lanes of vector registers, which costs no memory traffic, and where lanes run short, scratch memory shows it.
    """
    text = asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.findall(rf"\.{field}:\s+(\d+)", text)[0])

    names = re.findall(r"^\t([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+|scratch_\w+)", text, re.MULTILINE)
    return number("vgpr_count"), number("private_segment_fixed_size"), Counter(names)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout
