"""`holdfast bench decode`: seconds per generated token, and bytes of cache, by context."""

from __future__ import annotations

from functools import partial

import torch

from holdfast.bench.models import Compiled, Contender, Holdfast, contenders
from holdfast.bench.results import Case, Report, Result
from holdfast.bench.settings import DecodeSettings
from holdfast.bench.setup import Setup
from holdfast.bench.timing import Timing, Variant

__all__ = ["run_decode"]

STEPS_PER_TURN = 20
CHUNK = 2048
"""Tokens that a model reads at a time before its steps are timed."""


def run_decode(settings: DecodeSettings) -> Report:
    """Measure all models at all contexts, in rotation; raises ValueError where the device is missing or a mixer does
    not exist.
    """
    setup = Setup.of(settings)
    settings = setup.settings
    models = contenders(settings, setup.device, setup.dtype)
    contexts = sorted(set(settings.contexts))
    with torch.no_grad():
        caches = {model.name: model.filled_caches(contexts, settings.batch_size, CHUNK) for model in models}
        if settings.compiled:
            assert isinstance(models[0], Holdfast)
            models.insert(1, Compiled(models[0], caches[models[0].name]))
            caches[models[1].name] = models[1].filled_caches(contexts, settings.batch_size, CHUNK)
        cache_bytes = {
            (model.name, context): model.cache_bytes(caches[model.name][context])
            for model in models
            for context in contexts
        }
        variants = [
            _variant(model, context, caches[model.name][context], settings) for context in contexts for model in models
        ]
        timings = setup.measure(variants, "decoding", turns=-(-settings.steps // STEPS_PER_TURN))
    cases = []
    for context in contexts:
        results = tuple(
            _result(model, context, settings, timings[_name(model, context)], cache_bytes[model.name, context])
            for model in models
        )
        cases.append(Case("decode", {"context": context, "batch": settings.batch_size}, results))
    return setup.report("decode", cases)


def _name(model: Contender, context: int) -> str:
    return f"{model.name} at {context:,}"


def _variant(model: Contender, context: int, cache: object, settings: DecodeSettings) -> Variant:
    ids = model.random_ids(settings.batch_size, 1)
    return Variant(
        _name(model, context),
        partial(model.read, ids, cache),
        prepare=model.rewinding(cache),
        samples_per_turn=min(STEPS_PER_TURN, settings.steps),
        samples=settings.steps,
    )


def _result(model: Contender, context: int, settings: DecodeSettings, timing: Timing, cache_bytes: int) -> Result:
    return Result(
        model.name,
        timing,
        flops=model.flops(context) * settings.batch_size,
        moved_bytes=model.weight_bytes + cache_bytes,
        tokens=settings.batch_size,
        cache_bytes=cache_bytes,
        notes={"parameters": model.parameters, "cache_filled_by": model.filling},
    )
