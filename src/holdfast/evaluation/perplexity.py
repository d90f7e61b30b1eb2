"""How well a model predicts text, overall and by position in the context."""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from holdfast.data.progress import track
from holdfast.data.text import collate_isolated
from holdfast.data.token_bytes import TokenBytes
from holdfast.evaluation.arguments import as_blocks, check_kind, check_log, check_model
from holdfast.evaluation.inference import device_of, evaluating
from holdfast.evaluation.perplexity_plot import plot_perplexity
from holdfast.evaluation.perplexity_result import BlockSums, PerplexityResult, PositionBin
from holdfast.evaluation.ratios import Estimate
from holdfast.evaluation.sample_log import SampleLog
from holdfast.modeling import HybridForCausalLM
from holdfast.ops.linear import apply_linear

__all__ = ["BlockSums", "PerplexityResult", "PositionBin", "block_digest", "evaluate_perplexity", "plot_perplexity"]

IGNORED = -100  # labels that are not predicted
TOKENS_AT_ONCE = 1024  # whose logits are held


def evaluate_perplexity(
    model: nn.Module,
    blocks: Iterable[dict[str, torch.Tensor] | torch.Tensor],
    *,
    batch_size: int = 8,
    max_blocks: int | None = None,
    position_bins: int = 8,
    token_bytes: TokenBytes | None = None,
    log: SampleLog | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    description: str = "perplexity",
) -> PerplexityResult:
    """Predict every token of the blocks from those before it in its block, or in its document where blocks isolate.

    Blocks may be longer than those of training: that is how extrapolation is measured. The model is read in eval mode
    without gradients, and put back in the mode that it came in. Beside the hidden states of a `HybridForCausalLM`,
    O(1,024 · V) memory; of other models, whose heads are not known, all logits are held.

    Args:
        model: called as `model(input_ids=…, use_cache=False)`, int64 [B, L]; its `.logits` are [B, L, V]. Blocks with
            `cu_seqlens` are joined, and it is called with `input_ids` [1, B·L] and `cu_seqlens`. It stays where it is.
        blocks: such as a `PackedText`: dictionaries with `input_ids`, int64 [L], all of one length, and optionally
            `labels` (aligned; −100 is not counted) and `cu_seqlens`; or bare `input_ids`, int64 [N, L] too.
        batch_size: blocks per call B, at least 1.
        max_blocks: read the first blocks only; None reads all.
        position_bins: number of bins of (nearly) equal width over the positions.
        token_bytes: of the tokenizer, for bits per byte; None: they are not known.
        log: where sums over each block are kept and, after an interruption, found again; None keeps none. A record is
            named by its block's place and content; the model, `position_bins` and whether there are `token_bytes` are
            for the log to tell apart.
        device: where the inputs go; None is the device of the model's first parameter, or the CPU.
        progress: show a progress bar when standard error is a terminal.
        description: in front of that bar, followed by how many tokens are read, where `blocks` has a length.

    Raises:
        TypeError: an argument is no model, no blocks, no `TokenBytes` or no log.
        ValueError: a count is below 1, blocks differ in length, or there is no token to predict.
    """
    _check_counts(batch_size=batch_size, position_bins=position_bins, max_blocks=max_blocks)
    check_model(model)
    check_log(log)
    if token_bytes is not None:
        check_kind("token_bytes", token_bytes, TokenBytes, "TokenBytes.of(tokenizer)")
    read = as_blocks(blocks)
    device = device_of(model) if device is None else torch.device(device)
    log = SampleLog(None, {}) if log is None else log
    count = min(len(blocks), max_blocks or len(blocks)) if isinstance(blocks, Sized) else None
    batches = _batches(itertools.islice(read, max_blocks), batch_size)
    edges = np.zeros(1, dtype=np.int64)
    names: list[str] = []
    with evaluating(model):
        for batch in _tracked(batches, description, count, batch_size, progress=progress):
            edges = edges if names else _edges(len(batch[0]["input_ids"]), position_bins)
            _check_blocks(
                batch, int(edges[-1]), len(names), getattr(getattr(model, "config", None), "vocab_size", None)
            )
            named = {f"{index}/{block_digest(block)}": block for index, block in enumerate(batch, start=len(names))}
            waiting = {name: block for name, block in named.items() if name not in log.records}
            if waiting:
                records = _predict(model, list(waiting.values()), edges, device, token_bytes)
                log.append(dict(zip(waiting, records, strict=True)))
            names += named
    return _result(names, log.records, edges)


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; give at least 1.")


def block_digest(block: Mapping[str, torch.Tensor]) -> str:
    """A hash that tells a block's content (token ids, labels, documents) from others'."""
    digest = hashlib.sha256()
    for name in sorted(block):
        digest.update(name.encode())
        digest.update(block[name].to("cpu", torch.int64).numpy().tobytes())
    return digest.hexdigest()[:16]


def _tracked(
    batches: Iterator[list[dict[str, torch.Tensor]]], description: str, count: int | None, size: int, *, progress: bool
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The batches, with a bar that says how many tokens their `count` blocks have."""
    first = next(batches, [])
    total = None if count is None else math.ceil(count / size)
    if count is not None and first:
        description += f" ({count * len(first[0]['input_ids']):,} tokens)"
    return track(itertools.chain([first] if first else [], batches), description, total=total, progress=progress)


def _batches(blocks: Iterable[dict[str, torch.Tensor]], size: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    blocks = iter(blocks)
    while batch := list(itertools.islice(blocks, size)):
        yield batch


def _check_blocks(batch: list[dict[str, torch.Tensor]], length: int, first: int, vocab_size: int | None) -> None:
    for index, block in enumerate(batch, start=first):
        if len(block["input_ids"]) != length:
            raise ValueError(
                f"block {index} has {len(block['input_ids'])} tokens, block 0 has {length}; give blocks of one length."
            )
        if vocab_size is not None and (highest := int(block["input_ids"].max())) >= vocab_size:
            raise ValueError(
                f"block {index} has token {highest:,}, and the model knows {vocab_size:,} tokens; give text in "
                "tokens of its own tokenizer."
            )


def _edges(length: int, count: int) -> np.ndarray:
    """Where the bins of positions begin and end, rising int64 from 0 to `length`."""
    return np.unique(np.linspace(0, length, count + 1).round().astype(np.int64))


def _predict(
    model: nn.Module,
    batch: list[dict[str, torch.Tensor]],
    edges: np.ndarray,
    device: torch.device,
    token_bytes: TokenBytes | None,
) -> list[dict[str, Any]]:
    """A record for each block: predicted tokens, their bytes, and the sum of their negative log-likelihoods, by bin."""
    if "cu_seqlens" in batch[0]:
        joined = collate_isolated(batch)
        arguments = {"cu_seqlens": joined["cu_seqlens"].to(device)}
        starts = joined["cu_seqlens"][:-1].repeat_interleave(joined["cu_seqlens"].diff())
    else:
        names = [name for name in ("input_ids", "labels") if name in batch[0]]
        joined = {name: torch.stack([block[name] for block in batch]) for name in names}
        arguments = {}
        starts = torch.zeros(joined["input_ids"].shape[1], dtype=torch.int64)
    # The last column of a row predicts nothing, and neither does that of a joined block: documents start behind it.
    targets = F.pad(joined.get("labels", joined["input_ids"])[:, 1:], (0, 1), value=IGNORED)
    position = (torch.arange(1, len(starts) + 1) - starts).expand_as(targets)  # of the predicted token
    columns = {"nll": _nll(model, joined["input_ids"].to(device), targets, arguments).double().cpu()}
    if token_bytes is not None:
        columns["bytes"] = F.pad(token_bytes(joined["input_ids"])[:, 1:], (0, 1))
    by_block = {name: column.reshape(len(batch), -1).numpy() for name, column in columns.items()}
    rows = zip(position.reshape(len(batch), -1).numpy(), targets.reshape(len(batch), -1).numpy(), strict=True)
    return [
        _record(*row, {name: column[index] for name, column in by_block.items()}, edges=edges)
        for index, row in enumerate(rows)
    ]


def _nll(
    model: nn.Module, input_ids: torch.Tensor, targets: torch.Tensor, arguments: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Negative log-likelihoods, fp32 [B, T], of the targets [B, T] of each column; 0 where the target is −100.

    The logits are made of some positions at a time: of all they would be B · T · V numbers, by far the largest tensor.
    """
    head: Callable[[torch.Tensor], torch.Tensor]
    if type(model) is HybridForCausalLM:  # a subclass, such as a sharded one, may do more in its forward
        hidden = model.model(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state
        head = functools.partial(apply_linear, model.lm_head)
    else:
        hidden, head = model(input_ids=input_ids, use_cache=False, **arguments).logits, nn.Identity()
    losses = []
    for part, target in zip(
        hidden.flatten(0, 1).split(TOKENS_AT_ONCE), targets.flatten().split(TOKENS_AT_ONCE), strict=True
    ):
        logits = head(part).float()
        losses.append(F.cross_entropy(logits, target.to(logits.device), ignore_index=IGNORED, reduction="none"))
    return torch.cat(losses).view(targets.shape)


def _record(
    position: np.ndarray, targets: np.ndarray, sums: Mapping[str, np.ndarray], *, edges: np.ndarray
) -> dict[str, Any]:
    """Counts of the predicted tokens, and sums over them, by bin of positions."""
    counted = targets != IGNORED
    bins = np.searchsorted(edges, position[counted], side="right") - 1
    record: dict[str, Any] = {"tokens": np.bincount(bins, minlength=len(edges) - 1).tolist()}
    for name, values in sums.items():
        added = np.bincount(bins, weights=values[counted], minlength=len(edges) - 1)
        record[name] = added.astype(values.dtype).tolist()
    return record


def _result(names: Sequence[str], records: Mapping[str, Mapping[str, Any]], edges: np.ndarray) -> PerplexityResult:
    found = [records[name] for name in names]
    tokens = np.asarray([record["tokens"] for record in found], dtype=np.int64)
    if not tokens.sum():
        raise ValueError("the blocks hold no token to predict; give blocks of 2 tokens or more with labels.")
    nll = np.asarray([record["nll"] for record in found])
    known = all("bytes" in record for record in found)
    sizes = np.asarray([record["bytes"] for record in found], dtype=np.int64).sum(axis=0) if known else None
    bins = []
    for index, (start, stop) in enumerate(itertools.pairwise(edges.tolist())):
        loss = Estimate.ratio(nll[:, index], tokens[:, index])
        bins.append(
            PositionBin(
                start,
                stop,
                tokens=int(tokens[:, index].sum()),
                mean_nll=None if loss is None else loss.value,
                interval=None if loss is None else loss.interval,
                bytes=None if sizes is None else int(sizes[index]),
            )
        )
    return PerplexityResult(
        blocks=len(found),
        tokens=int(tokens.sum()),
        mean_nll=float(nll.sum() / tokens.sum()),
        bins=tuple(bins),
        bytes=None if sizes is None else int(sizes.sum()),
        by_block=tuple(_block_sums(name, records[name], known) for name in names),
    )


def _block_sums(name: str, record: Mapping[str, Any], known: bool) -> BlockSums:
    """Of a record, which is named by the place and the digest of its block."""
    sizes = tuple(record["bytes"]) if known else None
    return BlockSums(name.partition("/")[2], tuple(record["tokens"]), tuple(record["nll"]), sizes)
