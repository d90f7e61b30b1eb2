"""The protocol between a model and its token mixers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from holdfast import settings
from holdfast.mixers.layout import TokenLayout
from holdfast.mixers.state import MixerState


class MixerOptions:
    """Base of the frozen dataclass in which a mixer declares its settings; checked when it is made."""

    @classmethod
    def from_mapping(cls, name: str, values: Mapping[str, Any]) -> Self:
        """Build from a mapping, e.g. the entry of a config's `mixer_options`.

        Raises:
            ValueError: naming the mixer and the keys it does not know or lacks, or the value that is wrong or of the
                wrong type.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"mixer '{name}': its options must be a mapping, got {values!r}")
        known = {entry.name for entry in fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - known):
            raise ValueError(f"mixer '{name}' has no option {', '.join(unknown)}; it knows {', '.join(sorted(known))}")
        required = [entry.name for entry in fields(cls) if entry.default is MISSING]  # type: ignore[arg-type]
        if lacking := [key for key in required if key not in values]:
            raise ValueError(f"mixer '{name}' needs the option {', '.join(lacking)}")
        return settings.from_mapping(cls, values, f"mixer '{name}'")


class MixerOutput(NamedTuple):
    """What a mixer gives back.

    Attributes:
        hidden: [B, T, hidden_size].
        scores: retention scores s [B, T, Hkv] fp32, of a mixer that evicts.
        blocks: numbers of the blocks that each query read in full, [B, T, Hkv, n] int64, of a mixer that selects.
    """

    hidden: Tensor
    scores: Tensor | None = None
    blocks: Tensor | None = None


class TokenMixer(nn.Module, ABC):
    """A layer that moves information between tokens: `hidden` [B, T, hidden_size] → the same shape.

    To add one: subclass in a file of its own, declare `Options` and `make_state`, and enter it in the registry of
    `holdfast.mixers`.
    """

    Options: ClassVar[type[MixerOptions]]

    def __init__(self, hidden_size: int, norm_eps: float, options: Any) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.norm_eps = norm_eps
        self.options = options

    @abstractmethod
    def forward(self, hidden: Tensor, layout: TokenLayout, state: MixerState | None = None) -> MixerOutput:
        """Mix the tokens of `layout`; read and advance `state` where one is given."""

    @classmethod
    @abstractmethod
    def make_state(cls, options: Any) -> MixerState:
        """An empty state for these options. Nothing is allocated yet."""

    @abstractmethod
    def flops_per_token(self, context: int) -> int:
        """Multiply-adds × 2 of one forward token at `context` tokens, the projections included."""

    def init_weights(self, init: Any) -> None:
        """Initialise parameters that belong to this module itself (not to a submodule), with `init`'s functions."""


def linear(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    """The projections of this library carry no bias unless asked for."""
    return nn.Linear(in_features, out_features, bias=bias)


def projected_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype that a projection of `hidden` has: the same, or that of autocast."""
    device = hidden.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if hidden.dtype != torch.float64 and autocast:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message() if callable(message) else message)


def count_weights(module: nn.Module) -> int:
    """Weights of the matrices (2-D and up) inside `module`."""
    return sum(math.prod(p.shape) for p in module.parameters() if p.dim() >= 2)


def straight_through(value: Tensor, score: Tensor) -> Tensor:
    """Return `value` [B, T, Hkv, D] unchanged; its gradient reaches `score` [B, T, Hkv] as ⟨∂L/∂v, v⟩.

    The estimator by which a hard keep-or-drop decision is trained (He & Garner, arXiv 2510.20787; specification
    §3.3): what the loss would change by scaling a value says how much the value is worth.
    """
    return _StraightThrough.apply(value, score)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        ctx.score_dtype = score.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (value,) = ctx.saved_tensors
        (grad,) = grads
        return grad, (grad.float() * value.float()).sum(-1).to(ctx.score_dtype)
