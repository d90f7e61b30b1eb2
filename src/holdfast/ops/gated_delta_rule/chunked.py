"""The gated delta rule in chunks of tokens, in PyTorch, on any device (Yang et al., arXiv 2412.06464, §3.3).

Within a chunk, let G be the running sum of the log-decay and S the state at the chunk's entry. What the tokens write,
e_i = β_i(v_i − kᵢᵀ·S_i) with S_i the decayed state that token i meets, solves a unit lower triangular system:

    (I + A)·E = diag(β)·(V − (e^G k)·S)      A_ij = β_i·e^(G_i − G_j)·k_i·k_j for j < i

(I + A)⁻¹·diag(β) is found for all chunks at once. What remains sequential is, per chunk, E and
S ← e^(G_C)·S + (e^(G_C − G) k)ᵀ·E: three small products. Outputs follow for all chunks at once.
No exponent is positive.

Shape legend: N chunks, C tokens in a chunk, Hk key heads, R value heads per key head, M = batch × value heads,
K and V head dimensions.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.ops.flops import count_with
from holdfast.ops.precision import compute_dtype, without_autocast
from holdfast.ops.second_derivatives import refuse_in


def gated_delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as in `holdfast.ops.gated_delta_rule.gated_delta_rule`; T ≥ 1, state in the compute dtype.

    Time O(T·(C·(K + V) + K·V)), memory O(T·(C + K + V)) plus one state per chunk, per head.
    """
    (B, T, Hv, V), (Hk, K) = v.shape, k.shape[2:]
    out_dtype, dtype = v.dtype, compute_dtype(v)
    C = min(T, _chunk_length(K, V, v.device))
    q, k, v = (_split(x.to(dtype), C, Hk) for x in (q, k, v))
    g, beta = (_split(x.to(dtype).unsqueeze(-1), C, Hk) for x in (g, beta))
    decay = _decays(g.squeeze(-1), cu_seqlens)
    system = (k @ k.mT) * decay.pairwise * beta
    strength = torch.diag_embed(beta.squeeze(-1))
    solution = torch.linalg.solve_triangular(system, strength, upper=False, unitriangular=True)
    k_entry, k_exit = k * decay.entry, k * decay.exit
    corrections, states, final_state, _ = _scan(
        *(x.flatten(1, 3) for x in (v, k_entry, k_exit, solution, decay.across)), state.flatten(0, 1)
    )
    attention = ((q @ k.mT) * decay.pairwise).flatten(0, 3)
    from_chunk = attention @ corrections.flatten(0, 1)
    out = torch.baddbmm(from_chunk, (q * decay.entry).flatten(0, 3), states.flatten(0, 1))
    out = out.view(-1, B, Hv, C, V).permute(1, 0, 3, 2, 4).reshape(B, -1, Hv, V)
    return (out[:, :T] * scale).to(out_dtype), final_state.view(B, Hv, K, V)


def _chunk_length(K: int, V: int, device: torch.device) -> int:
    """Short chunks save work inside chunks, long ones updates of the state; these were fastest where measured."""
    if device.type != "cpu":
        return 64
    D = max(K, V)
    return 16 if D <= 16 else 32 if D <= 64 else 64


def _split(x: Tensor, C: int, Hk: int) -> Tensor:
    """[B, T, heads, D] → [N, B, Hk, heads/Hk, C, D]; zero tokens, which change nothing, fill the last chunk."""
    B, T, heads, D = x.shape
    if T % C:
        x = F.pad(x, (0, 0, 0, 0, 0, C - T % C))
    return x.reshape(B, -1, C, Hk, heads // Hk, D).permute(1, 0, 3, 4, 2, 5).contiguous()


class _Decays(NamedTuple):
    """Factors between the tokens of a chunk and its ends, in [0, 1]; 0 where a sequence begins in between."""

    pairwise: Tensor  # [N, B, Hk, R, C, C] from token j to token i ≥ j; 0 for j > i
    entry: Tensor  # [N, B, Hk, R, C, 1] from the chunk's entry to each token
    exit: Tensor  # [N, B, Hk, R, C, 1] from each token to the chunk's end
    across: Tensor  # [N, B, Hk, R, 1, 1] from entry to end


def _decays(g: Tensor, cu_seqlens: Tensor | None) -> _Decays:
    """Decay factors from log-decays g [N, B, Hk, R, C]."""
    N, C = g.shape[0], g.shape[-1]
    # Below the bound, e^g is 0 in any case. Bounded sums keep differences precise, and −∞ out of them.
    g = g.clamp(min=1.2 * math.log(torch.finfo(g.dtype).tiny))
    visible = torch.ones(C, C, dtype=torch.bool, device=g.device).tril()
    if cu_seqlens is None:
        total = g.cumsum(-1)
    else:
        token = torch.arange(N * C, device=g.device, dtype=cu_seqlens.dtype)
        sequence = torch.searchsorted(cu_seqlens, token, right=True).view(N, 1, 1, 1, C)
        visible = visible & (sequence.unsqueeze(-1) == sequence.unsqueeze(-2))
        # A sum of its own for each sequence: not even its rounding depends on the sequence before.
        total = torch.einsum("nij,nbhrj->nbhri", visible[:, 0, 0, 0].to(g.dtype), g)
    pairwise = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(~visible, -torch.inf).exp_()
    entry = total.exp()
    exit_ = pairwise[..., -1, :]
    if cu_seqlens is not None:
        last = sequence[..., -1:]
        entry = entry * (sequence == torch.cat((last[:1], last[:-1])))
    return _Decays(pairwise, entry.unsqueeze(-1), exit_.unsqueeze(-1), entry[..., -1:, None])


@torch.library.custom_op("holdfast::gated_delta_scan", mutates_args=())
def _scan(
    v: Tensor, k_entry: Tensor, k_exit: Tensor, solution: Tensor, across: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E_n = solution_n·(v_n − k_entry_n·S_n) and S_{n+1} = across_n·S_n + k_exit_nᵀ·E_n, for n = 0 … N−1.

    A custom op, so that a compiler does not unroll the loop, and with a gradient of its own, for autograd would fill a
    whole tensor of zeros for each chunk that is read.

    Inputs v [N, M, C, V], k_entry and k_exit [N, M, C, K], solution [N, M, C, C], across [N, M, 1, 1], state S_0
    [M, K, V]. Returns E [N, M, C, V], S_0 … S_{N−1} [N, M, K, V], S_N [M, K, V] and, for the backward pass only, the
    brackets [N, M, C, V].
    """
    corrections, states, final_state, errors = _scan_outputs(v, k_entry, k_exit, solution, across, state)
    states[0] = state
    for n, after in enumerate((*states[1:], final_state)):
        torch.baddbmm(v[n], k_entry[n], states[n], alpha=-1, out=errors[n])
        torch.bmm(solution[n], errors[n], out=corrections[n])
        torch.mul(states[n], across[n], out=after).baddbmm_(k_exit[n].mT, corrections[n])
    return corrections, states, final_state, errors


@_scan.register_fake
def _scan_outputs(
    v: Tensor, k_entry: Tensor, k_exit: Tensor, solution: Tensor, across: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    states = state.new_empty(v.shape[0], *state.shape)
    return v.new_empty(v.shape), states, state.new_empty(state.shape), v.new_empty(v.shape)


@torch.library.custom_op("holdfast::gated_delta_scan_backward", mutates_args=())
def _scan_backward(
    d_corrections: Tensor,
    d_states: Tensor,
    d_final: Tensor | None,
    k_entry: Tensor,
    k_exit: Tensor,
    solution: Tensor,
    across: Tensor,
    corrections: Tensor,
    states: Tensor,
    errors: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `_scan` for its six inputs, in their order."""
    N = len(states)
    d_errors, d_written = torch.empty_like(errors), torch.empty_like(errors)
    # d_after[n] is the gradient of S_n from all that comes later; its own readers enter through d_states.
    d_after = states.new_empty(N + 1, *states.shape[1:])
    d_after[N] = 0 if d_final is None else d_final
    for n in reversed(range(N)):
        torch.baddbmm(d_corrections[n], k_exit[n], d_after[n + 1], out=d_written[n])
        torch.bmm(solution[n].mT, d_written[n], out=d_errors[n])
        torch.addcmul(d_states[n], d_after[n + 1], across[n], out=d_after[n])
        d_after[n].baddbmm_(k_entry[n].mT, d_errors[n], alpha=-1)
    with without_autocast(states):
        d_k_entry = (d_errors @ states.mT).neg_()
        d_k_exit = corrections @ d_after[1:].mT
        d_solution = d_written @ errors.mT
    d_across = torch.linalg.vecdot(states.flatten(2), d_after[1:].flatten(2))[..., None, None]
    return d_errors, d_k_entry, d_k_exit, d_solution, d_across, d_after[0].clone()


@_scan_backward.register_fake
def _(
    d_corrections: Tensor,
    d_states: Tensor,
    d_final: Tensor | None,
    k_entry: Tensor,
    k_exit: Tensor,
    solution: Tensor,
    across: Tensor,
    corrections: Tensor,
    states: Tensor,
    errors: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (errors, k_entry, k_exit, solution, across, states[0])
    d_v, d_k_entry, d_k_exit, d_solution, d_across, d_state = (x.new_empty(x.shape) for x in inputs)
    return d_v, d_k_entry, d_k_exit, d_solution, d_across, d_state


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, k_entry, k_exit, solution, across, _ = inputs
    corrections, states, _, errors = output
    ctx.save_for_backward(k_entry, k_exit, solution, across, corrections, states, errors)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, d_corrections: Tensor | None, d_states: Tensor | None, d_final: Tensor | None, _: None
) -> tuple[Tensor, ...]:
    k_entry, k_exit, solution, across, corrections, states, errors = ctx.saved_tensors
    d_corrections = torch.zeros_like(corrections) if d_corrections is None else d_corrections
    d_states = torch.zeros_like(states) if d_states is None else d_states
    return _scan_backward(
        d_corrections, d_states, d_final, k_entry, k_exit, solution, across, corrections, states, errors
    )


_scan.register_autograd(_differentiate, setup_context=_save_for_backward)
refuse_in("gated_delta_rule", "chunked", _scan_backward)


def scan_flops(n: int, C: int, K: int, V: int) -> int:
    """Operations of `_scan` for n chunks of value heads; the backward pass makes twice as many."""
    return 2 * n * (2 * C * K * V + C * C * V)


def _flops_of(v: Tensor, k_entry: Tensor) -> int:
    (N, M, C, K), V = k_entry.shape, v.shape[3]
    return scan_flops(N * M, C, K, V)


count_with(lambda v, k_entry, *_: _flops_of(v, k_entry), _scan)
count_with(lambda v, _states, _final, k_entry, *_: 2 * _flops_of(v, k_entry), _scan_backward)
