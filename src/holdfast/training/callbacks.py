"""The glue between a transformers Trainer and learned eviction: one callback, usable with any Trainer."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from holdfast.mixers.layout import count_documents
from holdfast.settings import from_mapping
from holdfast.training.controller import BudgetController, ControllerConfig, RetentionWatch, mean_over_ranks
from holdfast.training.schedule import RetentionSchedule, learned_eviction_layers

logger = logging.get_logger(__name__)


class RetentionCallback(TrainerCallback, ExportableState):
    """Runs the budget controller, the retention schedule and the collapse watch inside a transformers Trainer.

    It reads the counts of kept pairs off the model's outputs by a forward hook: with gradient accumulation they are
    averaged over the micro-batches of a step. Its state goes into every checkpoint and comes back when the Trainer
    resumes. Models without learned eviction train as they would without it.

    Args:
        controller: settings of the λ rule, or a mapping of them; None: those in the model's configuration.
        schedule: settings of the schedule, or a mapping of them; None: everything on from the start.
        patience: steps after which a head that keeps nothing, or everything, is named in a warning.
    """

    def __init__(
        self,
        controller: ControllerConfig | Mapping[str, Any] | None = None,
        schedule: RetentionSchedule | Mapping[str, Any] | None = None,
        patience: int = 500,
    ) -> None:
        # Mappings are what a checkpoint holds, should the Trainer rebuild its callbacks from there.
        self.controller_config = _settings(ControllerConfig, controller, "controller")
        self.schedule = _settings(RetentionSchedule, schedule, "schedule") or RetentionSchedule()
        self.patience = patience
        self.controller: BudgetController | None = None
        self._watch: RetentionWatch | None = None
        self._controller_state: dict[str, Any] | None = None
        self._planned_steps = 0
        self._hook: RemovableHandle | None = None
        self._counts, self._positions = _RunningMean(), _RunningMean()
        self._logged: defaultdict[str, _RunningMean] = defaultdict(_RunningMean)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this callback; λ and the average counts are saved with the weights."""
        settings = {
            "controller": self.controller_config and dataclasses.asdict(self.controller_config),
            "schedule": dataclasses.asdict(self.schedule),
            "patience": self.patience,
        }
        state = self.controller.state_dict() if self.controller else self._controller_state
        return {"args": settings, "attributes": {"_controller_state": state, "_planned_steps": self._planned_steps}}

    def drain(self) -> dict[str, Any]:
        """Metrics since the last call, then start anew. Waits for the device; call it on every rank.

        Returns:
            `lm_loss` and `retention_loss` (means); over all heads `kept_mean|min|max` (pairs scored above the
            threshold, which λ steers), `stored_mean|min|max` (pairs that the store really holds, at most the budget),
            `lambda_mean` (of |λ|) and `lambda_max`; per head `kept`, `stored` and `lambda`, nested lists [L][Hkv]; only
            those that the model has.
        """
        means = {name: mean.pop() for name, mean in self._logged.items()}
        known = {name: mean_over_ranks(value) for name, value in means.items() if value is not None}
        by_head = {name: known.pop(name) for name in ("kept", "stored") if name in known}
        metrics: dict[str, Any] = {name: value.item() for name, value in known.items()}
        if by_head and self.controller is not None:
            for name, count in by_head.items():
                metrics |= {f"{name}_{kind}": getattr(count, kind)().item() for kind in ("mean", "min", "max")}
            penalty = self.controller.penalty
            metrics |= {"lambda_mean": penalty.abs().mean().item(), "lambda_max": penalty.max().item()}
            metrics |= {name: count.tolist() for name, count in by_head.items()} | {"lambda": penalty.tolist()}
        return metrics

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model: nn.Module = kwargs["model"]
        if args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor would leave out the penalty of learned eviction: override compute_loss, and "
                "add the `retention_loss` of the model's output."
            )
        if self._hook is not None:  # an earlier training that ended with an exception
            self._hook.remove()
        self._hook = model.register_forward_hook(self._record, with_kwargs=True)
        saved = state.stateful_callbacks.get(type(self).__name__, {"attributes": {}})
        attributes = saved["attributes"]
        # A run that is made longer goes by the fractions of its first plan: what has been switched on stays on.
        self._planned_steps = (attributes.get("_planned_steps") if state.global_step else 0) or state.max_steps
        layers = learned_eviction_layers(model)
        if not layers:
            return
        if not self.schedule.evicts(state.max_steps - 1, self._planned_steps):
            logger.warning(
                f"Nothing is evicted in this run of {state.max_steps} steps, and λ is left alone: "
                f"retention.eviction_start is {self.schedule.eviction_start!r}."
            )
        self.controller = BudgetController(model, config=self.controller_config)
        # "_steps": of checkpoints from before there was damping
        known = attributes.get("_controller_state") or {"steps": attributes.get("_steps", 0)}
        self.controller.load_state_dict(known)
        # Without a threshold every score is positive: that a head "keeps everything" then says nothing.
        if any(layer.options.threshold > 0 for layer in layers.values()):
            self._watch = RetentionWatch(
                list(layers), self.controller.budget, patience=self.patience, check_every=min(100, self.patience)
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.apply(kwargs["model"], state.global_step, self._planned_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.controller is None:
            return
        kept, positions = self._counts.pop(), self._positions.pop()
        if kept is None or positions is None:
            raise RuntimeError("The model reported no kept pairs: train it with return_dict=True and labels.")
        self._logged["kept"].add(kept)
        if self.schedule.evicts(state.global_step, self._planned_steps):
            self.controller.step(kept, positions)
            if self._watch is not None:
                self._watch.step(kept, positions)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @torch.compiler.disable  # counting in Python would recompile the model at every step
    def _record(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not module.training:
            return
        for name in ("lm_loss", "retention_loss"):
            value = getattr(output, name, None)
            if value is not None:
                self._logged[name].add(value)
        retention = getattr(output, "retention", None)
        if retention is not None:
            offsets = kwargs.get("cu_seqlens")
            sequences = len(retention.penalised) if offsets is None else count_documents(offsets)
            self._counts.add(retention.kept)
            if retention.stored is not None:
                self._logged["stored"].add(retention.stored)
            self._positions.add(retention.penalised.sum() / sequences)


class _RunningMean:
    """Mean of tensors added one by one, kept on their device."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, value: Tensor) -> None:
        value = value.detach().float()
        self._total = value if self._total is None else self._total + value
        self._count += 1

    def pop(self) -> Tensor | None:
        """The mean since the last call; None if nothing was added."""
        mean = None if self._total is None else self._total / self._count
        self._total, self._count = None, 0
        return mean


def _settings(cls: Any, value: Any, name: str) -> Any:
    return from_mapping(cls, value, name) if isinstance(value, Mapping) else value
