"""`holdfast generate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.table import Table

from holdfast.cli.common import error_console, model_directory, output_console, read_model, read_task
from holdfast.cli.errors import UsageError, usage_errors
from holdfast.cli.parsing import parse
from holdfast.units import format_bytes

DESCRIPTION = """\
Continue a prompt with a trained model, or let it answer the questions of a needle sample. Greedy unless told to sample.
Bytes of cache and tokens per second go to standard error.

examples:
  holdfast generate runs/books-lalte "It was the best of times" --max-new-tokens 200
  holdfast generate runs/books-lalte --sample --temperature 0.8 --top-p 0.95 --seed 1 < prompt.txt
  holdfast generate runs/needle-lalte --needle --seed 3
"""


@dataclass(frozen=True)
class Generate:
    """Continue a prompt."""

    model: tyro.conf.Positional[str]
    """Directory of a trained model, or a model on the hub (OWNER/NAME[@REVISION])."""
    prompt: tyro.conf.Positional[str | None] = None
    """Text to continue; left out: read from standard input."""
    needle: bool = False
    """Draw a sample of the model's needle task and show question, expected and given answers."""
    max_new_tokens: int = 128
    sample: bool = False
    """Draw tokens by their probability instead of taking the likeliest."""
    temperature: float = 1.0
    """Below 1 sharpens the probabilities, above flattens them; with --sample."""
    top_k: int = 0
    """Draw among the likeliest k tokens; 0: all; with --sample."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that make up this probability; with --sample."""
    seed: int = 0
    """Of the sample, and of what is drawn."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens is {self.max_new_tokens}; give at least 1.")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.seed < 0:
            raise UsageError("Give --temperature above 0, --top-p in (0, 1], and --top-k and --seed of 0 or more.")
        if not self.sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise UsageError("--temperature, --top-k and --top-p say how to draw: give --sample too.")


def run(arguments: Sequence[str]) -> None:
    """Parse and generate."""
    settings = parse(Generate, arguments or ["--help"], prog="holdfast generate", description=DESCRIPTION)
    directory = model_directory(settings.model)
    if settings.needle:
        _answer_needles(settings, directory)
    else:
        _continue_text(settings, directory)


def _sampling(settings: Generate) -> dict[str, Any]:
    import torch

    torch.manual_seed(settings.seed)
    if not settings.sample:
        return {"do_sample": False}
    drawn = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    return {"do_sample": True, **drawn}


def _answer_needles(settings: Generate, directory: Path) -> None:
    if settings.prompt is not None:
        raise UsageError("--needle draws its own prompt; leave PROMPT out.")

    from holdfast.evaluation.answering import answer_questions

    task = read_task(directory)
    model = read_model(directory, settings.dtype)
    dialogue = answer_questions(model, task, seed=settings.seed, **_sampling(settings))
    console = output_console()
    console.print(f"context: {dialogue.prompt}")
    table = Table()
    for heading in ("question", "expected", "given", "", "tokens ago", "window"):
        table.add_column(heading)
    for answer in dialogue.answers:
        mark, place = "✓" if answer.correct else "✗", "within" if answer.distance <= task.window else "beyond"
        table.add_row(answer.question, answer.expected, answer.given, mark, str(answer.distance), place)
    console.print(table)
    console.print(f"{sum(answer.correct for answer in dialogue.answers)} of {len(dialogue.answers)} right")
    _report(dialogue.cache_bytes, dialogue.tokens_per_second)


def _continue_text(settings: Generate, directory: Path) -> None:
    if not (directory / "tokenizer.json").is_file():
        raise UsageError(f"{directory} has no tokenizer.json, so it cannot read text; try --needle.")
    prompt = settings.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError("Give a PROMPT, or text on standard input.")
        prompt = sys.stdin.read()

    from transformers import TextStreamer

    from holdfast.cache import HybridCache
    from holdfast.configuration import HybridConfig
    from holdfast.data.text import load_tokenizer
    from holdfast.evaluation.limits import check_prompts, check_tokens

    tokenizer = load_tokenizer(directory)
    with usage_errors():
        check_prompts(tokenizer, name=str(directory))
        inputs = tokenizer(prompt, return_tensors="pt")
        if not inputs["input_ids"].numel():
            raise UsageError("The prompt is empty; give at least one character.")
        config = HybridConfig.from_pretrained(directory)
        check_tokens(inputs["input_ids"][0].tolist(), tokenizer, config, name=str(directory))
    _remark_length(directory, inputs["input_ids"].shape[1] + settings.max_new_tokens)
    model = read_model(directory, settings.dtype)
    inputs = inputs.to(model.device)
    cache = HybridCache(model.config)
    started = time.perf_counter()
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        past_key_values=cache,
        streamer=TextStreamer(tokenizer),
        max_new_tokens=settings.max_new_tokens,
        **_sampling(settings),
    )
    _report(cache.nbytes, output.shape[1] / (time.perf_counter() - started))


def _remark_length(directory: Path, tokens: int) -> None:
    """Say so where `tokens` are more than the model is known to have been trained on at a time."""
    from holdfast.configuration import HybridConfig

    trained = HybridConfig.get_config_dict(directory)[0].get("max_position_embeddings")
    if trained is not None and tokens > trained:
        error_console().print(
            f"{directory} was trained on {trained:,} tokens at a time, and the prompt with --max-new-tokens makes "
            f"{tokens:,}: quality beyond {trained:,} is not assured.",
            soft_wrap=True,
        )


def _report(cache_bytes: int, tokens_per_second: float) -> None:
    error_console().print(
        f"{format_bytes(cache_bytes)} of cache, {tokens_per_second:,.0f} tokens/s (the prompt included)"
    )
