"""`holdfast bench ops`: attention with eviction, sparse attention, a decoding step, the scorer, eviction, and the
gated delta rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.bench import peers
from holdfast.bench.memory import peak_bytes
from holdfast.bench.peers import CAUSAL, CAUSAL_BY_TIME
from holdfast.bench.results import Case, Report, Result
from holdfast.bench.scorer import scorer_cases
from holdfast.bench.settings import PASSES, WARM_UP_TOKENS, OpsSettings
from holdfast.bench.setup import Setup
from holdfast.bench.sparse import sparse_cases
from holdfast.bench.step import step_cases
from holdfast.bench.timing import Variant
from holdfast.ops.gated_delta_rule import gated_delta_rule
from holdfast.ops.norms import l2_norm
from holdfast.ops.retained_attention import retained_attention
from holdfast.ops.retention import FOREVER, streaming_retention

__all__ = ["AttentionInputs", "AttentionSize", "attention_work", "random_inputs", "run_ops", "visible_until"]

BUDGET, UNCAPPED, FLEX = "holdfast, budget", "holdfast, uncapped", "flex attention"
GIVEN = "holdfast, nothing evicted"
"""`visible_until` is given, and keeps everything: what attention of short sequences costs beside SDPA."""
_SHORTEST_SAMPLE = 5e-3  # seconds; a call of 16 tokens takes a twentieth
_SHORT = 256  # tokens up to which that is measured: on a CPU, as long as SDPA serves it


def run_ops(settings: OpsSettings) -> Report:
    """Measure what `settings.only` names; raises ValueError where the device is missing."""
    setup = Setup.of(settings)
    settings = setup.settings
    cases: list[Case] = []
    if "attention" in settings.only:
        for tokens in settings.tokens:
            cases += _attention_cases(setup, AttentionSize.of(setup, tokens))
    if "sparse" in settings.only:
        for tokens in settings.tokens:
            cases += sparse_cases(setup, tokens)
    if "step" in settings.only:
        cases += step_cases(setup)
    if "scorer" in settings.only:
        for tokens in (1, *settings.tokens):
            cases += scorer_cases(setup, tokens)
    if "retention" in settings.only:
        cases.append(_retention_case(setup))
    if "delta" in settings.only:
        for shape in settings.delta_shapes:
            cases += _delta_cases(setup, shape)
    return setup.report("ops", cases)


@dataclass(frozen=True)
class AttentionSize:
    """Everything that the inputs of attention follow from; picklable, for processes that measure memory."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    kept: int
    device: str
    dtype: torch.dtype
    seed: int

    @classmethod
    def of(cls, setup: Setup[OpsSettings], tokens: int) -> AttentionSize:
        settings = setup.settings
        return cls(
            settings.batch_size,
            tokens,
            settings.heads,
            settings.kv_heads or settings.heads,
            settings.head_dim,
            settings.window,
            settings.kept,
            str(setup.device),
            setup.dtype,
            settings.seed,
        )


@dataclass(frozen=True)
class AttentionInputs:
    """q, k, v and the gradient of the output by time [B, T, heads, D], and scores [B, T, Hkv]."""

    size: AttentionSize
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    scores: Tensor

    def pairs(self, name: str) -> int:
        """Pairs of a query and a key that it sees, over batch and query heads."""
        size = self.size
        if name in (CAUSAL, CAUSAL_BY_TIME):
            return size.batch * size.heads * size.tokens * (size.tokens + 1) // 2
        until = visible_until(name, self.scores, size).clamp(max=size.tokens - 1)
        first = torch.arange(size.tokens, device=until.device)[:, None]
        return int((until - first + 1).sum()) * (size.heads // size.kv_heads)


def random_inputs(size: AttentionSize) -> AttentionInputs:
    """Standard normal numbers, the same for the same size and seed on every device."""
    generator = torch.Generator().manual_seed(size.seed)

    def draw(heads: int) -> Tensor:
        numbers = torch.randn(size.batch, size.tokens, heads, size.head_dim, generator=generator)
        return numbers.to(size.device, size.dtype)

    q, k, v, grad = draw(size.heads), draw(size.kv_heads), draw(size.kv_heads), draw(size.heads)
    scores = torch.randn(size.batch, size.tokens, size.kv_heads, generator=generator).to(size.device)
    return AttentionInputs(size, q, k, v, grad, scores)


def visible_until(name: str, scores: Tensor, size: AttentionSize) -> Tensor:
    """int64 [B, T, Hkv]. With a budget every positive score competes for the slots; without one, `kept` keys per head
    score above 0 in expectation. `GIVEN`: all stay.
    """
    if name == GIVEN:
        return torch.full(scores.shape, FOREVER, device=scores.device)
    if name != UNCAPPED:
        return streaming_retention(scores, size.kept, size.window)
    share = torch.tensor(1 - min(size.kept / size.tokens, 1.0))
    return streaming_retention(scores - torch.special.ndtri(share), None, size.window)


def attention_work(name: str, inputs: AttentionInputs, backward: bool) -> Callable[[], Any]:
    """A function that computes the output, and the gradients with `backward`; building a mask belongs to the work."""
    by_time = name in (BUDGET, UNCAPPED, GIVEN, CAUSAL_BY_TIME)
    # Each implementation gets the layout that it likes, so that none pays for a copy.
    tensors = [x if by_time else x.transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.grad)]
    q, k, v = (x.requires_grad_(backward) for x in (x.detach() for x in tensors[:3]))
    grad, scores, size = tensors[3], inputs.scores, inputs.size  # and not the inputs, so that copied ones can go
    given = visible_until(name, scores, size) if name == GIVEN else None

    def forward() -> Tensor:
        if name == CAUSAL:
            return peers.causal_attention(q, k, v)
        if name == CAUSAL_BY_TIME:
            return peers.causal_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        if name == FLEX:
            return peers.flex_attention(q, k, v, visible_until(name, scores, size))
        until = visible_until(name, scores, size) if given is None else given
        return retained_attention(q, k, v, until, size.window)

    def forward_and_backward() -> object:
        return torch.autograd.grad(forward(), (q, k, v), grad)

    return forward_and_backward if backward else torch.no_grad()(forward)


def _work_once(name: str, size: AttentionSize, backward: bool) -> None:
    """What memory is measured of: the inputs and one call."""
    attention_work(name, random_inputs(size), backward)()


def _attention_cases(setup: Setup[OpsSettings], size: AttentionSize) -> Iterator[Case]:
    settings, device, inputs = setup.settings, setup.device, random_inputs(size)
    short = size.tokens <= _SHORT
    others = [CAUSAL, *([CAUSAL_BY_TIME] if short else []), *([FLEX] if device.type == "cuda" else [])]
    names = [BUDGET, UNCAPPED, *([GIVEN] if short else []), *(others if settings.peers else [])]
    pairs = {name: inputs.pairs(name) for name in names}
    few = min(size.tokens, WARM_UP_TOKENS)
    small = dataclasses.replace(size, tokens=few, kept=max(1, few // 2))  # few, so that a store is run
    for label, backward in PASSES.items():
        if FLEX in names:  # each length gets code compiled for it, and none runs uncompiled for too many compilations
            torch.compiler.reset()
        variants = [
            Variant(name, attention_work(name, inputs, backward), shortest_sample=_SHORTEST_SAMPLE) for name in names
        ]
        timings = setup.measure(variants, f"attention, {size.tokens:,} tokens, {label}")
        results = []
        for name in names:
            peak = None
            if settings.memory:
                peak = peak_bytes(_work_once, (name, size, backward), warm_up=(name, small, backward), device=device)
            # q·k and the weighted sum of v; backward: q·k again, and the gradients of v, the weights, q and k.
            flops = pairs[name] * size.head_dim * (14 if backward else 4)
            notes = {"pairs": pairs[name]}
            moved = _attention_bytes(inputs, name, backward)
            results.append(Result(name, timings[name], flops, moved, peak_bytes=peak, notes=notes))
        yield Case("attention", {"tokens": size.tokens, "pass": label}, tuple(results))


def _attention_bytes(inputs: AttentionInputs, name: str, backward: bool) -> int:
    """Inputs read once and outputs written once, in each pass."""
    query, pair = inputs.q.nbytes, inputs.k.nbytes + inputs.v.nbytes
    count = 2 * query + pair
    if name == GIVEN:  # `visible_until` read
        count += 8 * inputs.scores.numel()
    elif name not in (CAUSAL, CAUSAL_BY_TIME):  # the scores, and `visible_until` written and read
        count += inputs.scores.nbytes + 16 * inputs.scores.numel()
    # Backward: q, k, v, the output and its gradient are read; three gradients are written.
    return count + (4 * query + 2 * pair if backward else 0)


def _retention_case(setup: Setup[OpsSettings]) -> Case:
    settings = setup.settings
    generator = torch.Generator().manual_seed(settings.seed)
    scores = torch.randn(1, settings.retention_tokens, settings.heads, generator=generator).to(setup.device)
    name = "holdfast"
    work = Variant(name, lambda: streaming_retention(scores, settings.kept, settings.window))
    timings = setup.measure([work], "eviction")
    result = Result(name, timings[name], 0, scores.nbytes + 8 * scores.numel(), tokens=settings.retention_tokens)
    parameters = {"tokens": settings.retention_tokens, "heads": settings.heads, "slots": settings.kept}
    return Case("eviction", parameters, (result,))


def _delta_cases(setup: Setup[OpsSettings], shape: tuple[int, int, int, int]) -> Iterator[Case]:
    """Forward, and forward with backward, of the gated delta rule at `shape` (B, T, H, D)."""
    device, dtype = setup.device, setup.dtype
    batch, tokens, heads, dim = shape
    generator = torch.Generator().manual_seed(setup.settings.seed)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    q, k = l2_norm(q), l2_norm(k)
    g = -torch.rand(shape[:3], generator=generator).to(device) * 0.1
    beta = torch.rand(shape[:3], generator=generator).to(device, dtype)
    functions: dict[str, peers.DeltaRule] = {"holdfast": lambda *inputs: gated_delta_rule(*inputs)[0]}
    functions |= peers.delta_rule_peers(device) if setup.settings.peers else {}
    for label, backward in PASSES.items():
        inputs = [x.detach().requires_grad_(backward) for x in (q, k, v, g, beta)]
        variants = [Variant(name, _delta_work(work, inputs, grad, backward)) for name, work in functions.items()]
        timings = setup.measure(variants, f"gated delta rule, {tokens:,} tokens, {label}")
        # Three products of a vector and a D × D state per token, forward; twice as many backward.
        flops = 6 * dim * dim * batch * tokens * heads * (3 if backward else 1)
        moved = sum(x.nbytes for x in inputs) + v.nbytes
        moved += 2 * moved if backward else 0
        results = [Result(name, timing, flops, moved, tokens=batch * tokens) for name, timing in timings.items()]
        parameters = {"batch": batch, "tokens": tokens, "heads": heads, "dim": dim, "pass": label}
        yield Case("gated delta rule", parameters, tuple(results))


def _delta_work(function: peers.DeltaRule, inputs: list[Tensor], grad: Tensor, backward: bool) -> Callable[[], object]:
    def forward_and_backward() -> object:
        return torch.autograd.grad(function(*inputs), inputs, grad)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return forward_and_backward if backward else forward
