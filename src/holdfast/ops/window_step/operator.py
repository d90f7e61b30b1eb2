"""The Triton step as an operator of PyTorch, so that `torch.compile` knows what it changes without looking inside.

Triton is imported when the operator first runs.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from holdfast.ops.window_step.slots import Slots

LARGEST_HEAD = 256
LARGEST_GROUP = 64
LARGEST_BUDGET = 8192
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def is_available() -> bool:
    """Whether Triton can be imported; it is not imported before its first use."""
    return importlib.util.find_spec("triton") is not None


def supports(q: Tensor, slots: Slots) -> bool:
    """Whether there are kernels for these dtypes, sizes and memory layouts."""
    return not _obstacle(q, slots)


def window_step_triton(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    score: Tensor | None,
    real: Tensor | None,
    sinks: int,
    delay: int,
    scale: float,
) -> Tensor:
    """The contract of `window_step` in two launches, without a gradient.

    Raises:
        ImportError: Triton is not installed.
        ValueError: there is no kernel for these inputs.
    """
    if not is_available():
        raise ImportError("backend 'triton' needs Triton: install triton, or take backend 'pytorch'.")
    if obstacle := _obstacle(q, slots):
        raise ValueError(f"backend 'triton' {obstacle}: take backend 'pytorch'.")
    tensors = (slots.keys, slots.values, slots.seen, slots.scores, slots.positions)
    return torch.ops.holdfast.window_step(q, key, value, score, real, *tensors, sinks, delay, scale)


def _obstacle(q: Tensor, slots: Slots) -> str:
    """Why the kernels cannot take these tensors; empty if they can."""
    if q.dtype not in DTYPES or slots.keys.dtype not in DTYPES:
        return f"has no kernels for {q.dtype} with slots of {slots.keys.dtype}"
    if q.shape[2] > LARGEST_HEAD:
        return f"takes heads of at most {LARGEST_HEAD} channels, not {q.shape[2]}"
    groups = q.shape[1] // slots.keys.shape[1]
    if groups > LARGEST_GROUP:
        return f"takes at most {LARGEST_GROUP} query heads per key/value head, not {groups}"
    if slots.budget > LARGEST_BUDGET:
        return f"takes a budget of at most {LARGEST_BUDGET}, not {slots.budget}"
    tensors = (slots.keys, slots.values, slots.seen, slots.scores, slots.positions)
    if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        return "needs contiguous slots"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"needs a GPU (or TRITON_INTERPRET=1 before the first import of Triton), not {q.device}"
    return ""


@torch.library.custom_op("holdfast::window_step", mutates_args=("keys", "values", "seen", "scores", "positions"))
def _window_step(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor | None,
    real: Tensor | None,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    scores: Tensor | None,
    positions: Tensor | None,
    sinks: int,
    delay: int,
    scale: float,
) -> Tensor:
    from holdfast.ops.window_step.triton import step

    slots = Slots(keys, values, seen, scores, positions)
    score = None if score is None else score.float().contiguous()
    real = None if real is None else real.contiguous()
    return step(q.contiguous(), key.contiguous(), value.contiguous(), slots, score, real, sinks, delay, scale)


@_window_step.register_fake
def _(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor | None,
    real: Tensor | None,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    scores: Tensor | None,
    positions: Tensor | None,
    sinks: int,
    delay: int,
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape)
