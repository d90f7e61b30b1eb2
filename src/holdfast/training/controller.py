"""The budget controller: raises and lowers the retention penalty λ until every head keeps about `budget` pairs.

The rule is a slow thermostat. The model counts how many pairs each head would keep; the controller averages the counts
over steps and, every `interval` steps, multiplies λ where a head keeps too many and divides it where it keeps too few.
It needs no Trainer: in a loop of your own it is one line to build and one line to call (see `BudgetController`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from holdfast.settings import from_mapping

logger = logging.get_logger(__name__)

_DECREASE, _TOLERANCE = 2.0, (0.95, 1.0)


@dataclass(frozen=True)
class ControllerConfig:
    """Settings of the λ rule (specification §3.6). The defaults are the published ones.

    Raises:
        ValueError: naming the setting, when one is out of range.
    """

    budget: int | None = None
    """Pairs to keep per key/value head, b; None: the budget of the model's own configuration."""
    initial: float = 1e-9
    """λ of a head that keeps too many at the first update (−λ, with `two_sided`, of one that keeps too few); `damping`
    then comes on top."""
    minimum: float = 1e-9
    """Below this λ (or −λ, see `two_sided`) becomes 0; from 0 it rises to this. With `proportional`: within ±minimum λ
    moves by steps of equal size, beyond by factors; choose it a little below the λ that you expect."""
    maximum: float = 1.0
    """λ (or −λ) never exceeds this."""
    increase: float = 1.5
    """Factor (α) on λ of a head that keeps too many."""
    decrease: float = _DECREASE
    """Divisor of λ of a head that keeps too few."""
    interval: int = 32
    """Optimizer steps between updates, u; the average of the counts has the same time scale."""
    initial_steps: int = 0
    """Steps before the rule starts: until then counts are averaged and λ stays; the first update is one interval on."""
    tolerance: tuple[float, float] = _TOLERANCE
    """(lo, hi): a head keeping between lo·b and hi·b pairs is left alone."""
    two_sided: bool = False
    """Let λ fall below 0 for a head that keeps too few: then |λ|·ReLU(−s) raises the scores of the pairs it drops.

    The published penalty only lowers scores: a head that has fallen below b waits for the model's loss to lift it. A
    head that cannot keep b pairs, for no more positions are scored, is not lifted."""
    proportional: bool = False
    """Move λ in proportion to the distance e = log2(kept / b), held within ±1, in place of by whole factors: by
    `increase` to the power e. `decrease` and `tolerance` belong to the published rule alone."""
    damping: float = 0.0
    """With `proportional`: λ also answers to the distance as it is, by as much as so many updates would add up to, and
    takes that back as a head comes near. Without it, heads that move at a pace of their own swing about the budget."""
    sharing: Literal["head", "layer", "all"] = "head"
    """Whether each head has its own λ, or the heads of a layer, or all heads, share one (by their mean count)."""

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget must be at least 1, got {self.budget}.")
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {self.interval}.")
        if self.initial_steps < 0:
            raise ValueError(f"initial_steps must be 0 or more, got {self.initial_steps}.")
        if not 0 < self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"it needs 0 < minimum <= initial <= maximum, got minimum {self.minimum}, "
                f"initial {self.initial}, maximum {self.maximum}."
            )
        if self.increase <= 1 or self.decrease <= 1:
            raise ValueError(f"increase and decrease are factors above 1, got {self.increase} and {self.decrease}.")
        if not 0 < self.tolerance[0] <= self.tolerance[1]:
            raise ValueError(f"tolerance must be (lo, hi) with 0 < lo <= hi, got {self.tolerance}.")
        if self.proportional and (self.decrease, self.tolerance) != (_DECREASE, _TOLERANCE):
            raise ValueError("with proportional, decrease and tolerance mean nothing: leave them out.")
        if not self.damping >= 0 or (self.damping and not self.proportional):
            raise ValueError(f"damping must be 0 or more, and 0 without proportional, got {self.damping}.")
        if self.sharing not in ("head", "layer", "all"):
            raise ValueError(f'sharing must be "head", "layer" or "all", got {self.sharing!r}.')

    @property
    def smoothing(self) -> float:
        """Weight a of the newest count in the moving average: a = 2 / (1 + u // 2)."""
        return min(1.0, 2 / (1 + self.interval // 2))


class BudgetController:
    """Keeps each head's count of kept pairs near the budget by moving λ (specification §3.6).

    In a training loop of your own:

        controller = BudgetController(model)
        ...
        output = model(input_ids, labels=labels)
        output.loss.backward()
        optimizer.step()
        controller.step(output.retention.kept)

    λ and the average counts are the model's buffers `l1_lambda` and `num_kept` (both [L, Hkv] fp32), changed in place,
    so they are saved with the weights. Save `state_dict()` too: it holds the step count, without which a resumed run
    would update at other steps. A model that already has λ > 0 (trained before) keeps it and continues from there.

    Under torch.distributed the counts are averaged over `process_group` at each step. This equals averaging the moving
    average at each update, and keeps every rank's buffers the same at all times, whatever DDP broadcasts or which rank
    saves. Nothing here but `state_dict` waits for the device. While eviction is switched off, do not call `step`: λ is
    then left alone.

    Args:
        model: a model with learned eviction, wrapped (DDP, torch.compile) or not.
        budget: overrides the budget in `config` and in the model's configuration.
        config: the settings; None: those in the model's configuration, where it has some, else the defaults.
        process_group: the data-parallel ranks; None: all ranks.

    Raises:
        ValueError: if the model has no retention buffers, or no budget is known.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        budget: int | None = None,
        config: ControllerConfig | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        model_config = _model_config(model)
        self.config = config or _settings_of(model_config)
        self.budget = budget or self.config.budget or _budget_of(model_config)
        self.process_group = process_group
        self.steps = 0
        self._distance: Tensor | None = None  # e at the last update of the proportional rule
        self._owner = _buffer_owner(model)

    @property
    def penalty(self) -> Tensor:
        """λ, the model's buffer: [L, Hkv] fp32."""
        return self._buffer("l1_lambda")

    @property
    def average_kept(self) -> Tensor:
        """The moving average of the kept pairs, the model's buffer: [L, Hkv] fp32."""
        return self._buffer("num_kept")

    @torch.no_grad()
    def step(self, kept: Tensor, positions: float | Tensor | None = None) -> None:
        """Take in the counts of one optimizer step; on every `interval`-th call update λ.

        Args:
            kept: [L, Hkv] kept pairs per layer and head, averaged over the batch (and over micro-batches when
                gradients are accumulated); any float dtype and device.
            positions: penalised positions per sequence, T′: what a head that keeps everything would count. `two_sided`
                lifts no head while there are at most `budget`; None: there are more.

        Raises:
            ValueError: if `kept` does not have the shape of the buffers.
        """
        average = self.average_kept
        if kept.shape != average.shape:
            raise ValueError(f"kept must have shape {tuple(average.shape)} like num_kept, got {tuple(kept.shape)}.")
        kept = kept.detach().to(average.device, torch.float32)
        average.mul_(1 - self.config.smoothing).add_(
            mean_over_ranks(kept, self.process_group), alpha=self.config.smoothing
        )
        self.steps += 1
        elapsed = self.steps - self.config.initial_steps
        if elapsed > 0 and elapsed % self.config.interval == 0:
            self._update(elapsed == self.config.interval, self._can_be_lifted(positions))

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs besides the model's buffers, ready for JSON: steps taken, and what damping remembers."""
        return {"steps": self.steps, "distance": None if self._distance is None else self._distance.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; the buffers come back with the model's own weights.

        Raises:
            ValueError: if the state is of another number of λ. The controller is then as it was.
        """
        distance = state.get("distance") if self.config.proportional else None
        if distance is not None:
            distance = torch.tensor(distance, dtype=torch.float32).clamp(-1.0, 1.0)
            expected = _shared(self.average_kept, self.config.sharing, torch.mean).shape
            if distance.shape != expected:
                raise ValueError(
                    f"the saved state is of a controller for {tuple(distance.shape)} values of λ, this one has "
                    f"{tuple(expected)}: the model or `sharing` differs."
                )
        self.steps, self._distance = int(state["steps"]), distance

    def _can_be_lifted(self, positions: float | Tensor | None) -> bool | Tensor:
        """Whether heads could keep more than the budget; the same on every rank."""
        if positions is None or not self.config.two_sided:
            return True
        counted = torch.as_tensor(positions, dtype=torch.float32, device=self.average_kept.device)
        return mean_over_ranks(counted, self.process_group) > self.budget

    def _update(self, is_first: bool, liftable: bool | Tensor) -> None:
        config, penalty = self.config, self.penalty
        kept = _shared(self.average_kept, config.sharing, torch.mean)
        previous = _shared(penalty if config.two_sided else penalty.clamp(min=0), config.sharing, _strongest)
        if config.proportional:
            changed = self._in_proportion(kept, previous, liftable)
        else:
            changed = self._by_factors(kept, previous, config.initial if is_first else config.minimum, liftable)
        penalty.copy_(changed.expand_as(penalty))

    def _by_factors(self, kept: Tensor, previous: Tensor, start: float, liftable: bool | Tensor) -> Tensor:
        """λ by the published rule; from 0 it rises to `start`."""
        config = self.config
        too_large = kept > config.tolerance[0] * self.budget
        too_small = kept < config.tolerance[1] * self.budget
        # A negative λ obeys the same rule with the roles exchanged: it grows where a head keeps too few.
        lifts = previous < 0
        size = previous.abs()
        grows = torch.where(lifts, too_small & liftable, too_large)
        shrinks = torch.where(lifts, too_large, too_small)
        changed = torch.where(grows & ~shrinks, size * config.increase, size)
        changed = torch.where(shrinks & ~grows, size / config.decrease, changed)
        changed = changed.clamp(max=config.maximum)
        changed = torch.where(changed < config.minimum, 0.0, changed) * torch.where(lifts, -1.0, 1.0)
        idle = changed == 0
        changed = torch.where(idle & too_large, start, changed)
        if config.two_sided:
            changed = torch.where(idle & too_small & ~too_large & liftable, -start, changed)
        return changed

    def _in_proportion(self, kept: Tensor, previous: Tensor, liftable: bool | Tensor) -> Tensor:
        """λ = minimum · sinh(I + damping · x), where x = log(increase) · e and I is the sum of all x so far.

        Computed from the λ before: the argument changes by x + damping · (x − x before). Far from 0 that multiplies λ;
        near it, λ changes sign without a jump.
        """
        config = self.config
        strongest = math.asinh(config.maximum / config.minimum)
        argument = torch.asinh(previous / config.minimum)
        lowest = torch.full_like(argument, -strongest if config.two_sided else 0.0)
        if isinstance(liftable, Tensor):  # a head that cannot be lifted is not pushed up any further than it is
            lowest = torch.where(liftable, lowest, argument.clamp(max=0.0))
        distance = (kept / self.budget).clamp(0.5, 2.0).log2()
        if self._distance is None:  # the first update; a λ that is there already stays, but for the usual change
            start = distance.sign() * math.asinh(config.initial / config.minimum)
            gain = math.log(config.increase)
            argument = torch.where(argument == 0, start + config.damping * gain * distance, argument + gain * distance)
        else:
            change = distance + config.damping * (distance - self._distance.to(distance.device))
            argument = argument + math.log(config.increase) * change
        self._distance = distance
        return config.minimum * torch.sinh(argument.clamp(max=strongest).maximum(lowest))

    def _buffer(self, name: str) -> Tensor:
        # Looked up each time: moving a model replaces its buffers, and casting it would lower these to bf16, in which
        # neither a factor of 1.5 nor a slow average is exact.
        buffer = getattr(self._owner, name)
        if buffer.dtype != torch.float32:
            buffer = buffer.float()
            setattr(self._owner, name, buffer)
        return buffer


class CollapsedHead(NamedTuple):
    """A head that a `RetentionWatch` warned about."""

    layer: int
    head: int
    keeps: Literal["nothing", "everything"]


class RetentionWatch:
    """Warns when a head keeps nothing, or everything, for long: its scorer has collapsed.

    A head keeping everything is no fault where the sequence is shorter than the budget, so it is counted only where
    more than `budget` positions were scored. Counting happens on the device; the host looks only every `check_every`
    calls. Each check logs at most one line per layer and kind, and a head is named again only after another `patience`
    steps.

    Args:
        layers: the model's layer index of each row of the counts.
        budget: pairs that a head may keep.
        patience: consecutive steps after which a head is named.
        check_every: steps between looks; also how late a warning may come.

    Raises:
        ValueError: if `patience` or `check_every` is below 1.
    """

    def __init__(self, layers: Sequence[int], budget: int, *, patience: int = 500, check_every: int = 100) -> None:
        if patience < 1 or check_every < 1:
            raise ValueError(f"patience and check_every must be at least 1 step, got {patience} and {check_every}.")
        self.layers = list(layers)
        self.budget = budget
        self.patience = patience
        self.check_every = check_every
        self._steps = 0
        self._streaks: Tensor | None = None

    @torch.no_grad()
    def step(self, kept: Tensor, positions: float | Tensor) -> list[CollapsedHead]:
        """Take in the counts of one step.

        Args:
            kept: [L, Hkv] kept pairs per layer and head.
            positions: penalised positions per sequence, T′: what a head that keeps everything would count.

        Returns:
            The heads named in a warning at this step, usually none.
        """
        kept = kept.detach().float()
        empty = kept <= 0
        full = (kept >= positions * (1 - 1e-6)) & (positions > self.budget)
        active = torch.stack([empty, full]).int()
        if self._streaks is None:
            self._streaks = torch.zeros_like(active)
        self._streaks = (self._streaks + 1) * active
        self._steps += 1
        return self._report() if self._steps % self.check_every == 0 else []

    def _report(self) -> list[CollapsedHead]:
        assert self._streaks is not None
        overdue = self._streaks >= self.patience
        self._streaks = torch.where(overdue, 0, self._streaks)
        named: list[CollapsedHead] = []
        for kind, layer, head in overdue.nonzero().tolist():
            named.append(CollapsedHead(self.layers[layer], head, "everything" if kind else "nothing"))
        for layer, keeps in dict.fromkeys((found.layer, found.keeps) for found in named):
            heads = ", ".join(str(found.head) for found in named if (found.layer, found.keeps) == (layer, keeps))
            advice = "is λ at its maximum?" if keeps == "everything" else "lower the learning rate of the scorer or α."
            logger.warning(f"Layer {layer}, head {heads}: kept {keeps} for {self.patience} steps; {advice}")
        return named


def mean_over_ranks(value: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """The mean of `value` over the ranks of `process_group` (None: all); `value` itself when nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    value = value.clone()
    dist.all_reduce(value, group=process_group)
    return value / dist.get_world_size(process_group)


def _strongest(penalty: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    """The λ of the largest size, with its sign; the positive one of two."""
    highest, lowest = penalty.amax(dim, keepdim), penalty.amin(dim, keepdim)
    return torch.where(highest >= -lowest, highest, lowest)


def _shared(value: Tensor, sharing: str, reduce: Any) -> Tensor:
    """Reduce [L, Hkv] over the heads that share one λ; the result broadcasts back to [L, Hkv]."""
    if sharing == "head":
        return value
    dims = (1,) if sharing == "layer" else (0, 1)
    return reduce(value, dim=dims, keepdim=True)


def _buffer_owner(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if {"l1_lambda", "num_kept"} <= module._buffers.keys():
            return module
    raise ValueError(
        f"{type(model).__name__} has no l1_lambda and num_kept buffers: a budget controller needs a model with "
        "learned_eviction layers."
    )


def _model_config(model: nn.Module) -> Any:
    return next((module.config for module in model.modules() if hasattr(module, "config")), None)


def _settings_of(model_config: Any) -> ControllerConfig:
    values = getattr(model_config, "controller", None) or {}
    return from_mapping(ControllerConfig, values, "the model's configuration", "controller")


def _budget_of(model_config: Any) -> int:
    options = getattr(model_config, "mixer_options", None) or {}
    budget = options.get("learned_eviction", {}).get("budget")
    if budget is None:
        raise ValueError("The model's configuration names no budget for learned_eviction: pass budget=.")
    return int(budget)
