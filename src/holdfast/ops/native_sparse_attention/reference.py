"""Native Sparse Attention as its definition says it: three dense masks, three softmaxes."""

import torch
from torch import Tensor

from holdfast.ops.precision import compute_dtype


def native_sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    block_size: int,
    num_blocks: int,
    window: int,
    lengths: Tensor | None,
    begins: Tensor | None,
    compressed: tuple[Tensor, Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The contract of `native_sparse_attention` in O(Tq·Tk) time and memory; autograd gives the gradients."""
    (batch, queries, heads, _), (keys, kv_heads) = q.shape, k.shape[1:3]
    exact = compute_dtype(q)
    grouped = q.to(exact).unflatten(2, (kv_heads, heads // kv_heads))
    complete = keys // block_size
    if compressed is None:
        by_block = (x[:, : complete * block_size].to(exact).unflatten(1, (complete, block_size)) for x in (k, v))
        compressed = tuple(blocks.mean(2) for blocks in by_block)
    means_k, means_v = (means[:, :complete].to(exact) for means in compressed)

    end = torch.full((batch,), keys, device=q.device) if lengths is None else lengths
    i = (end[:, None] - queries + torch.arange(queries, device=q.device))[:, :, None]  # [B, Tq, 1]
    j = torch.arange(keys, device=q.device)
    block_end = (torch.arange(complete, device=q.device) + 1) * block_size - 1

    first = torch.zeros_like(i) if begins is None else begins[i // block_size]  # block of the query's sequence
    of_sequence = (block_end <= i) & (block_end // block_size >= first)
    out_compressed, weights = _attend(grouped, means_k, means_v, of_sequence.unsqueeze(1), scale)
    blocks = _most_important(weights.mean(2), i // block_size, first, -(-keys // block_size), num_blocks)
    chosen = (blocks.unsqueeze(3) == (j // block_size).view(-1, 1)).any(-1)  # [B, Hkv, Tq, Tk]
    causal = (j <= i).unsqueeze(1)
    out_selected, _ = _attend(grouped, k.to(exact), v.to(exact), chosen & causal, scale)
    recent = causal & ((j > i - window) & (j >= first * block_size)).unsqueeze(1)
    out_sliding, _ = _attend(grouped, k.to(exact), v.to(exact), recent, scale)
    outputs = torch.stack([out_compressed, out_selected, out_sliding], dim=-1).flatten(2, 3)
    return (outputs * gates.to(exact).unsqueeze(3)).sum(-1).to(q.dtype), blocks.transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, Tq, Hkv, G, Dv] and weights [B, Hkv, G, Tq, Tk] for `visible` [B, 1 or Hkv, Tq, Tk]."""
    scores = torch.einsum("bthgd,bshd->bhgts", q, k) * scale
    hidden = ~visible.unsqueeze(2)
    # The lowest finite number rather than −inf, so that a row that sees nothing has a softmax (and a gradient) at all.
    weights = scores.masked_fill(hidden, torch.finfo(q.dtype).min).softmax(dim=-1).masked_fill(hidden, 0.0)
    return torch.einsum("bhgts,bshd->bthgd", weights, v), weights


def _most_important(importance: Tensor, current: Tensor, first: Tensor, count: int, num_blocks: int) -> Tensor:
    """The chosen blocks [B, Hkv, Tq, n] by importance [B, Hkv, Tq, complete], the queries' own blocks [B, Tq, 1] and
    the first ones of their sequences [B, Tq, 1].
    """
    batch, kv_heads, queries, complete = importance.shape
    number = torch.arange(count, device=importance.device)
    current, first = current.unsqueeze(1), first.unsqueeze(1)
    ranked = importance.new_zeros(batch, kv_heads, queries, count)
    ranked[..., :complete] = importance.detach()
    for place, certain in enumerate((number == first, number == current - 1, number == current)):
        ranked = torch.where(certain, 2.0 + place, ranked)
    ranked = ranked.masked_fill((number > current) | (number < first), -1.0)
    best = ranked.sort(dim=-1, descending=True, stable=True)
    blocks = best.indices.masked_fill(best.values < 0, count)[..., :num_blocks].sort(dim=-1).values
    blocks = blocks.masked_fill(blocks == count, -1)
    missing = blocks.new_full((batch, kv_heads, queries, max(0, num_blocks - count)), -1)
    return torch.cat([blocks, missing], dim=-1)
