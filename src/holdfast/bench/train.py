"""`holdfast bench train`: tokens per second of forward, backward and optimizer step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from holdfast.bench.models import SIZES, Contender, contenders, keep_about
from holdfast.bench.results import Case, Report, Result
from holdfast.bench.settings import TrainSettings
from holdfast.bench.setup import Setup
from holdfast.bench.timing import Variant

__all__ = ["run_train"]


def run_train(settings: TrainSettings) -> Report:
    """Measure training; raises ValueError where the device is missing or a mixer does not exist."""
    setup = Setup.of(settings)
    settings = setup.settings
    models = contenders(settings, setup.device, setup.dtype)
    ids = models[0].random_ids(settings.batch_size, settings.tokens)
    keep_about(models[0].model, ids, SIZES[settings.size].budget)
    kept = _kept(models[0].model, ids)
    timings = setup.measure([Variant(model.name, _step(model, ids)) for model in models], "training")
    tokens = ids.numel()
    results = []
    for model in models:
        forward = settings.batch_size * model.flops_of_sequence(settings.tokens)
        notes: dict[str, Any] = {"parameters": model.parameters}
        if kept is not None and model is models[0]:
            notes["kept_per_head"] = kept
        # AdamW reads the weight, its gradient and two moments and writes three of them.
        moved = 7 * model.weight_bytes
        results.append(Result(model.name, timings[model.name], 3 * forward, moved, tokens=tokens, notes=notes))
    case = Case("train", {"batch": settings.batch_size, "tokens": settings.tokens}, tuple(results))
    return setup.report("train", [case])


def _kept(model: Any, ids: Tensor) -> float | None:
    """Pairs that a head scores above the threshold, on average; None for a model without scorers."""
    with torch.no_grad():
        retention = model(input_ids=ids, use_cache=False).retention
    return None if retention is None else retention.kept.mean().item()


def _step(model: Contender, ids: Tensor) -> partial[None]:
    model.model.train()
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=1e-5)
    return partial(_train_once, model.model, optimizer, ids)


def _train_once(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
