"""What every evaluation does to a model: read it as it is, without gradients, where it is."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["device_of", "evaluating", "perplexity"]


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


def perplexity(mean_nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite where that is more than a float holds."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
