"""What every evaluation does to a model: read it as it is, without gradients, where it is."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from holdfast.evaluation.arguments import check_token_ids

__all__ = ["device_of", "evaluating", "one_sequence", "perplexity"]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every submodule and no gradients; afterwards each is back in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter; the CPU for a model without parameters."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def one_sequence(input_ids: Tensor) -> Tensor:
    """`input_ids` [T] or [1, T] as [1, T].

    Raises:
        TypeError: if they are no tensor of integers.
        ValueError: if there is more than one sequence.
    """
    check_token_ids("input_ids", input_ids, "[T] or [1, T]")
    ids = input_ids.reshape(1, -1) if input_ids.dim() == 1 else input_ids
    if ids.dim() != 2:
        raise ValueError(f"input_ids have the shape {list(ids.shape)}; give [T] or [1, T].")
    if ids.shape[0] != 1:
        raise ValueError(f"input_ids holds {ids.shape[0]} sequences; give one.")
    return ids


def perplexity(mean_nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite where that is more than a float holds."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
