"""From retention scores to `visible_until`, the last query that can see each key (specification §3.3 and §3.4).

`streaming_retention` runs the store of a fixed number of slots exactly as a decoder would meet it, key by key.
`streaming_retention_reference` says the same by another route: the order of falling scores.
"""

import bisect
import functools
import heapq
import importlib.util
import itertools
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from holdfast.ops.threads import in_threads

FOREVER = 1 << 62
"""`visible_until` of a key that no later query loses."""

# Below this many scores, starting threads costs more than it saves.
_THREADED_SIZE = 1 << 17
# Larger stores do not fit in the registers of one program.
_LARGEST_TRITON_BUDGET = 8192


def streaming_retention(
    scores: Tensor,
    budget: int | None,
    window: int,
    sinks: int = 0,
    *,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Say until when each key stays visible, given its score and a store of `budget` slots per head.

    Key j is seen by the queries j … j + window. It then leaves the window. It is forgotten there unless it is a
    candidate: its score is positive, or it is one of the first `sinks` keys, whose score counts as +inf. A candidate
    takes a free slot of the store, or the slot of the lowest score in it if its own is strictly higher (among equal
    lowest scores the latest key goes), or is forgotten. A key that is never forgotten gets `FOREVER`; the others get
    the index of the last query that sees them: `j + window` if they never entered the store, and `x + window` if key x
    took their slot.

    Args:
        scores: [B, T, Hkv], any floating dtype. NaN is not positive. Only compared, never differentiated.
        budget: slots per sequence and head, sinks included; None keeps every candidate forever.
        window: keys that a query sees behind itself.
        sinks: keys at the beginning of every sequence that are never forgotten; at most `budget`.
        starts: bool [B, T], true where a new sequence begins in a packed row. The store is emptied there and the sinks
            are counted from there. The keys of the sequence before keep what they had: the caller caps their
            `visible_until` at the end of their sequence.
        backend: "numba" (on the CPU) or "triton" (CUDA and ROCm, 1 ≤ budget ≤ 8192). None takes triton on a GPU where
            it is installed and the budget fits; else numba; and neither where there are as many slots as keys.

    Returns:
        int64 [B, T, Hkv] on the device of `scores`.

    Raises:
        TypeError: scores are not floating, or starts are not bool.
        ValueError: a shape, a negative number, more sinks than slots, or a backend that does not fit.
        ImportError: backend "triton" without Triton.

    O(T log budget) time per sequence and head with numba, O(T + entries·budget) with triton, in parallel over them, and
    O(T + budget) memory. With numba, scores on another device are copied to the host and the answer back, so the call
    waits for that device; triton never does. Where every candidate has a slot, one comparison per score is all.
    """
    _check(scores, budget, window, sinks, starts)
    if backend not in (None, "numba", "triton"):
        raise ValueError(f"backend {backend!r} does not exist: choose 'numba' or 'triton'.")
    scores = scores.detach()
    if budget is None or (backend is None and scores.shape[1] <= budget):
        return _keep_all(scores, window, sinks, starts)
    if backend == "triton" or (backend is None and scores.is_cuda and not _triton_obstacle(scores, budget)):
        return _on_device(scores, budget, window, sinks, starts)
    return torch.ops.holdfast.streaming_retention(scores, budget, window, sinks, starts)


def streaming_retention_reference(
    scores: Tensor, budget: int | None, window: int, sinks: int = 0, *, starts: Tensor | None = None
) -> Tensor:
    """`streaming_retention` by the rule at the end of specification §3.4, in plain Python.

    Candidates are taken in order of falling score (the earlier key first among equals). A key is forgotten when
    `budget` candidates ahead of it in that order have left the window: the latest of the `budget` earliest of them.
    """
    _check(scores, budget, window, sinks, starts)
    batch, length, heads = scores.shape
    begins = torch.zeros(batch, length, dtype=torch.bool) if starts is None else starts.cpu()
    visible_until = torch.empty(batch, length, heads, dtype=torch.int64)
    for b in range(batch):
        bounds = sorted({0, *begins[b].nonzero().flatten().tolist(), length})
        for first, end in itertools.pairwise(bounds):
            for h in range(heads):
                row = scores[b, first:end, h].tolist()
                row[:sinks] = [float("inf")] * len(row[:sinks])
                until = _forget_in_order(row, length if budget is None else budget, window)
                visible_until[b, first:end, h] = torch.tensor([u if u == FOREVER else first + u for u in until])
    return visible_until.to(scores.device)


def _forget_in_order(scores: list[float], budget: int, window: int) -> list[int]:
    """`visible_until` of one sequence and head, its keys numbered from 0."""
    visible_until = [j + window for j in range(len(scores))]
    earliest: list[int] = []  # the `budget` earliest keys among those with a higher score, in order
    for j in sorted((j for j, score in enumerate(scores) if score > 0), key=lambda j: (-scores[j], j)):
        full = len(earliest) >= budget
        if budget > 0:
            visible_until[j] = max(j, earliest[-1]) + window if full else FOREVER
        bisect.insort(earliest, j)
        del earliest[budget:]
    return visible_until


def _check(scores: Tensor, budget: int | None, window: int, sinks: int, starts: Tensor | None) -> None:
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, not {scores.dtype}.")
    if scores.dim() != 3:
        raise ValueError(f"scores must have the shape [B, T, Hkv], not {list(scores.shape)}.")
    for name, number in (("budget", budget), ("window", window), ("sinks", sinks)):
        if number is not None and number < 0:
            raise ValueError(f"{name} must not be negative, but is {number}.")
    if budget is not None and sinks > budget:
        raise ValueError(f"{sinks} sinks do not fit in a budget of {budget}: raise the budget or lower the sinks.")
    if starts is None:
        return
    if starts.dtype != torch.bool:
        raise TypeError(f"starts must be bool, not {starts.dtype}.")
    if starts.shape != scores.shape[:2]:
        raise ValueError(
            f"starts must have the shape {list(scores.shape[:2])} of the scores, not {list(starts.shape)}."
        )


def _keep_all(scores: Tensor, window: int, sinks: int, starts: Tensor | None) -> Tensor:
    """With a slot for every candidate none is forgotten."""
    position = torch.arange(scores.shape[1], device=scores.device)[:, None]
    candidates = scores > 0
    if sinks:
        candidates |= (position if starts is None else position - _last_start(starts)[..., None]) < sinks
    return torch.where(candidates, FOREVER, position + window).contiguous()


def _last_start(starts: Tensor) -> Tensor:
    """Index of the latest beginning at or before each position, [B, T]."""
    position = torch.arange(starts.shape[1], device=starts.device)
    return torch.where(starts, position, 0).cummax(dim=1).values


def _triton_obstacle(scores: Tensor, budget: int) -> str:
    """Why Triton cannot run this store; empty if it can."""
    if not 1 <= budget <= _LARGEST_TRITON_BUDGET:
        return f"takes budgets from 1 to {_LARGEST_TRITON_BUDGET}, not {budget}"
    if not _has_triton():
        return "needs Triton to be installed"
    if not scores.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"needs a GPU (or TRITON_INTERPRET=1 before the first import of Triton), not {scores.device}"
    return ""


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _on_device(scores: Tensor, budget: int, window: int, sinks: int, starts: Tensor | None) -> Tensor:
    if obstacle := _triton_obstacle(scores, budget):
        kind = ValueError if _has_triton() else ImportError
        raise kind(f"backend 'triton' {obstacle}: take backend 'numba'.")
    return torch.ops.holdfast.streaming_retention_on_device(scores, budget, window, sinks, starts)


@torch.library.custom_op("holdfast::streaming_retention_on_device", mutates_args=())
def _streaming_retention_on_device(
    scores: Tensor, budget: int, window: int, sinks: int, starts: Tensor | None
) -> Tensor:
    from holdfast.ops.retention_triton import run_store  # when first used: it imports Triton

    ranked = scores if scores.dtype == torch.float64 else scores.float()
    return run_store(ranked, budget, window, sinks, starts)


@_streaming_retention_on_device.register_fake
def _(scores: Tensor, budget: int, window: int, sinks: int, starts: Tensor | None) -> Tensor:
    return torch.empty(scores.shape, dtype=torch.int64, device=scores.device)


@torch.library.custom_op("holdfast::streaming_retention", mutates_args=())
def _streaming_retention(scores: Tensor, budget: int, window: int, sinks: int, starts: Tensor | None) -> Tensor:
    batch, length, heads = scores.shape
    # numpy knows no bfloat16, and the conversion to float32 keeps the order of the halves.
    ranked = scores.double() if scores.dtype == torch.float64 else scores.float()
    rows = ranked.transpose(1, 2).reshape(batch * heads, length).contiguous().cpu()
    begins = torch.zeros(batch, length, dtype=torch.bool) if starts is None else starts.contiguous().cpu()
    until = torch.empty(batch * heads, length, dtype=torch.int64)

    run = _compiled_store()
    arrays = (rows.numpy(), begins.numpy(), until.numpy(), heads, budget, window, sinks)
    workers = torch.get_num_threads() if rows.numel() >= _THREADED_SIZE else 1
    in_threads(lambda first, end: run(first, end, *arrays), batch * heads, workers)
    return until.view(batch, heads, length).transpose(1, 2).contiguous().to(scores.device)


@_streaming_retention.register_fake
def _(scores: Tensor, budget: int, window: int, sinks: int, starts: Tensor | None) -> Tensor:
    return torch.empty(scores.shape, dtype=torch.int64, device=scores.device)


def _run_store(
    first: int,
    end: int,
    scores: np.ndarray,
    starts: np.ndarray,
    until: np.ndarray,
    heads: int,
    budget: int,
    window: int,
    sinks: int,
) -> None:
    """Fill rows first … end − 1 of `until` [B·Hkv, T] from `scores` [B·Hkv, T] and `starts` [B, T]; for numba."""
    for row in range(first, end):
        # A heap of (score, −key): its root is the lowest score, and among equals the latest key.
        store = [(0.0, 0) for _ in range(0)]
        begin = 0
        for j in range(scores.shape[1]):
            if starts[row // heads, j]:
                store.clear()
                begin = j
            score = np.inf if j - begin < sinks else float(scores[row, j])
            until[row, j] = j + window
            if not score > 0 or budget == 0:
                continue
            if len(store) < budget:
                heapq.heappush(store, (score, -j))
            elif score > store[0][0]:
                until[row, -store[0][1]] = j + window
                heapq.heapreplace(store, (score, -j))
            else:
                continue
            until[row, j] = FOREVER


@functools.cache
def _compiled_store() -> Callable[..., None]:
    import numba  # here, because it takes longer to import than torch needs for a small model

    try:
        return numba.njit(nogil=True, cache=True)(_run_store)
    except RuntimeError:  # neither beside this file nor at home can anything be written: compile in every process
        return numba.njit(nogil=True)(_run_store)
