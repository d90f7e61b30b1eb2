"""The data of a run: what a recipe asks for, and that a run which goes on has what it was started with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, default_data_collator
from transformers.utils import logging

from holdfast.data.needle import NeedleStream
from holdfast.data.stream import TextStream
from holdfast.data.text import collate_isolated, is_prepared, load_tokenizer
from holdfast.files import write_files
from holdfast.training import run_directory
from holdfast.training.recipe import NeedleData, Recipe, TextData
from holdfast.training.run_directory import RunDirectoryError
from holdfast.training.text_blocks import check_evaluation, evaluation_blocks, identify, own_tokenizer, training_blocks
from holdfast.training.trainer import DATA_POSITION

logger = logging.get_logger(__name__)


@dataclasses.dataclass
class RunData:
    """Result of `build_data`.

    Attributes:
        training: blocks of text or samples of the needle task; a `TextStream` is not yet shared out over processes.
        evaluation: the same, held out; None where no evaluations are made.
        collator: makes a batch of them.
        tokenizer: of the text; None for the needle task.
        tokenizer_is_new: whether it was trained just now, and lies nowhere yet.
    """

    training: Dataset
    evaluation: Dataset | None
    collator: Any
    tokenizer: PreTrainedTokenizerFast | None
    tokenizer_is_new: bool = False


def build_data(recipe: Recipe, directory: Path, keep_tokenizer: bool) -> RunData:
    """Open, tokenize or generate what a recipe asks for; nothing is written.

    Args:
        recipe: of the run.
        directory: where a tokenizer of the run would lie.
        keep_tokenizer: use that one, if an earlier part of the run or another process has trained it.

    Raises:
        FileNotFoundError, ValueError: if there is no such data, or they, the tokenizer and the model do not fit.
    """
    if isinstance(recipe.data, NeedleData):
        return _needle_data(recipe, recipe.data)
    return _text_data(recipe, recipe.data, directory, keep_tokenizer)


def check_data(recipe: Recipe, data: RunData, checkpoint: Path | None) -> None:
    """See to it that a run that goes on has the data it was started with, streamed as they were.

    Raises:
        RunDirectoryError: if it has others.
    """
    if checkpoint is None:
        return
    if (checkpoint / DATA_POSITION).exists() and not isinstance(data.training, TextStream):
        raise RunDirectoryError(
            f"{checkpoint} is of a run that streamed its text, which is now small enough to be held in memory "
            "(data.in_memory): its files have changed. Resume it with those it was started with, or give the run "
            "another name (--name)."
        )
    run_directory.check_data(checkpoint.parent, _identities(recipe, data))


def keep_data(recipe: Recipe, directory: Path, data: RunData, goes_on: bool) -> None:
    """Keep with the run what its data are, beside what was noted where it goes on, and a tokenizer trained on them."""
    if data.tokenizer_is_new and data.tokenizer is not None:
        write_files(directory, data.tokenizer.save_pretrained)
    run_directory.note_data(directory, _identities(recipe, data), add=goes_on)


def _identities(recipe: Recipe, data: RunData) -> dict[str, dict[str, int]]:
    """What tells the text to train on, and that to evaluate on, from others; of a stream nothing."""
    section = recipe.data
    if not isinstance(section, TextData):
        return {}
    splits = {"training": (data.training, section.split), "validation": (data.evaluation, section.validation_split)}
    found = {
        name: identify(blocks, section, split)
        for name, (blocks, split) in splits.items()
        if blocks is not None and split is not None
    }
    return {name: identity for name, identity in found.items() if identity is not None}


def _needle_data(recipe: Recipe, data: NeedleData) -> RunData:
    training = recipe.training
    if data.task.vocab_size > recipe.model["vocab_size"]:
        raise ValueError(
            f"model.vocab_size is {recipe.model['vocab_size']}, but the needle task has {data.task.vocab_size} tokens."
        )
    per_step = training.batch_size * training.accumulation
    curriculum = [(step * per_step, pairs, length) for step, pairs, length in data.curriculum] or None
    stream = NeedleStream(data.task, curriculum, training.seed, size=training.max_steps * per_step)
    held_out = NeedleStream(data.task, None, training.seed + 1, size=data.eval_samples)
    return RunData(stream, held_out if training.eval_every else None, NeedleStream.collate, None)


def _text_data(recipe: Recipe, data: TextData, directory: Path, keep_tokenizer: bool) -> RunData:
    if recipe.training.eval_every:
        check_evaluation(data)
        if data.validation_split is None:
            logger.warning("No evaluations are made, whatever training.eval_every: data.validation_split is not set.")
    is_new = False
    if is_prepared(data.source):
        tokenizer = load_tokenizer(data.source)
    elif data.tokenizer != "train":
        tokenizer = load_tokenizer(data.tokenizer)
    elif keep_tokenizer and (directory / "tokenizer.json").exists():
        tokenizer = load_tokenizer(directory)
    else:
        tokenizer, is_new = own_tokenizer(data, recipe.model["vocab_size"]), True
    if len(tokenizer) > recipe.model["vocab_size"]:
        source = data.source if is_prepared(data.source) else data.tokenizer
        raise ValueError(
            f"model.vocab_size is {recipe.model['vocab_size']}, but the tokenizer {source!r} has "
            f"{len(tokenizer)} tokens."
        )
    blocks = training_blocks(data, tokenizer, seed=recipe.training.seed, workers=recipe.training.workers)
    evaluation = evaluation_blocks(data, tokenizer) if recipe.training.eval_every else None
    collator = collate_isolated if data.isolate else default_data_collator
    return RunData(blocks, evaluation, collator, tokenizer, is_new)
