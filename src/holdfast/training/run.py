"""One training run from a recipe: build, train, resume, save."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, TrainingArguments, default_data_collator, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from holdfast.data.needle import NeedleStream
from holdfast.data.text import PackedText, collate_isolated, load_text, load_tokenizer, train_tokenizer
from holdfast.modeling import HybridForCausalLM
from holdfast.training.callbacks import RetentionCallback
from holdfast.training.metrics import MetricsFile, ProgressBar
from holdfast.training.recipe import NeedleData, Recipe, TextData, load_recipe
from holdfast.training.settings import to_toml
from holdfast.training.trainer import HybridTrainer

logger = logging.get_logger(__name__)

RECIPE_FILE, METRICS_FILE, SUMMARY_FILE = "recipe.toml", "metrics.jsonl", "summary.json"
# Found alone, these say that a run was prepared and never trained a step.
_PREPARED = {RECIPE_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
_OWN_FILES = {*_PREPARED, METRICS_FILE, SUMMARY_FILE, "config.json", "generation_config.json", "model.safetensors"}
# What a resumed run may do differently: nothing that the weights depend on.
_MAY_CHANGE = ("output.", "description", *(f"training.{name}_every" for name in ("log", "save", "eval")))
_MAY_CHANGE += ("training.keep_checkpoints", "training.workers", "training.report_to", "training.peak_flops")


class RunDirectoryError(RuntimeError):
    """The run directory holds something that this run must not touch; the message says what to do."""


def train(recipe: Recipe, *, resume: bool | str = False) -> Path:
    """Train a model from scratch by a recipe, or continue where a run stopped.

    Writes to the directory `output.directory`/`name`: the recipe as used (recipe.toml), metrics.jsonl, checkpoints, and
    at the end the model (and tokenizer) by `save_pretrained` and summary.json. A resumed run continues the weights,
    the optimizer, the data and λ exactly where the checkpoint left them.

    Args:
        recipe: what to train.
        resume: True: from the last whole checkpoint of the run, or from scratch if there is none; a path: from that
            checkpoint; False: from scratch.

    Returns:
        The run directory.

    Raises:
        RunDirectoryError: if the directory holds another run, a finished one, or one that was not asked to resume.
        TrainingDivergedError: if the loss is no longer a number.
        ValueError: if the recipe does not fit together, e.g. a tokenizer larger than the model's vocabulary.
    """
    recipe.build_config()  # a mistake in the recipe must not leave a directory behind
    directory = Path(recipe.output.directory) / recipe.name
    if _is_first_process():
        _claim(directory, recipe, resume=bool(resume))
    checkpoint = _last_checkpoint(directory) if resume is True else (resume or None)
    data = _build_data(recipe, directory, resume=bool(resume))
    model = _build_model(recipe, data.tokenizer)
    trainer = HybridTrainer(
        model=model,
        args=_training_arguments(recipe, directory, has_eval=data.evaluation is not None),
        train_dataset=data.training,
        eval_dataset=data.evaluation,
        data_collator=data.collator,
        processing_class=data.tokenizer,
        retention=RetentionCallback(recipe.controller, recipe.retention),
        peak_flops=recipe.training.peak_flops,
        scorer_lr_scale=recipe.training.scorer_lr_scale,
        scorer_weight_decay=recipe.training.scorer_weight_decay,
    )
    bar = ProgressBar()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(MetricsFile(directory / METRICS_FILE, trainer))
    trainer.add_callback(bar)
    started = time.monotonic()
    with _quiet_saving():
        try:
            result = trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            bar.close()
        trainer.save_model(str(directory))
    if trainer.is_world_process_zero():
        summary = {
            "steps": result.global_step,
            "training_loss": result.training_loss,
            "seconds": round(time.monotonic() - started, 1),
            "resumed_from": None if checkpoint is None else str(checkpoint),
        }
        _write_summary(directory, model, summary)
    return directory


def _write_summary(directory: Path, model: HybridForCausalLM, summary: dict[str, Any]) -> None:
    """The last file of a run: where it stands, the run is finished."""
    summary |= {"parameters": model.num_parameters(), "torch": torch.__version__, "device": str(model.device)}
    _write(directory / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")


def _build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast | None) -> HybridForCausalLM:
    config = recipe.build_config()
    if tokenizer is not None:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    elif isinstance(recipe.data, NeedleData):
        config.bos_token_id, config.eos_token_id = recipe.data.task.bos_token_id, None
        config.pad_token_id = recipe.data.task.pad_token_id
    set_seed(recipe.training.seed)
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


@dataclasses.dataclass
class _Data:
    training: Dataset
    evaluation: Dataset | None
    collator: Any
    tokenizer: PreTrainedTokenizerFast | None


def _build_data(recipe: Recipe, directory: Path, resume: bool) -> _Data:
    if isinstance(recipe.data, NeedleData):
        return _needle_data(recipe, recipe.data)
    return _text_data(recipe, recipe.data, directory, resume)


def _needle_data(recipe: Recipe, data: NeedleData) -> _Data:
    training = recipe.training
    if data.task.vocab_size > recipe.model["vocab_size"]:
        raise ValueError(
            f"model.vocab_size is {recipe.model['vocab_size']}, but the needle task has {data.task.vocab_size} tokens."
        )
    per_step = training.batch_size * training.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    curriculum = [(step * per_step, pairs, length) for step, pairs, length in data.curriculum] or None
    stream = NeedleStream(data.task, curriculum, training.seed, size=training.max_steps * per_step)
    held_out = NeedleStream(data.task, None, training.seed + 1, size=data.eval_samples)
    return _Data(stream, held_out if training.eval_every else None, NeedleStream.collate, None)


def _text_data(recipe: Recipe, data: TextData, directory: Path, resume: bool) -> _Data:
    texts = load_text(data.source, split=data.split, text_column=data.column, config=data.config)
    if data.tokenizer != "train":
        tokenizer = load_tokenizer(data.tokenizer)
    elif resume and (directory / "tokenizer.json").exists():
        tokenizer = load_tokenizer(directory)
    else:
        tokenizer = train_tokenizer(texts, recipe.model["vocab_size"])
        if _is_first_process():
            tokenizer.save_pretrained(directory)
    if len(tokenizer) > recipe.model["vocab_size"]:
        raise ValueError(
            f"model.vocab_size is {recipe.model['vocab_size']}, but the tokenizer {data.tokenizer!r} has "
            f"{len(tokenizer)} tokens."
        )
    options: dict[str, Any] = {"length": data.length, "isolate": data.isolate}
    blocks = PackedText.from_texts(texts, tokenizer, max_tokens=data.max_tokens, **options)
    evaluation = None
    if recipe.training.eval_every and data.validation_split:
        held_out = load_text(data.source, split=data.validation_split, text_column=data.column, config=data.config)
        evaluation = PackedText.from_texts(held_out, tokenizer, max_tokens=data.validation_tokens, **options)
    collator = collate_isolated if data.isolate else default_data_collator
    return _Data(blocks, evaluation, collator, tokenizer)


def _training_arguments(recipe: Recipe, directory: Path, has_eval: bool) -> TrainingArguments:
    training = recipe.training
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=training.max_steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulation,
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
        train_sampling_strategy="sequential" if isinstance(recipe.data, NeedleData) else "random",
        dataloader_num_workers=training.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
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


def _claim(directory: Path, recipe: Recipe, resume: bool) -> None:
    """Make the directory this run's, or raise."""
    recipe_file = directory / RECIPE_FILE
    found = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    if resume and recipe_file.exists():
        _check_same(recipe_file, recipe)
    if found - _PREPARED:
        alternatives = "give the run another name, or set output.overwrite to start over"
        if SUMMARY_FILE in found and (resume or not recipe.output.overwrite):
            raise RunDirectoryError(f"{directory} holds a finished run: {alternatives}.")
        if RECIPE_FILE not in found and not recipe.output.overwrite:
            raise RunDirectoryError(f"{directory} is not empty and holds no run: {alternatives}.")
        if not (resume or recipe.output.overwrite):
            raise RunDirectoryError(f"{directory} holds an unfinished run: resume it, {alternatives}.")
        if not resume and RECIPE_FILE in found:
            _clear(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write(recipe_file, to_toml(recipe))


def _check_same(recipe_file: Path, recipe: Recipe) -> None:
    before, now = (_flat(json.loads(json.dumps(dataclasses.asdict(r)))) for r in (load_recipe(recipe_file), recipe))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(_MAY_CHANGE):
            raise RunDirectoryError(
                f"{recipe_file.parent} was started with {key} = {before.get(key)!r}, not {now.get(key)!r}: resume it "
                "with its own recipe, or give the run another name."
            )


def _flat(table: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        is_table = isinstance(value, dict)
        flat |= _flat(value, f"{path}{key}.") if is_table else {f"{path}{key}": value}
    return flat


def _clear(directory: Path) -> None:
    """Take out what an earlier run wrote; anything else stays."""
    for checkpoint in directory.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for name in _OWN_FILES:
        (directory / name).unlink(missing_ok=True)


def _last_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint that was written to its end; a run killed while saving leaves a broken one."""
    found = [path for path in directory.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())  # the Trainer writes it last
        except (OSError, ValueError):
            logger.warning(f"{path} is incomplete: an earlier checkpoint is used.")
        else:
            return str(path)
    logger.warning(f"{directory} has no checkpoint yet: training starts from the beginning.")
    return None


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _write(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
