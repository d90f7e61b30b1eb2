"""Inputs of the gated delta rule, and comparison of all that comes out of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.ops.gated_delta_rule import gated_delta_rule

B, HK, HV, K, V = 2, 2, 4, 12, 20
NAMES = ("q", "k", "v", "g", "beta", "state")


def make_inputs(T: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: int) -> dict[str, Tensor]:
    """Random q, k, v, g, beta and state with the sizes B, HK, HV, K, V, which keyword arguments override."""
    b, hk, hv, kd, vd = (sizes.get(n, d) for n, d in zip(("B", "HK", "HV", "K", "V"), (B, HK, HV, K, V), strict=True))
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=gen, dtype=torch.float64)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    state_dtype = torch.promote_types(dtype, torch.float32)
    inputs = {
        "q": F.normalize(randn(b, T, hk, kd), dim=-1),
        "k": F.normalize(randn(b, T, hk, kd), dim=-1),
        "v": randn(b, T, hv, vd),
        "g": -rand(b, T, hv),
        "beta": 2 * rand(b, T, hv),
    }
    return {n: x.to(dtype) for n, x in inputs.items()} | {"state": randn(b, hv, kd, vd).to(state_dtype)}


def run(inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor]:
    state = inputs.get("state")
    out, final_state = gated_delta_rule(
        *(inputs[n] for n in NAMES[:5]), initial_state=state, output_final_state=True, **options
    )
    assert final_state is not None
    return out, final_state


def values_and_gradients(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Output, final state, and the gradient of a random linear function of both for each input."""
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    out, final_state = run(leaves, **options)
    gen = torch.Generator().manual_seed(99)
    weights = (torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x.dtype) for x in (out, final_state))
    loss = sum((x * w).sum() for x, w in zip((out, final_state), weights, strict=True))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"grad_{n}": x for n, x in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "final_state": final_state.detach()} | named


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Largest difference relative to the largest expected entry, each tensor by itself."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].shape == expected[name].shape, name
        assert actual[name].dtype == expected[name].dtype, name
        difference = (actual[name].double() - expected[name].double()).abs().max()
        largest = expected[name].double().abs().max().clamp(min=1e-3)
        assert difference <= tolerance * largest, f"{name}: {difference:.1e} of {largest:.1e}"
