"""The transformers Trainer, with what hybrid models need: parameter groups, retention metrics, a stop on NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from holdfast.training.callbacks import RetentionCallback
from holdfast.training.speed import SpeedMeter

_COUNTS = ("kept_mean", "kept_min", "kept_max", "stored_mean", "stored_min", "stored_max")
_SCALARS = ("lm_loss", "retention_loss", *_COUNTS, "lambda_mean", "lambda_max")


class TrainingDivergedError(RuntimeError):
    """The loss is no longer a number; the message says from which step on, and what to try."""


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    scorer_lr_scale: float = 1.0,
    scorer_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: scorers apart, weight decay on matrices only.

    Vectors (norms, biases, `A_log`, `dt_bias`) are not decayed. Every parameter that requires a gradient, and every
    scorer parameter (which a schedule may have frozen for now), is in exactly one group; empty groups are left out.

    Args:
        model: the model; scorer parameters are those with `.router.` in their name.
        learning_rate: of everything but the scorers.
        weight_decay: of parameters with two or more dimensions.
        scorer_lr_scale: factor on the learning rate of the scorers.
        scorer_weight_decay: of all parameters of the scorers, biases included, so that their logits are drawn to 0 and
            not into the flat ends of the sigmoid, where nothing is learned; None: as for the rest.

    Returns:
        Up to four groups with the keys `params`, `lr`, `weight_decay`.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_scorer = ".router." in f".{name}"
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        if is_scorer and scorer_weight_decay is not None:
            decay = scorer_weight_decay
        if parameter.requires_grad or is_scorer:
            groups.setdefault((is_scorer, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * (scorer_lr_scale if is_scorer else 1.0), "weight_decay": decay}
        for (is_scorer, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


class HybridTrainer(Trainer):
    """A Trainer whose optimizer uses `parameter_groups`, and whose logs show what learned eviction does.

    Its logs gain `lm_loss`, `retention_loss`, over all heads `kept_mean|min|max`, `stored_mean|min|max` and
    `lambda_mean|max` (see `RetentionCallback.drain`), and what `SpeedMeter` measures. A loss that
    is NaN or infinite ends the run at the next log or checkpoint, before anything broken is saved.

    Args:
        *args, **kwargs: as for `transformers.Trainer`.
        retention: the callback that steers learned eviction; None: one with the settings in the model's configuration.
        peak_flops: as for `SpeedMeter`.
        scorer_lr_scale, scorer_weight_decay: as for `parameter_groups`.
    """

    def __init__(
        self,
        *args: Any,
        retention: RetentionCallback | None = None,
        peak_flops: float | None = None,
        scorer_lr_scale: float = 1.0,
        scorer_weight_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.scorer_weight_decay = scorer_weight_decay
        self.scorer_lr_scale = scorer_lr_scale
        self.last_metrics: dict[str, Any] = {}
        self._first_bad_step: Tensor | None = None
        self.add_callback(retention or RetentionCallback())
        self.speed = SpeedMeter(peak_flops)
        self.add_callback(self.speed)

    @property
    def retention(self) -> RetentionCallback:
        """The callback in use (a resumed Trainer may have rebuilt it)."""
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, RetentionCallback))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args)
            groups = parameter_groups(
                self.model if model is None else model,  # type: ignore[arg-type]
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                scorer_lr_scale=self.scorer_lr_scale,
                scorer_weight_decay=self.scorer_weight_decay,
            )
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self._first_bad_step is None:
            self._first_bad_step = torch.full((), -1, device=loss.device)
        # Kept on the device: reading it at every step would stall a GPU.
        is_first = ~loss.isfinite() & (self._first_bad_step < 0)
        self._first_bad_step = torch.where(is_first, self.state.global_step + 1, self._first_bad_step)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._stop_if_diverged()
            self.last_metrics = self.retention.drain()
            logs |= {name: self.last_metrics[name] for name in _SCALARS if name in self.last_metrics}
            logs |= self.speed.drain()
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._stop_if_diverged()
        super()._save_checkpoint(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = getattr(self.model, "all_tied_weights_keys", {})  # saved once, under another name: not missing
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _stop_if_diverged(self) -> None:
        step = -1 if self._first_bad_step is None else int(self._first_bad_step.item())
        if step >= 0:
            raise TrainingDivergedError(
                f"The loss is not a finite number since step {step}: lower the learning rate, or resume from the last "
                "checkpoint with a longer warm-up or stronger clipping."
            )
