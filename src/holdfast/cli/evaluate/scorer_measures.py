"""What `holdfast evaluate scorers` measures: recall beyond the window, RULER's needles in one pass, or perplexity."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.cli.common import read_task
from holdfast.cli.errors import UsageError, usage_errors
from holdfast.cli.evaluate.common import read_text_models, refuse_lengths, refuse_unknown_tokens
from holdfast.cli.evaluate.perplexity import TextBlocks
from holdfast.settings import suggest

if TYPE_CHECKING:
    from holdfast.data.needle import NeedleTask
    from holdfast.data.ruler import Essays, RulerSample
    from holdfast.data.token_bytes import TokenBytes

BEYOND = "beyond the window"
"""What stands in the place of a task's name where models are asked for their own."""
NEW_TOKENS = 48
"""Of a sample of RULER's tasks, left free for the answer: a UUID, byte by byte, takes 37."""

Measure = tuple[Callable[[Any], dict[str, Any]], dict[str, Any]]
"""What measures a model, as plain values by task (of text by the name ''), and what these follow from."""


def own_task_measures(
    directories: Sequence[Path], *, samples: int, seed: int, dtype: str, beyond: bool
) -> dict[Path, Measure]:
    """Of the models' own needle tasks: recall beyond the window.

    Raises:
        UsageError: if one has none, or one that is longer than it was told.
    """
    try:
        tasks = {directory: read_task(directory) for directory in directories}
    except UsageError as error:
        raise UsageError(f"{error} Give --data TEXT for models of text.") from error
    for directory, task in tasks.items():
        refuse_lengths([directory], task.length, beyond)
    drawn = {"samples": samples, "seed": seed}
    return {
        directory: (
            functools.partial(_recall, directory, task, **drawn),
            {"task": asdict(task), **drawn, "dtype": dtype},
        )
        for directory, task in tasks.items()
    }


def one_pass_measures(
    directories: Sequence[Path],
    names: Sequence[str],
    *,
    length: int,
    samples: int,
    essays: Essays | None,
    seed: int,
    dtype: str,
) -> dict[Path, Measure]:
    """Of RULER's tasks, at depths from one end of the haystack to the other.

    Raises:
        UsageError: if a task is unknown or asks for several values, or a model or a length does not fit.
    """
    from holdfast.data.ruler import RULER_TASKS, RulerSampler
    from holdfast.evaluation.forced import answer_tokens

    if unknown := [task for task in names if task not in RULER_TASKS]:
        raise UsageError(f"There is no task {unknown[0]!r}{suggest(unknown[0], RULER_TASKS)}.")
    depths = [100 * (index + 0.5) / samples for index in range(samples)]
    given = {"length": length, "essays": None if essays is None else essays.sha256, "seed": seed, "dtype": dtype}
    measures: dict[Path, Measure] = {}
    for directory, tokenizer in read_text_models(directories).items():
        asked: dict[str, list[RulerSample]] = {}
        for task in names:
            with usage_errors():
                sampler = RulerSampler(
                    RULER_TASKS[task], tokenizer, length, essays=essays, new_tokens=NEW_TOKENS, seed=seed
                )
                asked[task] = [sampler.sample(depth, index) for index, depth in enumerate(depths)]
        with usage_errors():
            samples_of = [sample for of_task in asked.values() for sample in of_task]
            texts = [[*sample.ids, *answer_tokens(tokenizer, sample)] for sample in samples_of]
        refuse_unknown_tokens(texts, tokenizer, directory)
        measures[directory] = (
            functools.partial(_found, tokenizer, asked),
            {"tasks": list(names), "samples": samples, **given},
        )
    return measures


def text_measures(directories: Sequence[Path], text: TextBlocks, *, seed: int, dtype: str) -> dict[Path, Measure]:
    """Of text: perplexity.

    Raises:
        UsageError: if a model cannot read it, or the models have several tokenizers: the mean of perplexities of
            different tokens is that of nothing.
    """
    from holdfast.data.token_bytes import TokenBytes
    from holdfast.data.tokenizers import fingerprint
    from holdfast.evaluation.perplexity import block_digest

    tokenizers = read_text_models(directories, english=False)
    kinds = {directory: fingerprint(tokenizer) for directory, tokenizer in tokenizers.items()}
    if other := [directory for directory in directories if kinds[directory] != kinds[directories[0]]]:
        raise UsageError(
            f"{other[0]} has another tokenizer than {directories[0]}, and perplexities of different tokens have no "
            "mean; give models of one recipe."
        )
    measures: dict[Path, Measure] = {}
    for directory, tokenizer in tokenizers.items():
        packed = text.read(tokenizer, directory)
        blocks = [packed[index] for index in range(min(len(packed), text.max_blocks or len(packed)))]
        digests = [block_digest(block) for block in blocks]
        determining = {"blocks": digests, "by_block": True, "seed": seed, "dtype": dtype}
        measures[directory] = (functools.partial(_perplexity, blocks, TokenBytes.of(tokenizer)), determining)
    return measures


def _recall(directory: Path, task: NeedleTask, model: Any, *, samples: int, seed: int) -> dict[str, Any]:
    from holdfast.evaluation.needle import evaluate_needle
    from holdfast.evaluation.sample_log import SampleLog
    from holdfast.evaluation.scorer_results import SampleAnswers

    log = SampleLog(None, {})
    evaluate_needle(model, task, samples=samples, seed=seed, log=log, progress=False)
    asked, right = [], []
    for index in range(samples):
        record = log.records[str(index)]
        far = [
            correct
            for distance, correct in zip(record["distance"], record["correct"], strict=True)
            if distance > task.window
        ]
        asked.append(len(far))
        right.append(sum(far))
    if not any(asked):
        raise UsageError(f"{directory}: its task asks nothing beyond its window of {task.window} tokens.")
    drawn = _digest({"task": asdict(task), "samples": samples, "seed": seed})
    return {BEYOND: SampleAnswers(drawn, tuple(asked), tuple(right)).to_dict()}


def _found(tokenizer: Any, asked: Mapping[str, Sequence[RulerSample]], model: Any) -> dict[str, Any]:
    from holdfast.evaluation.forced import ask_in_one_pass
    from holdfast.evaluation.scorer_results import SampleAnswers

    found = {}
    for task, samples in asked.items():
        right = tuple(int(each) for each in ask_in_one_pass(model, tokenizer, samples))
        drawn = _digest([[list(sample.ids), list(sample.answers)] for sample in samples])
        found[task] = SampleAnswers(drawn, (1,) * len(right), right).to_dict()
    return found


def _perplexity(blocks: Sequence[dict[str, Any]], sizes: TokenBytes | None, model: Any) -> dict[str, Any]:
    from holdfast.evaluation.perplexity import evaluate_perplexity

    batch_size = max(1, min(8, 16_384 // len(blocks[0]["input_ids"])))
    result = evaluate_perplexity(
        model, blocks, batch_size=batch_size, position_bins=1, token_bytes=sizes, progress=False
    )
    return {"": result.to_dict()}


def _digest(values: Any) -> str:
    """A name that other samples do not have."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
