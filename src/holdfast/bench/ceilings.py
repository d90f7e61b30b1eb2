"""What the machine can do at best: copy bandwidth and the rate of matrix products, measured here and now."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from holdfast.bench.timing import Variant, measure

__all__ = ["Ceilings", "measure_ceilings", "measure_matmul"]


@dataclass(frozen=True)
class Ceilings:
    """Rates that nothing on this machine exceeds by much, in one dtype with the threads of this process.

    Attributes:
        copy_bytes_per_second: bytes read plus bytes written by a copy of a large tensor.
        matmul_flops_per_second: of a large square matrix product, multiply-adds × 2.
        dtype: of the matrices.
    """

    copy_bytes_per_second: float
    matmul_flops_per_second: float
    dtype: str

    def floor_seconds(self, flops: float, moved_bytes: float) -> float:
        """The least time for so many operations and bytes, if one hides behind the other."""
        return max(flops / self.matmul_flops_per_second, moved_bytes / self.copy_bytes_per_second)


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Ceilings:
    """Copy and multiply several times and take the best rates. `quick` works on small tensors, for tests."""
    megabytes, side = (4, 256) if quick else (1024, 8192) if device.type == "cuda" else (256, 2048)
    source = torch.rand(megabytes << 18, device=device)  # fp32
    target = torch.empty_like(source)
    timings = measure(
        [Variant("copy", lambda: target.copy_(source)), _matmul(device, dtype, side)],
        turns=3 if quick else 10,
        limit=5.0,
        device=device,
        description="ceilings of this machine",
    )
    return Ceilings(
        copy_bytes_per_second=2 * source.nbytes / timings["copy"].summary.minimum,
        matmul_flops_per_second=2 * side**3 / timings["matmul"].summary.minimum,
        dtype=str(dtype).removeprefix("torch."),
    )


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second (multiply-adds × 2) of the best of a few square matrix products; a fraction of a second.

    Moves no global random state. Products are in TF32 where `torch.set_float32_matmul_precision` allows it.
    """
    side = 8192 if device.type == "cuda" else 1024
    timings = measure([_matmul(device, dtype, side)], turns=4, limit=1.0, device=device, progress=False)
    return 2 * side**3 / timings["matmul"].summary.minimum


def _matmul(device: torch.device, dtype: torch.dtype, side: int) -> Variant:
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.rand(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return Variant("matmul", lambda: torch.mm(left, right, out=product))
