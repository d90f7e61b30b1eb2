"""Retained attention in which a key that has left the window weighs less: a soft form of dropping it."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.ops.retained_attention import FOREVER, retained_attention

__all__ = ["gated_retained_attention"]


def gated_retained_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    window: int,
    log_gate: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention with the weights exp(scale·⟨q_i, k_j⟩ + log_gate_j·[i > j + window]) over what `visible_until` shows.

    The gradient of `log_gate` says what a key is worth to the queries beyond its window: Σ_{i > j + w} p_ij·⟨∂L/∂o_i,
    v_j − o_i⟩ (docs/decisions/0012). With log_gate = 0 it is `retained_attention`.

    Args:
        q: [B, T, H, D]. k, v: [B, T, Hkv, D], one for each query; dtypes as in `retained_attention`.
        visible_until: int64 [B, T, Hkv] or [B, T, 1], as there.
        window: keys that a query sees behind itself without a gate.
        log_gate: [B, T, Hkv], any floating dtype; rounded to that of k.
        scale, backend: as there.

    Returns:
        [B, T, H, D] in the dtype of q.

    Raises:
        TypeError, ValueError, ImportError: as `retained_attention`; and ValueError if the queries are not as many as
            the keys.

    O(T·(window + kept)) time and O(T) memory: up to four times those of `retained_attention`, of which it is one call.
    """
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"there are {q.shape[1]} queries and {k.shape[1]} keys: a gate needs a whole sequence.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Every key has two rows. That of its own time is lost with the window; then its copy begins, `window` + 1 later,
    # with the gate in a channel of its own. The two kinds take turns, and so must queries, of which half do nothing.
    near_until, far_until = _lifetimes(visible_until, window)
    gate = (log_gate / scale).unsqueeze(-1).to(k.dtype)
    near_keys = torch.cat([k, torch.zeros_like(gate)], dim=-1)
    far_keys = _later(torch.cat([k, gate], dim=-1), window + 1)
    queries = torch.cat([q, torch.ones_like(q[..., :1])], dim=-1)
    out = retained_attention(
        _in_turn(torch.zeros_like(queries), queries),
        _in_turn(far_keys, near_keys),
        _in_turn(_later(v, window + 1), v),
        _in_turn(far_until, near_until),
        2 * window,
        scale=scale,
        backend=backend,
    )
    return out[:, 1::2]


def _lifetimes(visible_until: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """`visible_until` of the rows, numbered in turn, of keys in their window and of their copies beyond it."""
    length = visible_until.shape[1]
    leaving = torch.arange(length, device=visible_until.device)[:, None] + window
    near = 2 * torch.minimum(visible_until, leaving) + 1
    last = torch.where(visible_until >= length, FOREVER, 2 * visible_until.clamp(max=length) + 1)
    far = torch.where(visible_until > leaving, last, -1)
    return near, _later(far + 1, window + 1) - 1  # rows before the first copy are never seen


def _later(rows: Tensor, steps: int) -> Tensor:
    """Move rows [B, T, ...] to higher positions; zeros come in, and the last rows fall off."""
    length = rows.shape[1]
    zeros = rows.new_zeros(rows.shape[0], min(steps, length), *rows.shape[2:])
    return torch.cat([zeros, rows[:, : max(0, length - steps)]], dim=1)


def _in_turn(first: Tensor, second: Tensor) -> Tensor:
    """[B, T, ...] twice → [B, 2T, ...], rows of the two in turn."""
    return torch.stack([first, second], dim=2).flatten(1, 2)
