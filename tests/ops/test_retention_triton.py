"""streaming_retention by Triton: the same answer as numba's, bit for bit."""

import importlib.util

import pytest
import torch

from holdfast.ops.retention import streaming_retention, streaming_retention_reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRADES = torch.tensor([-1.0, 0.0, 0.25, 0.5, 0.75, float("inf"), float("nan")])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("budget", "window", "sinks", "ties", "dtype"),
    [(1, 0, 0, True, torch.float32), (3, 2, 2, True, torch.bfloat16), (7, 5, 0, False, torch.float64)],
)
def test_equals_the_reference(
    budget: int, window: int, sinks: int, ties: bool, dtype: torch.dtype, packed: bool
) -> None:
    generator = torch.Generator().manual_seed(budget)
    scores = torch.randn(2, 2, 37, generator=generator)
    if ties:
        scores = GRADES[torch.randint(len(GRADES), scores.shape, generator=generator)]
    scores = scores.to(DEVICE, dtype).transpose(1, 2)
    starts = (torch.rand(2, 37, generator=generator) < 0.1).to(DEVICE) if packed else None
    result = streaming_retention(scores, budget, window, sinks, starts=starts, backend="triton")
    assert torch.equal(result, streaming_retention_reference(scores, budget, window, sinks, starts=starts))


def test_empty_input() -> None:
    assert streaming_retention(torch.empty(2, 0, 3, device=DEVICE), 4, 1, backend="triton").shape == (2, 0, 3)


def test_the_operator_is_well_registered() -> None:
    arguments = (torch.randn(1, 5, 1, device=DEVICE), 2, 2, 1, None)
    torch.library.opcheck(torch.ops.holdfast.streaming_retention_on_device, arguments)


def test_wrong_backends_are_named() -> None:
    scores = torch.ones(1, 3, 1)
    with pytest.raises(ValueError, match="budgets from 1 to 8192, not 0"):
        streaming_retention(scores, 0, 1, backend="triton")
    with pytest.raises(ValueError, match="'cuda' does not exist"):
        streaming_retention(scores, 1, 1, backend="cuda")
