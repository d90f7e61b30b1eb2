"""`holdfast bench prefill`: seconds until a prompt has been read."""

from __future__ import annotations

from functools import partial

import torch

from holdfast.bench.models import Contender, contenders
from holdfast.bench.results import Case, Report, Result
from holdfast.bench.settings import PrefillSettings
from holdfast.bench.setup import Setup
from holdfast.bench.timing import Variant

__all__ = ["run_prefill"]


def run_prefill(settings: PrefillSettings) -> Report:
    """Measure every length; raises ValueError where the device is missing or a mixer does not exist."""
    setup = Setup.of(settings)
    models = contenders(setup.settings, setup.device, setup.dtype)
    with torch.no_grad():
        return setup.report("prefill", [_case(setup, models, tokens) for tokens in sorted(setup.settings.tokens)])


def _case(setup: Setup[PrefillSettings], models: list[Contender], tokens: int) -> Case:
    settings = setup.settings
    ids = models[0].random_ids(1, tokens)
    chunks = {model.name: settings.peer_chunk for model in models} | {models[0].name: settings.chunk}
    variants = [Variant(model.name, partial(model.prefill, ids, chunks[model.name])) for model in models]
    timings = setup.measure(variants, f"prefill, {tokens:,} tokens")
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
