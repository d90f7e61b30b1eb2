"""How fast a run is: tokens per second, and how much of what the device could compute it uses."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from holdfast.bench.ceilings import measure_matmul
from holdfast.info import flops_per_token
from holdfast.modeling import HybridForCausalLM

CLOCK_METRICS = ("seconds", "tokens_per_second", "utilisation")
"""Metrics that are not the same when a run is repeated."""

_PASSES = 3  # a backward pass computes twice what a forward pass does; what is recomputed is no use to the model


class SpeedMeter(TrainerCallback):
    """Measures a training run by the clock: loading of data included, evaluations and checkpoints left out.

    Utilisation is the share of the device's operations per second that the model's own operations take (MFU): those
    of `holdfast.info.flops_per_token` at half the length of a sequence, forward and backward, recomputation not
    counted. Where lengths differ, as those of packed documents do, it is the length that a token finds on average.

    Args:
        peak_flops: operations per second that one device could make in the dtype of training (on a CPU that trains in
            bfloat16: in that or float32, whichever is faster); None: the best of a few large matrix products, measured
            when training begins (on CPUs and CUDA; a fraction of a second).
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        self.peak_flops = peak_flops
        self._hook: RemovableHandle | None = None
        self._mark = self._seconds = 0.0
        self._tokens, self._devices = 0, 1
        self._squares: float | torch.Tensor = 0.0  # of the lengths of sequences, summed
        self._known: HybridForCausalLM | None = None

    def drain(self) -> dict[str, float]:
        """`tokens_per_second` of all devices and `utilisation` (0 to 1) since the last call; empty without a step.

        The utilisation is left out where the model's operations or the device's peak are not known. Call it where the
        host has waited for the device.
        """
        self._count_time()
        tokens, squares, seconds = self._tokens, self._squares, self._seconds
        self._tokens, self._squares, self._seconds = 0, 0.0, 0.0
        if not tokens or seconds <= 0:
            return {}
        speed = {"tokens_per_second": tokens * self._devices / seconds}
        if self._known is not None and self.peak_flops:
            context = max(1, round(float(squares) / tokens / 2))
            speed["utilisation"] = _PASSES * tokens * flops_per_token(self._known, context) / seconds / self.peak_flops
        return speed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:  # an earlier training that ended with an exception
            self._hook.remove()
        model: nn.Module = kwargs["model"]
        self._known = next((module for module in model.modules() if isinstance(module, HybridForCausalLM)), None)
        if self.peak_flops is None and self._known is not None and args.device.type in ("cpu", "cuda"):
            dtypes = {torch.bfloat16 if args.bf16 else next(model.parameters()).dtype}
            if args.device.type == "cpu" and args.bf16:  # without instructions for it, products in bfloat16 are slower
                dtypes.add(torch.float32)
            self.peak_flops = max(measure_matmul(args.device, dtype) for dtype in dtypes)
        self._devices = args.world_size
        self._hook = model.register_forward_pre_hook(_Counter(self), with_kwargs=True)
        self._mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count_time()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def count(self, shape: torch.Size, cu_seqlens: torch.Tensor | None) -> None:
        """Count a batch of [B, T] tokens that the model is trained on; `cu_seqlens`: of documents packed into it."""
        self._tokens += shape.numel()
        self._squares = self._squares + (  # stays on its device: reading it would stall a GPU
            shape.numel() * shape[-1] if cu_seqlens is None else cu_seqlens.diff().long().square().sum()
        )

    def _count_time(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now


class _Counter:
    """The hook that counts what goes into a model while it is trained."""

    def __init__(self, meter: SpeedMeter) -> None:
        self._meter = meter

    @torch.compiler.disable  # counting in Python would recompile the model at every step
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if module.training and isinstance(tokens, torch.Tensor):
            self._meter.count(tokens.shape, kwargs.get("cu_seqlens"))
