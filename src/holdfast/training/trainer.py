"""The transformers Trainer, with what hybrid models need: parameter groups, retention metrics, a stop on NaN.

And with checkpoints that survive a crash: see `holdfast.training.checkpointing`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import SGD
from torch.utils.data import DataLoader, RandomSampler
from transformers import Trainer, TrainerCallback, get_cosine_with_min_lr_schedule_with_warmup
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import SchedulerType, get_last_checkpoint
from transformers.utils import logging

from holdfast.data.processes import with_lasting_workers
from holdfast.data.stream import TextStream
from holdfast.files import write_json
from holdfast.training import checkpointing
from holdfast.training.callbacks import RetentionCallback
from holdfast.training.checkpointing import CheckpointError, explaining_reads, explaining_writes
from holdfast.training.speed import SpeedMeter

logger = logging.get_logger(__name__)

DATA_POSITION = "data_position"
"""Directory in a checkpoint where each process leaves its position in a `TextStream`."""

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
        is_scorer = _is_scorers(name)
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        if is_scorer and scorer_weight_decay is not None:
            decay = scorer_weight_decay
        if parameter.requires_grad or is_scorer:
            groups.setdefault((is_scorer, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * (scorer_lr_scale if is_scorer else 1.0), "weight_decay": decay}
        for (is_scorer, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _is_scorers(name: str) -> bool:
    """Whether a parameter of this name is a scorer's."""
    return ".router." in f".{name}"


class _IntervalsAsAsked(TrainerCallback):
    """Logs, saves and evaluates a resumed run as often as is asked now; transformers would go on as it was."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class HybridTrainer(Trainer):
    """A Trainer whose optimizer uses `parameter_groups`, and whose logs show what learned eviction does.

    A pass in random order over data in memory is a whole number of steps, so that every step is as large as the others,
    on any number of devices; the samples left over, others in every pass, wait for the next. The loss of evaluations is
    that of the text alone, without the penalty. Its logs gain `lm_loss`, `retention_loss`, over all heads
    `kept_mean|min|max`, `stored_mean|min|max` and `lambda_mean|max` (see `RetentionCallback.drain`), and what
    `SpeedMeter` measures. A loss that is NaN or infinite ends the run at the next log or checkpoint, before anything
    broken is saved. A checkpoint bears its name only when it is complete; one that cannot be written or read ends the
    run with a `CheckpointError`. A `TextStream` to train on is shared out over the processes, and checkpoints hold its
    position.

    Args:
        *args, **kwargs: as for `transformers.Trainer`.
        retention: the callback that steers learned eviction; None: one with the settings in the model's configuration.
        peak_flops: as for `SpeedMeter`.
        scorer_lr_scale, scorer_weight_decay: as for `parameter_groups`.
        scorer_final_lr_share: `min_lr_rate` of the scorers, where the schedule is "cosine_with_min_lr": λ can hold a
            head to its budget only as long as its scorer learns as fast as the keys and values that it reads drift.
            None: that of the rest.

    Raises:
        ValueError: a loss other than the model's (`compute_loss_func`, `label_smoothing_factor`), or a
            `scorer_final_lr_share` with another schedule, or (in `train`) with one's own optimizer or scheduler.
    """

    def __init__(
        self,
        *args: Any,
        retention: RetentionCallback | None = None,
        peak_flops: float | None = None,
        scorer_lr_scale: float = 1.0,
        scorer_weight_decay: float | None = None,
        scorer_final_lr_share: float | None = None,
        **kwargs: Any,
    ) -> None:
        self._retention = retention or RetentionCallback()
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise ValueError(
                "compute_loss_func and label_smoothing_factor would leave out the penalty of learned eviction: "
                "override compute_loss, and add the `retention_loss` of the model's output."
            )
        schedule = SchedulerType(self.args.lr_scheduler_type)
        if scorer_final_lr_share is not None and schedule is not SchedulerType.COSINE_WITH_MIN_LR:
            raise ValueError(
                f"scorer_final_lr_share needs lr_scheduler_type 'cosine_with_min_lr', not {schedule.value}."
            )
        if any(isinstance(callback, RetentionCallback) for callback in self.callback_handler.callbacks):
            raise ValueError("HybridTrainer has a RetentionCallback of its own: give yours as retention=…")
        self.scorer_final_lr_share = scorer_final_lr_share
        self._scorer_groups: list[int] | None = None
        if isinstance(self.train_dataset, TextStream):
            self.args.ignore_data_skip = True  # a stream goes to its position at once
        self.scorer_weight_decay = scorer_weight_decay
        self.scorer_lr_scale = scorer_lr_scale
        self.last_metrics: dict[str, Any] = {}
        self._first_bad_step: Tensor | None = None
        self._is_staging = False
        self.add_callback(self._retention)
        self.add_callback(_IntervalsAsAsked())
        self.speed = SpeedMeter(peak_flops)
        self.add_callback(self.speed)

    def create_accelerator_and_postprocess(self) -> None:
        if self._retention.schedule.scorer_freeze_steps > 0 and self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = True  # frozen after wrapping, they have no gradient to wait for
        super().create_accelerator_and_postprocess()
        # Sequences of training have a few lengths at most: symbolic ones cost speed, and inductor fails on them.
        self.accelerator.state.dynamo_plugin.dynamic = False
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None and self.args.fsdp and self.args.world_size > 1:
            raise ValueError("accelerate shards models (FSDP) on accelerators only: on CPUs train with DDP.")
        if plugin is None or plugin.fsdp_version != 2:
            return
        # It would broadcast every tensor of the state as a shard, and λ is a buffer, which FSDP2 does not shard.
        plugin.cpu_ram_efficient_loading = False
        if self.args.bf16:
            # accelerate's default rounds all weights to bf16, the decay rates and the scorers too, and adds gradients
            # in it. Autocast already computes matrix products in bf16, as under DDP.
            plugin.mixed_precision_policy = MixedPrecisionPolicy()

    @property
    def retention(self) -> RetentionCallback:
        """The callback in use (a resumed Trainer may have rebuilt it)."""
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, RetentionCallback))

    def get_train_dataloader(self) -> DataLoader:
        stream = self.train_dataset
        if not isinstance(stream, TextStream):
            return with_lasting_workers(super().get_train_dataloader())
        # Not prepared by accelerate, which would share the blocks out a second time, and read ahead of what is trained.
        stream.set_rank(self.args.process_index, self.args.world_size)
        return DataLoader(
            stream,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # else it would take a number from the generator that dropout uses
        )

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return with_lasting_workers(super().get_eval_dataloader(*args, **kwargs))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, RandomSampler) or sampler.replacement:
            return sampler
        step = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        whole = sampler.num_samples - sampler.num_samples % step
        if not whole:
            logger.warning(
                f"There are {sampler.num_samples:,} samples, fewer than the {step:,} of a step: all steps are smaller."
            )
            return sampler
        return RandomSampler(sampler.data_source, num_samples=whole, generator=sampler.generator)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):  # loaders draw a number, which dropout would miss
            return super().evaluate(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not model.training:
            loss = getattr(outputs, "lm_loss", loss)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer_class, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args)
            trained: nn.Module = self.model if model is None else model  # type: ignore[assignment]
            groups = parameter_groups(
                trained,
                learning_rate=settings.get("lr", self.args.learning_rate),
                weight_decay=self.args.weight_decay,
                scorer_lr_scale=self.scorer_lr_scale,
                scorer_weight_decay=self.scorer_weight_decay,
            )
            scorers = {id(parameter) for name, parameter in trained.named_parameters() if _is_scorers(name)}
            self._scorer_groups = [index for index, group in enumerate(groups) if id(group["params"][0]) in scorers]
            self.optimizer = optimizer_class(groups, **settings)
        elif self._scorer_groups is None and (self.scorer_lr_scale != 1 or self.scorer_weight_decay is not None):
            raise ValueError("scorer_lr_scale and scorer_weight_decay need the Trainer's own optimizer.")
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.scorer_final_lr_share is None or (self._created_lr_scheduler and not is_new):  # known, or made before
            return scheduler
        if not is_new or self._scorer_groups is None:
            raise ValueError("scorer_final_lr_share needs the Trainer's own optimizer and schedule.")
        options = dict(self.args.lr_scheduler_kwargs or {})  # type: ignore[arg-type]
        options.pop("min_lr", None)
        course = get_cosine_with_min_lr_schedule_with_warmup(
            SGD([torch.zeros(1)]),  # of none of ours: it would set their learning rates
            self.args.get_warmup_steps(num_training_steps),
            num_training_steps,
            **options | {"min_lr_rate": self.scorer_final_lr_share},
        ).lr_lambdas[0]
        for index in self._scorer_groups:
            scheduler.lr_lambdas[index] = course  # type: ignore[attr-defined]
        return scheduler

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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`.

        Raises:
            CheckpointError: if a checkpoint cannot be written, or the one to resume from cannot be read.
            TrainingDivergedError: if the loss is no longer a number.
        """
        run = Path(self.args.output_dir or ".")
        if self.args.should_save:
            checkpointing.discard_incomplete(run)
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(run))
            if checkpoint is None:
                raise CheckpointError(f"{run} has no checkpoint to resume from.")
        if checkpoint:
            checkpointing.saved_step(Path(checkpoint))  # readable, or an error that says which is not
        return super().train(checkpoint or None, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stop_if_diverged()
        run = Path(super()._get_output_dir(trial))
        staged = run / checkpointing.INCOMPLETE / f"checkpoint-{self.state.global_step}"
        with explaining_writes(run, f"checkpoint of step {self.state.global_step}"):
            with self._staging():
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(run / staged.name)
                if self.args.should_save:
                    self.state.save_to_json(str(staged / checkpointing.STATE_FILE))
            if self.args.should_save:
                checkpointing.publish(staged, run, self.args.save_total_limit, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()

    def save_final(self, directory: Path) -> None:
        """Save model and tokenizer to `directory` by `save_pretrained`, each file at once or not at all.

        Call it on every rank. Sharded models are gathered, whatever form their checkpoints have.

        Raises:
            CheckpointError: if it cannot be written.
        """
        staged = Path(directory) / checkpointing.INCOMPLETE / "model"
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        with explaining_writes(Path(directory), "trained model"):
            self.save_model(str(staged), _internal_call=True)
            if self.args.should_save:
                (staged / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, and no part of a model
                for path in staged.iterdir():
                    path.chmod(0o644)  # safetensors makes files that only their owner reads
                    os.replace(path, Path(directory) / path.name)
                shutil.rmtree(staged.parent)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _staging(self) -> Iterator[None]:
        """Write checkpoints aside meanwhile."""
        self._is_staging = True
        try:
            yield
        finally:
            self._is_staging = False

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return str(Path(run) / checkpointing.INCOMPLETE) if self._is_staging else run

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:  # gathered from shards, where a tied weight has become two
            tied = getattr(self.model, "all_tied_weights_keys", {})
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with explaining_reads(resume_from_checkpoint, "weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_deepspeed_enabled:  # which has files of its own
            checkpointing.check_complete(Path(checkpoint))
        with explaining_reads(checkpoint, "optimizer state"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, TextStream):
            name = f"rank-{self.args.process_index:05d}.json"
            write_json(Path(output_dir) / DATA_POSITION / name, self.train_dataset.state_dict())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with explaining_reads(checkpoint, "random state"):
            super()._load_rng_state(checkpoint)
        if checkpoint is not None and isinstance(self.train_dataset, TextStream):
            files = sorted((Path(checkpoint) / DATA_POSITION).glob("rank-*.json"))
            if not files:
                raise ValueError(
                    f"{checkpoint} holds no position in the data; it is not of a run that streams its text."
                )
            with explaining_reads(checkpoint, "data position"):
                positions = [json.loads(path.read_text(encoding="utf-8")) for path in files]
            with explaining_reads(checkpoint, "data position", refusal=ValueError):
                self.train_dataset.load_state_dict(positions)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = getattr(self.model, "all_tied_weights_keys", {})  # saved once, under another name: not missing
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _stop_if_diverged(self) -> None:
        step = -1 if self._first_bad_step is None else int(self._first_bad_step.item())
        if step >= 0:
            raise TrainingDivergedError(
                f"The loss is not a finite number since step {step}: lower the learning rate, warm up longer or clip "
                "harder, in a run of another name; resumed, this one would take the same steps again."
            )
