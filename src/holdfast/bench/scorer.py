"""`holdfast bench ops --only scorer`: the scorer's network beside the framework's grouped convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from holdfast.bench.results import Case, Result
from holdfast.bench.settings import PASSES, OpsSettings
from holdfast.bench.setup import Setup
from holdfast.bench.timing import Variant
from holdfast.mixers.scorers import ConvScorer, by_convolutions

__all__ = ["scorer_cases", "scorer_flops"]

KIND = "scorer"
Scorer = Callable[[Tensor], Tensor]
_SHORTEST_SAMPLE = 5e-3  # seconds; one token takes a twentieth


def scorer_flops(scorer: ConvScorer, tokens: int) -> int:
    """Of the products, forward, for `tokens` scores of every head; what neighbours share is counted once."""
    return 2 * tokens * sum(weight.numel() for weight in scorer.parameters() if weight.dim() > 1)


def scorer_cases(setup: Setup[OpsSettings], tokens: int) -> Iterator[Case]:
    """Forward, and forward with backward, at one length; of a single token forward alone, as in decoding."""
    settings, device, dtype = setup.settings, setup.device, setup.dtype
    heads = settings.kv_heads or settings.heads
    generator = torch.Generator().manual_seed(settings.seed)
    scorer = ConvScorer(heads, 2 * settings.head_dim, dropout=0.0).to(device, dtype)
    shape = (settings.batch_size, tokens + scorer.receptive_field - 1, heads, 2 * settings.head_dim)
    features = torch.randn(shape, generator=generator).to(device, dtype)
    valid = torch.ones(1, shape[1], dtype=torch.bool, device=device)
    grad = torch.randn(shape[0], tokens, heads, generator=generator).to(device)
    works: dict[str, Scorer] = {"holdfast": lambda x: scorer(x, valid)}
    if settings.peers:
        works["grouped convolutions"] = lambda x: by_convolutions(scorer, x, valid)
        if device.type == "cuda":
            torch.compiler.reset()
            works["grouped convolutions, compiled"] = torch.compile(works["grouped convolutions"])
    weights = sum(weight.nbytes for weight in scorer.parameters())
    for label, backward in PASSES.items():
        if backward and tokens == 1:
            continue
        variants = [
            Variant(name, _work(work, features, scorer, grad, backward), shortest_sample=_SHORTEST_SAMPLE)
            for name, work in works.items()
        ]
        timings = setup.measure(variants, f"{KIND}, {tokens:,} tokens, {label}")
        passes = 3 if backward else 1
        flops = passes * scorer_flops(scorer, settings.batch_size * tokens)
        moved = passes * (features.nbytes + weights + grad.nbytes)
        results = tuple(Result(name, timing, flops, moved) for name, timing in timings.items())
        yield Case(KIND, {"tokens": tokens, "heads": heads, "pass": label}, results)


def _work(work: Scorer, features: Tensor, scorer: ConvScorer, grad: Tensor, backward: bool) -> Callable[[], object]:
    leaves = [features.detach().requires_grad_(backward), *scorer.parameters()]

    def forward_and_backward() -> object:
        return torch.autograd.grad(work(leaves[0]), leaves, grad)

    return forward_and_backward if backward else torch.no_grad()(lambda: work(leaves[0]))
