"""One training run from a recipe: build, train, resume, save."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed as seed_generators
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from holdfast.data.stream import TextStream
from holdfast.files import replacing, write_json
from holdfast.modeling import HybridForCausalLM
from holdfast.training import run_directory
from holdfast.training.callbacks import RetentionCallback
from holdfast.training.checkpointing import (
    STATE_FILE,
    CheckpointError,
    check_complete,
    discard_incomplete,
    last_checkpoint,
    saved_step,
)
from holdfast.training.metrics import MetricsFile, ProgressBar, read_metrics
from holdfast.training.recipe import NeedleData, Recipe
from holdfast.training.run_data import RunData, build_data, check_data, keep_data
from holdfast.training.run_directory import METRICS_FILE, SUMMARY_FILE, RunDirectoryError
from holdfast.training.stopping import StopOnTermination, TrainingStopped
from holdfast.training.trainer import HybridTrainer

logger = logging.get_logger(__name__)


def train(recipe: Recipe, *, resume: bool | str = False) -> Path:
    """Train a model from scratch by a recipe, or continue where a run stopped.

    Writes to the directory `output.directory`/`name`: the recipe as used (recipe.toml), metrics.jsonl, checkpoints, and
    at the end the model (and tokenizer) by `save_pretrained` and summary.json. A resumed run continues the weights,
    the optimizer, the data, λ and the random numbers exactly where the checkpoint left them.

    Started by torchrun or `accelerate launch`, the processes share the work by DDP or FSDP2 (`training.parallel`, or
    what accelerate's configuration says); all of them must see the run directory.

    Args:
        recipe: what to train.
        resume: True: from the last whole checkpoint of the run, or from scratch if there is none; a path: from that
            checkpoint; False: from scratch. A finished run goes on if `training.max_steps` is raised, else it is left
            as it is.

    Returns:
        The run directory.

    Raises:
        RunDirectoryError: if the directory holds another run, a finished one, or one that was not asked to resume, if
            another process trains in it, or if a resumed run has other data.
        CheckpointError: if a checkpoint cannot be written (a full disk, say), or the one to resume from not be read.
        TrainingDivergedError: if the loss is no longer a number.
        TrainingStopped: a `SystemExit`: after a SIGTERM, once a checkpoint is written.
        ValueError: if the recipe does not fit together, e.g. a tokenizer larger than the model's vocabulary.
    """
    recipe.build_config()  # a mistake in the recipe must not leave a directory behind
    directory = Path(recipe.output.directory) / recipe.name
    arguments = _training_arguments(recipe, directory)  # connects the processes, where there are several
    with contextlib.ExitStack() as held:
        start, error = None, None
        with arguments.main_process_first(local=False):
            try:
                start = _start(recipe, directory, arguments, resume, held)
            except Exception as refusal:
                error = refusal
        _share(error, arguments)
        return directory if start is None else _run(recipe, directory, arguments, start)


@dataclasses.dataclass
class _Start:
    """Where a run begins, or goes on.

    Attributes:
        data: of the run.
        checkpoint: where it goes on from; None: from scratch.
        begun: what is to be called after the first step, in the first process.
    """

    data: RunData
    checkpoint: Path | None
    begun: Callable[[], None] | None


def _start(
    recipe: Recipe, directory: Path, arguments: TrainingArguments, resume: bool | str, held: contextlib.ExitStack
) -> _Start | None:
    """Check all that can be checked, then have the directory, until `held` is closed; None: the run is finished."""
    is_first = arguments.process_index == 0
    if is_first:
        run_directory.recover(directory)
        run_directory.check(directory, recipe, resume=bool(resume))
    if resume is True and run_directory.is_finished(directory, recipe.training.max_steps):
        logger.warning(f"{directory} is finished; raise training.max_steps to go on.")
        return None
    checkpoint = last_checkpoint(directory) if resume is True else (Path(resume) if resume else None)
    if checkpoint is not None:
        _check_checkpoint(recipe, checkpoint)
    home = directory if checkpoint is None else checkpoint
    data = build_data(recipe, home, keep_tokenizer=bool(resume) or not is_first)
    if isinstance(data.training, TextStream):  # the Trainer does so too, after the model is built
        data.training.set_rank(arguments.process_index, arguments.world_size)
    check_data(recipe, data, checkpoint)
    begun = None
    if is_first:
        step = None if checkpoint is None else saved_step(checkpoint)
        begun = held.enter_context(run_directory.claim(directory, recipe, bool(resume), step))
        keep_data(recipe, directory, data, goes_on=checkpoint is not None)
    return _Start(data, checkpoint, begun)


def _share(error: Exception | None, arguments: TrainingArguments) -> None:
    """Raise the error of this process, or tell of that of another: none waits for one that has been refused."""
    if torch.distributed.is_initialized():
        told: list[str | None] = [None] * arguments.world_size
        torch.distributed.all_gather_object(told, None if error is None else str(error))
        refused = next((rank for rank, text in enumerate(told) if text is not None), None)
        if error is None and refused is not None:
            raise RunDirectoryError(f"Process {refused} cannot begin: {told[refused]}")
    if error is not None:
        raise error


def _check_checkpoint(recipe: Recipe, checkpoint: Path) -> None:
    """See to it that a run by this recipe can go on from a checkpoint."""
    run_directory.check_origin(checkpoint.parent, recipe)
    steps = recipe.training.max_steps
    if saved_step(checkpoint) > steps:
        raise CheckpointError(f"training.max_steps is {steps}, but {checkpoint} is past it: raise it.")
    if saved_step(checkpoint) < steps:
        check_complete(checkpoint)
    elif not list(checkpoint.glob("*.safetensors")):
        raise CheckpointError(f"{checkpoint} holds shards only: raise training.max_steps, or resume an earlier one.")


class _AfterFirstStep(TrainerCallback):
    """Calls a function when the first step has been taken."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._function is not None:
            self._function()
            self._function = None


def _run(recipe: Recipe, directory: Path, arguments: TrainingArguments, start: _Start) -> Path:
    """Train in a directory that is this run's."""
    checkpoint = start.checkpoint
    if checkpoint is not None and saved_step(checkpoint) == recipe.training.max_steps:
        return _finish(recipe, directory, checkpoint)
    trainer = _build_trainer(recipe, arguments, start.data)
    bar, stop = ProgressBar(), StopOnTermination()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(stop)  # before the metrics, which have a line at every checkpoint
    trainer.add_callback(MetricsFile(directory / METRICS_FILE, trainer))
    trainer.add_callback(bar)
    if start.begun is not None:
        trainer.add_callback(_AfterFirstStep(start.begun))
    with _quiet_saving():
        try:
            result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            bar.close()
            stop.close()
        if stop.has_stopped:
            raise TrainingStopped(result.global_step)
        trainer.save_final(directory)
    if trainer.is_world_process_zero():
        _write_summary(directory, result.global_step, checkpoint, trainer.model)
    stop.pass_on()
    return directory


def _finish(recipe: Recipe, directory: Path, checkpoint: Path) -> Path:
    """End a run that was killed after its last checkpoint: what remains is to put the model in its place."""
    steps = recipe.training.max_steps
    if os.environ.get("RANK", "0") == "0":
        discard_incomplete(directory)
        for path in checkpoint.iterdir():
            # All but the state of training, which torch has pickled.
            if path.is_file() and path.suffix not in (".pt", ".pth", ".bin") and path.name != STATE_FILE:
                with replacing(directory / path.name) as temporary:
                    shutil.copyfile(path, temporary)
        with torch.device("meta"):
            model = HybridForCausalLM(recipe.build_config())
        _write_summary(directory, steps, checkpoint, model)
    return directory


def _write_summary(directory: Path, steps: int, checkpoint: Path | None, model: Any) -> None:
    """The last file of a run: where it stands, the run is finished. Loss and seconds are those of all its parts."""
    lines = read_metrics(directory / METRICS_FILE)
    logged = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    weights = [after - before for (before, _), (after, _) in pairwise([(0, 0.0), *logged])]
    total = sum(weight * loss for weight, (_, loss) in zip(weights, logged, strict=True))
    summary = {
        "steps": steps,
        "training_loss": total / sum(weights) if logged else None,
        "seconds": round(max((line["seconds"] for line in lines), default=0.0), 1),
        "resumed_from": None if checkpoint is None else str(checkpoint),
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        "device": str(model.device),
    }
    write_json(directory / SUMMARY_FILE, summary)


def _build_trainer(recipe: Recipe, arguments: TrainingArguments, data: RunData) -> HybridTrainer:
    trainer = HybridTrainer(
        model=_build_model(recipe, data.tokenizer),
        args=arguments,
        train_dataset=data.training,
        eval_dataset=data.evaluation,
        data_collator=data.collator,
        processing_class=data.tokenizer,
        retention=RetentionCallback(recipe.controller, recipe.retention),
        peak_flops=recipe.training.peak_flops,
        scorer_lr_scale=recipe.training.scorer_lr_scale,
        scorer_weight_decay=recipe.training.scorer_weight_decay,
        scorer_final_lr_share=recipe.training.scorer_final_lr_share,
    )
    # Every process its own dropout, as each has its own samples.
    seed_generators(recipe.training.seed, device_specific=True)
    return trainer


def _build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast | None) -> HybridForCausalLM:
    config = recipe.build_config()
    if tokenizer is not None:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    elif isinstance(recipe.data, NeedleData):
        config.bos_token_id, config.eos_token_id = recipe.data.task.bos_token_id, None
        config.pad_token_id = recipe.data.task.pad_token_id
    seed_generators(recipe.training.seed)
    model = HybridForCausalLM(config)
    if recipe.training.gradient_checkpointing:
        # Renamed in transformers 5.23. Enabled here since the Trainer's own setting was renamed too.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


@contextlib.contextmanager
def _quiet_saving() -> Iterator[None]:
    """Without a progress bar of transformers' own for every checkpoint."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _training_arguments(recipe: Recipe, directory: Path) -> TrainingArguments:
    training, data = recipe.training, recipe.data
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if training.accumulation % processes:
        raise ValueError(
            f"training.accumulation is {training.accumulation}: {processes} processes cannot share as many "
            "micro-batches; make it a multiple, and lower training.batch_size to keep the step the same."
        )
    has_eval = training.eval_every > 0 and (isinstance(data, NeedleData) or data.validation_split is not None)
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=training.max_steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulation // processes,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": training.final_lr_share},
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        max_grad_norm=training.clip,
        bf16=training.bf16,
        # A curriculum is in the order of the samples; text is shuffled.
        train_sampling_strategy="sequential" if isinstance(data, NeedleData) else "random",
        dataloader_num_workers=training.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        torch_compile=training.compile,
        fsdp=True if training.parallel == "fsdp" and processes > 1 else None,  # type: ignore[arg-type]
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["HybridBlock"]},
        # A scorer that is frozen after wrapping has no gradient to wait for.
        ddp_find_unused_parameters=recipe.retention.scorer_freeze_steps > 0,
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,  # it would show the last good loss in place of a broken one
        save_steps=training.save_every,
        save_total_limit=training.keep_checkpoints,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=training.eval_every or None,
        prediction_loss_only=True,
        seed=training.seed,
        data_seed=training.seed,
        report_to=list(training.report_to) or "none",
        run_name=recipe.name,
        disable_tqdm=True,
    )
