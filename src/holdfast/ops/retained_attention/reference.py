"""Retained attention as its definition says it: one dense mask, one softmax."""

import torch
from torch import Tensor

from holdfast.ops.retention import FOREVER


def retained_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor | None, window: int | None, scale: float
) -> Tensor:
    """The contract of `retained_attention` in O(Tq·Tk) time and memory; autograd gives the gradients."""
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    j = torch.arange(keys, device=q.device)
    i = torch.arange(keys - queries, keys, device=q.device)[:, None]
    if visible_until is None:
        until = torch.full_like(j, FOREVER) if window is None else j + window
        visible_until = until[None, :, None].expand(batch, keys, kv_heads)
    visible = ((j <= i) & (i <= visible_until.transpose(1, 2)[:, :, None, :])).unsqueeze(2)  # [B, Hkv, 1, Tq, Tk]

    exact = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(exact).view(batch, queries, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("bthgd,bshd->bhgts", grouped, k.to(exact)) * scale
    # The lowest finite number rather than −inf, so that a row that sees nothing has a softmax (and a gradient) at all.
    weights = scores.masked_fill(~visible, torch.finfo(exact).min).softmax(dim=-1).masked_fill(~visible, 0.0)
    out = torch.einsum("bhgts,bshd->bthgd", weights, v.to(exact))
    return out.reshape(batch, queries, heads, v.shape[-1]).to(q.dtype)
