"""The gate on keys beyond the window, against its definition."""

import pytest
import torch
from torch import Tensor

from holdfast.ops.gated_attention import gated_retained_attention
from holdfast.ops.retained_attention import FOREVER, retained_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def by_definition(q: Tensor, k: Tensor, v: Tensor, until: Tensor, window: int, log_gate: Tensor) -> Tensor:
    """Dense, one head of queries for each of keys after repeating."""
    groups = q.shape[2] // k.shape[2]
    k, v, log_gate = (x.repeat_interleave(groups, dim=2) for x in (k, v, log_gate))
    until = until.expand(-1, -1, q.shape[2] // groups).repeat_interleave(groups, dim=2)
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
    visible = (j <= i) & (i <= until.transpose(1, 2)[:, :, None, :])
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[3] ** -0.5
    logits = logits + log_gate.transpose(1, 2)[:, :, None, :] * (i > j + window)
    weights = logits.masked_fill(~visible, -1e30).softmax(dim=-1) * visible
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def inputs(length: int, window: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Kept, dropped and evicted keys; some pads at the front, and some documents that end."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, length, heads, 8, dtype=torch.float64).to(dtype) for heads in (4, 2, 2))
    leaving = torch.arange(length)[:, None] + window
    fates = torch.randint(0, 4, (2, length, 2))
    until = torch.where(fates == 0, FOREVER, torch.where(fates == 1, leaving + 3 * fates, leaving))
    until[0, : length // 7] = -1
    until[1, : length // 2] = until[1, : length // 2].clamp(max=length // 2 - 1)
    return [q, k, v, until, torch.randn(2, length, 2, dtype=torch.float64).to(dtype)]


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize(("length", "window"), [(1, 3), (7, 0), (37, 5), (90, 16), (40, 60)])
def test_outputs_and_gradients_by_definition(length: int, window: int, backend: str) -> None:
    q, k, v, until, log_gate = inputs(length, window)
    variables = [x.requires_grad_() for x in (q, k, v, log_gate)]
    out = gated_retained_attention(q, k, v, until, window, log_gate, backend=backend)
    expected = by_definition(q, k, v, until, window, log_gate)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(out, variables, upstream)
    for got, want in zip(found, torch.autograd.grad(expected, variables, upstream), strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    assert found[3].abs().max() > 0 or length <= window + 1


def test_an_open_gate_changes_nothing_and_a_shut_one_is_the_hard_cut() -> None:
    q, k, v, until, log_gate = inputs(50, 7, torch.float32)
    kept = until > torch.arange(50)[:, None] + 7
    shut = torch.where(kept, 0.0, -1e4)
    everything = torch.full_like(until, FOREVER)
    everything[0, :7] = -1
    everything[1, :25] = 24
    hard = torch.where(kept, everything, until)
    for seen, gate in ((until, torch.zeros_like(log_gate)), (everything, shut)):
        out = gated_retained_attention(q, k, v, seen, 7, gate)
        expected = retained_attention(q, k, v, until if seen is until else hard, 7)
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_the_gradient_of_the_gate_is_what_a_key_is_worth_to_far_queries() -> None:
    """Σ_{i > j + w} p_ij·⟨∂L/∂o_i, v_j − o_i⟩, by differences of the loss."""
    q, k, v, until, log_gate = inputs(24, 4)
    upstream = torch.randn(2, 24, 4, 8, dtype=torch.float64)
    log_gate.requires_grad_()

    def loss(gate: Tensor) -> Tensor:
        return (gated_retained_attention(q, k, v, until, 4, gate) * upstream).sum()

    (gradient,) = torch.autograd.grad(loss(log_gate), log_gate)
    nudge = torch.zeros_like(log_gate)
    nudge[1, 3, 1] = 1e-5
    with torch.no_grad():
        slope = (loss(log_gate + nudge) - loss(log_gate - nudge)) / 2e-5
    torch.testing.assert_close(gradient[1, 3, 1], slope, atol=1e-7, rtol=1e-5)


def test_bfloat16_is_finite_and_near() -> None:
    wide = inputs(70, 9, torch.bfloat16)
    q, k, v, until, log_gate = wide
    variables = [x.requires_grad_() for x in (q, k, v, log_gate)]
    out = gated_retained_attention(q, k, v, until, 9, log_gate)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().square().sum(), variables)
    assert all(gradient.isfinite().all() for gradient in gradients)
    exact = by_definition(*(x.detach().double() for x in (q, k, v)), until, 9, log_gate.detach().double())
    assert (out.double() - exact).square().mean().sqrt() < 0.02 * exact.std()


def test_part_of_a_sequence_is_refused() -> None:
    q, k, v, until, log_gate = inputs(20, 4)
    with pytest.raises(ValueError, match="19 queries and 20 keys: a gate needs a whole sequence"):
        gated_retained_attention(q[:, 1:], k, v, until, 4, log_gate)
