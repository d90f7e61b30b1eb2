"""In which precision the ops compute."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic inside an op: float64 for float64, otherwise float32."""
    return torch.promote_types(x.dtype, torch.float32)


_NOTHING = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast lowers no matrix products or convolutions where `x` is; free where it is off."""
    # Asking a device for its name costs more than asking for autocast, which counts beside the attention of one token.
    kind = "cpu" if x.is_cpu else x.device.type
    if (x.is_cpu or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return _NOTHING


def allows_tf32() -> bool:
    """Whether products of float32 may be computed in TF32 on CUDA, by the newer of PyTorch's two settings for it.

    `torch.set_float32_matmul_precision` sets both; the older getter raises where only the newer one was used
    (`torch.backends.fp32_precision`, as transformers does).
    """
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if newer is None:
        return torch.get_float32_matmul_precision() != "highest"
    return (getattr(torch.backends, "fp32_precision", newer) if newer == "none" else newer) == "tf32"
