"""What changes over a training run of learned eviction besides λ: when it starts, and how much the scorer may learn."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from holdfast.mixers.learned_eviction import LearnedEviction


@dataclass(frozen=True)
class RetentionSchedule:
    """Schedules known from the published code (specification §3.6), and exploration. The defaults switch all off.

    A float `eviction_start` is a fraction of the run, an int a step: 0.1 is a tenth of the run, 10 the tenth step.

    Raises:
        ValueError: naming the setting, when one is out of range.
    """

    eviction_start: int | float = 0
    """Before this nothing is evicted and λ is left alone: the model learns with full attention first."""
    enforce_budget: bool = False
    """Whether the store holds no more than the budget in training either. False is the published way: every pair with
    a positive score stays, and only λ keeps the number down."""
    scorer_freeze_steps: int = 0
    """For the first so many steps the scorer is not trained."""
    exploration: float = 0.0
    """Share of the dropped pairs that stay visible, so that their scores get a gradient too; at most as many as the
    budget at a time, a random sample of them. It is the share at step 0 of the run and falls from there, with eviction
    on or not: where eviction starts later, it starts with less."""
    exploration_end: float = 0.5
    """Fraction of the run at which exploration, falling linearly, reaches 0."""
    soft_gate: float = 0.0
    """Power of σ(logit) by which the weight of a visible pair is multiplied for queries beyond its window, at step 0.
    They then teach the scorer what the pair is worth to them, a dropped one too where exploration leaves it visible
    (docs/decisions/0012). It falls as exploration does; at 0 the cut is hard, as in evaluation."""
    soft_gate_end: float = 0.5
    """Fraction of the run at which the soft gate, falling linearly, reaches 0."""

    def __post_init__(self) -> None:
        if self.eviction_start < 0 or (isinstance(self.eviction_start, float) and self.eviction_start > 1):
            raise ValueError(
                "eviction_start must be a step (int, 0 or more) or a fraction of the run (float, 0 to 1), "
                f"got {self.eviction_start!r}."
            )
        if self.scorer_freeze_steps < 0:
            raise ValueError(f"scorer_freeze_steps must be 0 or more, got {self.scorer_freeze_steps}.")
        if not 0 <= self.exploration <= 1:
            raise ValueError(f"exploration must be a share between 0 and 1, got {self.exploration}.")
        if not 0 < self.exploration_end <= 1:
            raise ValueError(
                f"exploration_end must be a fraction of the run, above 0 and up to 1, got {self.exploration_end}."
            )
        if self.soft_gate < 0:
            raise ValueError(f"soft_gate must be a power of 0 or more, got {self.soft_gate}.")
        if not 0 < self.soft_gate_end <= 1:
            raise ValueError(
                f"soft_gate_end must be a fraction of the run, above 0 and up to 1, got {self.soft_gate_end}."
            )

    def evicts(self, step: int, total_steps: int) -> bool:
        """Whether eviction is on at optimizer step `step` (from 0) of `total_steps`."""
        start = self.eviction_start
        return step >= (start * total_steps if isinstance(start, float) else start)

    def exploration_at(self, step: int, total_steps: int) -> float:
        """Share of dropped pairs left visible at optimizer step `step` (from 0) of `total_steps`."""
        return self.exploration * max(0.0, 1 - step / (self.exploration_end * total_steps))

    def soft_gate_at(self, step: int, total_steps: int) -> float:
        """Power of the soft gate at optimizer step `step` (from 0) of `total_steps`."""
        return self.soft_gate * max(0.0, 1 - step / (self.soft_gate_end * total_steps))

    def apply(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Set every learned-eviction layer of `model` to what the schedule says for the coming optimizer step.

        Stateless: a resumed run needs only the right `step`. Models without such layers are left alone. Under DDP with
        `scorer_freeze_steps` > 0, wrap with `find_unused_parameters=True`.

        Args:
            model: wrapped or not; its `LearnedEviction` modules are changed in place.
            step: optimizer steps already taken.
            total_steps: optimizer steps of the whole run.
        """
        evicts, exploration = self.evicts(step, total_steps), self.exploration_at(step, total_steps)
        for layer in learned_eviction_layers(model).values():
            layer.eviction = evicts
            layer.training_budget = layer.options.budget if self.enforce_budget else None
            layer.exploration = exploration
            layer.soft_gate = self.soft_gate_at(step, total_steps)
            if self.scorer_freeze_steps > 0:  # else they are as their user wants them, frozen perhaps
                layer.router.requires_grad_(step >= self.scorer_freeze_steps)


def learned_eviction_layers(model: nn.Module) -> dict[int, LearnedEviction]:
    """The learned-eviction mixers of a model, wrapped or not, in the order of `kept`.

    The keys are the indices of their layers, after `layers.` in their names; where a model of one's own has no such
    names, their places among each other.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, LearnedEviction)]
    numbers = [re.findall(r"(?:^|\.)layers\.(\d+)\.", f"{name}.") for name, _ in found]
    indices = [int(number[-1]) for number in numbers if number]
    if len(set(indices)) < len(found):
        return dict(enumerate(module for _, module in found))
    return dict(sorted(zip(indices, (module for _, module in found), strict=True)))
