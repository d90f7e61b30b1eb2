"""How a Triton kernel says in which forms it is shipped, so that they can be compiled where there is no GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""The architectures for which every shipped kernel must compile."""


@dataclass(frozen=True)
class ShippedKernel:
    """One kernel with the types and constants of one launch.

    Every module with kernels has a function `shipped_kernels()` that yields these. It imports Triton.

    Attributes:
        name: unique, as a table prints it: op, kernel, head size, dtype.
        kernel: the function under `@triton.jit`.
        signature: Triton type of every argument that is not in `constexprs`, by name ("*bf16", "i32", "fp32").
        constexprs: value of every compile-time argument, by name; None for a pointer that is not passed.
        num_warps, num_stages: as at the launch.
        targets: architectures on which it is launched so.
        aligned: arguments that are multiples of 16 at the launch. Pointers are, whether they are named or not.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    targets: tuple[str, ...] = TARGETS
    aligned: tuple[str, ...] = ()
