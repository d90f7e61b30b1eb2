"""What a context costs each model: time to read it, time per token after it, memory, and how much is remembered.

All models of one context and batch size take turns (see `timing`), so that a machine whose speed drifts is as unkind to
one as to another.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from holdfast.bench.costs import Cost, ModelCosts, held_pairs
from holdfast.bench.memory import available_bytes, peak_bytes
from holdfast.bench.models import Holdfast
from holdfast.bench.scorer_share import ScorerShare, scorer_share
from holdfast.bench.settings import WARM_UP_TOKENS
from holdfast.bench.timing import Timing, Variant, measure
from holdfast.cache import HybridCache
from holdfast.configuration import HybridConfig
from holdfast.data.progress import track
from holdfast.evaluation.sample_log import SampleLog
from holdfast.info import flops_per_token, parameters_by_part
from holdfast.mixers.softmax_attention import AttentionOptions
from holdfast.modeling import HybridForCausalLM
from holdfast.ops.retention import streaming_retention

__all__ = ["EfficiencyPlan", "Subject", "measure_efficiency"]

STEPS_PER_TURN = 20

Pace = tuple[int, float]
"""So many tokens of a row were read in so many seconds."""


@dataclass(frozen=True, kw_only=True)
class EfficiencyPlan:
    """What is measured, and for how long.

    Attributes:
        contexts: tokens read before the first step that is timed, rising.
        batch_sizes: rows read and generated at once.
        steps: generated tokens of every row that are timed, in turns of 20 and what is left.
        repeats: readings of every context, after one to warm up.
        chunk: tokens of a row that a model reads in one call.
        limit: seconds after which a model takes no further turn. What a log has that was cut short by a lower limit is
            measured again.
        longest: seconds of one reading at the most. What is foreseen to take longer, or to need more memory than there
            is, is left out.
        memory: measure peaks too: each takes a further reading, off CUDA in a new process.
        seed: of the tokens read.
    """

    contexts: tuple[int, ...] = tuple(1024 << power for power in range(8))
    batch_sizes: tuple[int, ...] = (1,)
    steps: int = 200
    repeats: int = 3
    chunk: int = 2048
    limit: float = 60.0
    longest: float = 60.0
    memory: bool = True
    seed: int = 0

    def determining(self) -> dict[str, Any]:
        """What a measurement follows from beside the model, its context and its batch size."""
        return {name: getattr(self, name) for name in ("steps", "repeats", "chunk", "memory", "seed")}


@dataclass(frozen=True)
class Subject:
    """A model to measure: saved in a directory, or new and untrained.

    Attributes:
        name: in tables.
        source: directory or configuration.
        text: int64 [rows, T], what it reads, at least as many rows and tokens as are measured; None: random tokens.
    """

    name: str
    source: Path | HybridConfig
    text: torch.Tensor | None = None

    def log_key(self) -> dict[str, str]:
        """What names the text in a log of measurements."""
        if self.text is None:
            return {}
        return {"text": hashlib.sha256(self.text.numpy().tobytes()).hexdigest()}

    def load(self, device: torch.device, dtype: torch.dtype) -> Holdfast:
        """The model, in evaluation mode; random weights come from PyTorch's generator."""
        if isinstance(self.source, HybridConfig):
            found = Holdfast(self.source, self.name)
        else:
            disable_progress_bar()  # in a process that measures memory it has not been done
            found = Holdfast(HybridForCausalLM.from_pretrained(self.source, dtype=dtype), self.name)
        found.model.to(device, dtype)
        return found


def measure_efficiency(
    subjects: Sequence[Subject],
    plan: EfficiencyPlan,
    *,
    device: torch.device,
    dtype: torch.dtype,
    logs: Mapping[str, SampleLog] | None = None,
    progress: bool = True,
) -> dict[str, ModelCosts]:
    """Measure all models at all contexts and batch sizes, the short ones first.

    Args:
        subjects: with names of their own.
        plan: what to measure.
        device: where to compute.
        dtype: of weights and caches.
        logs: for each name, where costs are kept and, after an interruption, found again; None keeps none.
        progress: show progress bars when standard error is a terminal.

    Returns:
        Costs by name. A model's weights are loaded once, and all are held at the same time.

    Raises:
        ValueError: if a text is too short.
    """
    texts = {subject.name: subject.text for subject in subjects if subject.text is not None}
    for name, text in texts.items():
        if text.shape[0] < max(plan.batch_sizes) or text.shape[1] < max(plan.contexts):
            raise ValueError(
                f"the text for {name} is {text.shape[0]} x {text.shape[1]:,} tokens, too little for "
                f"{max(plan.batch_sizes)} x {max(plan.contexts):,}; give more text, or measure less."
            )
    torch.manual_seed(plan.seed)
    models = {subject.name: subject.load(device, dtype) for subject in subjects}
    known = {name: _Known(SampleLog(None, {}) if logs is None else logs[name]) for name in models}
    pace: dict[tuple[str, int], Pace] = {}
    places = [(context, batch) for batch in plan.batch_sizes for context in sorted(set(plan.contexts))]
    with torch.no_grad():
        for number, (context, batch) in enumerate(places, start=1):
            where = f"{context:,} tokens × {batch} ({number} of {len(places)})"
            group = _Group(plan, context, batch, where, device, progress, pace, texts)
            for name, cost in group.measure(_to_measure(group, subjects, models, known)).items():
                known[name].keep(cost)
            if plan.memory:  # after all speeds are kept: a peak may be what ends this process
                group.add_peaks(subjects, models, known)
            for name, model in known.items():
                if (found := model.costs.get((context, batch))) is not None:
                    pace[name, batch] = (context, found.prefill.summary.median)
    return {subject.name: _described(subject, models[subject.name], plan, known[subject.name]) for subject in subjects}


@dataclass
class _Known:
    """What is known of one model by now.

    Attributes:
        log: where costs are kept, each as soon as it is measured.
        costs: by context and batch size.
        missing: why there is no cost.
        resumed: costs that came from the log.
    """

    log: SampleLog
    costs: dict[tuple[int, int], Cost] = field(default_factory=dict)
    missing: dict[tuple[int, int], str] = field(default_factory=dict)
    resumed: int = 0

    def earlier(self, context: int, batch: int) -> Cost | None:
        """What an earlier run measured."""
        record = self.log.records.get(_name(context, batch))
        return None if record is None else Cost.from_dict(record)

    def take(self, cost: Cost) -> None:
        """Use what an earlier run measured."""
        self.costs[cost.context, cost.batch] = cost
        self.resumed += 1

    def keep(self, cost: Cost) -> None:
        """Use what was measured now; it is in the log when this returns, in place of what may have been there."""
        self.costs[cost.context, cost.batch] = cost
        self.log.append({_name(cost.context, cost.batch): cost.to_dict()})


def _name(context: int, batch: int) -> str:
    """Of a cost, in the log."""
    return f"{context}/{batch}"


def _to_measure(
    group: _Group, subjects: Sequence[Subject], models: Mapping[str, Holdfast], known: Mapping[str, _Known]
) -> list[Holdfast]:
    """The models whose speed is to be measured at this place; of the others it is known, or why it cannot be."""
    plan, place = group.plan, (group.context, group.batch)
    ready: list[Holdfast] = []
    for subject in subjects:
        model, found = models[subject.name], known[subject.name]
        cost = found.earlier(*place)
        if cost is not None:
            group.pace[subject.name, group.batch] = (group.context, cost.prefill.summary.median)
            # One that was cut short is measured again where there is more time now.
            if cost.is_whole(plan.repeats, plan.steps) or cost.limit >= plan.limit:
                found.take(cost)
                continue
        reason = group.hopeless(model, ready)
        if reason is None:
            ready.append(model)
        elif cost is None:
            found.missing[place] = reason
        else:
            found.take(cost)
    return ready


@dataclass(frozen=True)
class _Group:
    """The measurements of one context and batch size."""

    plan: EfficiencyPlan
    context: int
    batch: int
    where: str
    """What progress bars say."""
    device: torch.device
    progress: bool
    pace: dict[tuple[str, int], Pace]
    """By model and batch size."""
    texts: Mapping[str, torch.Tensor]
    """By model, where it reads text."""

    @property
    def name(self) -> str:
        """In the log."""
        return _name(self.context, self.batch)

    def hopeless(self, model: Holdfast, ready: Sequence[Holdfast]) -> str | None:
        """Why this model cannot be measured here beside those that are `ready`; None where it can."""
        needed, others = self._bytes(model), sum(map(self._bytes, ready))
        free = available_bytes(self.device)
        if free is not None and needed + others > free:
            left = max(0, free - others) / 2**30
            return f"about {needed / 2**30:.1f} GiB of memory are needed, {left:.1f} GiB are left beside the others"
        seconds = self._foreseen(model)
        if seconds > self.plan.longest:
            return f"one reading would take about {seconds:,.3g} s, more than the {self.plan.longest:g} s allowed"
        return None

    def measure(self, models: Sequence[Holdfast]) -> dict[str, Cost]:
        """Costs by name but for the peaks, of models that take turns; the caches are gone when it returns."""
        if not models:
            return {}
        caches: dict[str, HybridCache] = {}
        readings = [self._reading(model, caches) for model in models]
        prefill = self._timed(readings, f"prefill, {self.where}", self.plan.repeats)
        at_first = {name: (cache.nbytes, held_pairs(cache)) for name, cache in caches.items()}  # steps make them longer
        steps = [self._step(model, caches[model.name]) for model in models]
        decode = self._timed(steps, f"decoding after {self.where}", -(-self.plan.steps // STEPS_PER_TURN))
        return {
            model.name: Cost(
                self.context,
                self.batch,
                prefill=prefill[model.name],
                decode=decode[model.name],
                cache_bytes=at_first[model.name][0],
                peak_bytes=None,
                held=at_first[model.name][1],
                scorer=self._scorer_share(model, caches[model.name]),
                limit=self.plan.limit,
            )
            for model in models
        }

    def add_peaks(
        self, subjects: Sequence[Subject], models: Mapping[str, Holdfast], known: Mapping[str, _Known]
    ) -> None:
        """Measure the peaks of the costs here that have none yet, and keep each at once."""
        costs = {name: found.costs.get((self.context, self.batch)) for name, found in known.items()}
        waiting = [(s, cost) for s in subjects if (cost := costs[s.name]) is not None and cost.peak_bytes is None]
        for subject, cost in track(waiting, f"memory, {self.where}", progress=self.progress):
            peak = self._peak(subject, models[subject.name])
            known[subject.name].keep(dataclasses.replace(cost, peak_bytes=peak))

    def _bytes(self, model: Holdfast) -> int:
        """Of a cache, and half as much again: a layer's cache grows by copying it, and attention may copy its keys."""
        return 3 * HybridCache.bytes_for(model.model.config, self.batch, model.model.dtype, self.context) // 2

    def _foreseen(self, model: Holdfast) -> float:
        """Seconds to read the context, in proportion to the operations of what was read last, at first a chunk."""
        if (model.name, self.batch) not in self.pace:
            tokens = min(self.plan.chunk, self.context)
            [timing] = self._timed([Variant(model.name, partial(self._read, model, tokens))], "pace", 1).values()
            self.pace[model.name, self.batch] = (tokens, timing.summary.median)
        tokens, seconds = self.pace[model.name, self.batch]
        return seconds * model.flops_of_sequence(self.context) / model.flops_of_sequence(tokens)

    def _timed(self, variants: Sequence[Variant], what: str, turns: int) -> dict[str, Timing]:
        limit, progress = self.plan.limit, self.progress
        return measure(variants, turns=turns, limit=limit, device=self.device, description=what, progress=progress)

    def _read(self, model: Holdfast, tokens: int) -> HybridCache:
        return model.prefill(model.random_ids(self.batch, tokens), self.plan.chunk)

    def _reading(self, model: Holdfast, caches: dict[str, HybridCache]) -> Variant:
        """A reading that leaves its cache in `caches`."""
        text = self.texts.get(model.name)
        if text is None:
            ids = model.random_ids(self.batch, self.context)
        else:
            ids = text[: self.batch, : self.context].to(self.device)

        def read() -> None:
            caches[model.name] = model.prefill(ids, self.plan.chunk)

        return Variant(model.name, read, prepare=lambda: caches.pop(model.name, None))  # never two caches of a model

    def _step(self, model: Holdfast, cache: HybridCache) -> Variant:
        step = partial(model.read, model.random_ids(self.batch, 1), cache)
        steps = self.plan.steps
        return Variant(model.name, step, samples_per_turn=min(STEPS_PER_TURN, steps), samples=steps)

    def _scorer_share(self, model: Holdfast, cache: HybridCache) -> ScorerShare | None:
        chunk = model.random_ids(self.batch, min(self.plan.chunk, self.context))
        token = model.random_ids(self.batch, 1)
        calls: list[Callable[[], object]] = [partial(model.read, ids, cache) for ids in (chunk, token)]
        return scorer_share(model.model, *calls, steps=STEPS_PER_TURN, device=self.device)

    def _peak(self, subject: Subject, model: Holdfast) -> int:
        reading = _Reading(subject, model.model.dtype, self.device, self.plan.chunk, model)
        warm_up = (1, min(self.context, WARM_UP_TOKENS))
        return peak_bytes(reading, (self.batch, self.context), warm_up=warm_up, device=self.device)


@dataclass
class _Reading:
    """Reads random tokens with a model that comes along into a new process as what it is made of."""

    subject: Subject
    dtype: torch.dtype
    device: torch.device
    chunk: int
    model: Holdfast | None

    def __call__(self, batch: int, tokens: int) -> None:
        if self.model is None:
            self.model = self.subject.load(self.device, self.dtype)
            # What compiles the store takes a hundred megabytes, once, and a short warm-up evicts nothing.
            streaming_retention(torch.ones(1, 4, 1, device=self.device), 2, 1)
        with torch.no_grad():
            self.model.prefill(self.model.random_ids(batch, tokens), self.chunk)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"model": None}


def _heads(config: HybridConfig) -> dict[str, tuple[int, int]]:
    """Query heads and key/value heads of each kind of softmax attention."""
    options = {name: config.options_for(name) for name in dict.fromkeys(config.mixers or ())}
    return {
        name: (found.num_heads, found.kv_heads)
        for name, found in options.items()
        if isinstance(found, AttentionOptions)
    }


def _described(subject: Subject, contender: Holdfast, plan: EfficiencyPlan, known: _Known) -> ModelCosts:
    model = contender.model
    return ModelCosts(
        mixers=tuple(model.config.mixers),
        heads=_heads(model.config),
        trained=isinstance(subject.source, Path),
        parameters=parameters_by_part(model),
        weight_bytes=sum(weight.nbytes for weight in model.parameters()),
        flops_per_token={context: flops_per_token(model, context) for context in sorted(set(plan.contexts))},
        scorer_flops_per_token=sum(layer.scorer_flops_per_token for layer in model.model.eviction_layers()),
        costs=tuple(known.costs.values()),
        missing=known.missing,
        resumed=known.resumed,
    )
