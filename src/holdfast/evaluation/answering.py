"""A model answering the questions of a needle sample through `generate`, as in a conversation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.cache import HybridCache
from holdfast.data.needle import NeedleTask
from holdfast.evaluation.inference import device_of, evaluating

__all__ = ["Answer", "Dialogue", "answer_questions"]


@dataclass(frozen=True)
class Answer:
    """One question: the key asked for, the value that stood in the context, and the token that the model gave.

    `distance` counts the tokens between the question and the value in the context.
    """

    question: str
    expected: str
    given: str
    distance: int

    @property
    def correct(self) -> bool:
        """Whether the model gave the value."""
        return self.given == self.expected


@dataclass(frozen=True)
class Dialogue:
    """Result of `answer_questions`.

    Attributes:
        prompt: what the model reads before the first question, as `NeedleTask.describe` writes it.
        answers: one per question, in the order asked.
        cache_bytes: bytes of the model's memory at the end.
        tokens_per_second: tokens read and written per second, the prompt included.
    """

    prompt: str
    answers: tuple[Answer, ...]
    cache_bytes: int
    tokens_per_second: float


def answer_questions(model: Any, task: NeedleTask, *, seed: int = 0, **generation: Any) -> Dialogue:
    """Draw a sample, then ask one question after the other; the cache carries the conversation.

    Each answer is one call of `model.generate`. The model's own answers stay in the conversation, right or wrong.

    Args:
        model: a `HybridForCausalLM`.
        task: the task; its vocabulary must fit the model's.
        seed: of the sample.
        generation: further arguments of `generate`, such as `do_sample`; greedy by default.

    Raises:
        ValueError: if the model's vocabulary is smaller than the task's.
    """
    if model.config.vocab_size < task.vocab_size:
        raise ValueError(f"the model has {model.config.vocab_size} token ids, the task {task.vocab_size}.")
    sample = task.sample(seed, 1)
    ids = sample["input_ids"].to(device_of(model))
    cache = HybridCache(model.config)
    spoken = ids[:, : task.context_length + 2]
    prompt = task.describe(spoken[0].tolist())
    answers = []
    started = time.perf_counter()
    with evaluating(model):
        for column in sample["distance"][0].nonzero().flatten().tolist():
            spoken = torch.cat([spoken, ids[:, column - 1 : column]], dim=1)
            spoken = model.generate(
                spoken,
                attention_mask=torch.ones_like(spoken),
                past_key_values=cache,
                max_new_tokens=1,
                **{"do_sample": False, **generation},
            )
            question, expected = task.describe(ids[0, column - 1 : column + 1].tolist()).split()
            given = task.describe([int(spoken[0, -1])])
            answers.append(Answer(question, expected, given, int(sample["distance"][0, column])))
    seconds = time.perf_counter() - started
    return Dialogue(prompt, tuple(answers), cache.nbytes, spoken.shape[1] / seconds)
