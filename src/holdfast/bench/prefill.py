"""`holdfast bench prefill`: seconds until a prompt has been read."""

from __future__ import annotations

from functools import partial

import torch

from holdfast.bench.ceilings import measure_ceilings
from holdfast.bench.models import Contender, contenders
from holdfast.bench.results import Case, Report, Result
from holdfast.bench.settings import PrefillSettings
from holdfast.bench.timing import Variant, measure
from holdfast.machine import describe_machine

__all__ = ["run_prefill"]


def run_prefill(settings: PrefillSettings) -> Report:
    """Measure every length; raises ValueError where the device is missing or a mixer does not exist."""
    settings = settings.effective()
    device, dtype = settings.resolve()
    models = contenders(settings, device, dtype)
    ceilings = measure_ceilings(device, dtype, quick=settings.quick)
    with torch.no_grad():
        cases = [_case(settings, models, tokens, device) for tokens in sorted(settings.tokens)]
    return Report("prefill", settings.to_dict(), describe_machine(), ceilings, tuple(cases))


def _case(settings: PrefillSettings, models: list[Contender], tokens: int, device: torch.device) -> Case:
    ids = models[0].random_ids(1, tokens)
    chunks = {model.name: settings.peer_chunk for model in models} | {models[0].name: settings.chunk}
    timings = measure(
        [Variant(model.name, partial(model.prefill, ids, chunks[model.name])) for model in models],
        turns=settings.repeats,
        limit=settings.limit,
        device=device,
        description=f"prefill, {tokens:,} tokens",
    )
    results = [
        Result(
            model.name,
            timings[model.name],
            flops=model.flops_of_sequence(tokens) - _spared(model, tokens),
            moved_bytes=model.weight_bytes,
            tokens=tokens,
            notes={"parameters": model.parameters, "chunk": chunks[model.name] or tokens},
        )
        for model in models
    ]
    return Case("prefill", {"tokens": tokens}, tuple(results))


def _spared(model: Contender, tokens: int) -> int:
    """Operations of the head, which computes the logits of the last token only."""
    return 2 * model.model.get_output_embeddings().weight.numel() * (tokens - 1)
