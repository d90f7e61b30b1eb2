"""The gated delta rule, token by token: the definition that every other implementation is tested against."""

import torch
from torch import Tensor

from holdfast.ops.precision import compute_dtype


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as in `holdfast.ops.gated_delta_rule.gated_delta_rule`.

    T ≥ 1, and state is in the compute dtype.
    """
    dtype, out_dtype = compute_dtype(v), v.dtype
    q, k = (x.to(dtype).repeat_interleave(v.shape[2] // k.shape[2], dim=2) for x in (q, k))
    v, decay, beta = v.to(dtype), g.to(dtype).exp(), beta.to(dtype)
    starts = set() if cu_seqlens is None else set(cu_seqlens.tolist())
    out = []
    for t in range(v.shape[1]):
        if t in starts:
            state = torch.zeros_like(state)
        state = decay[:, t, :, None, None] * state
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        out.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(out, dim=1).to(out_dtype), state
