"""Needles in one pass: right exactly where greedy generation gives the answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from holdfast.data.ruler import RULER_TASKS, Essays, RulerSample, RulerSampler
from holdfast.data.text import load_tokenizer
from holdfast.evaluation.forced import answer_tokens, ask_in_one_pass

TOKENIZER = load_tokenizer("byte")


class Knowing(nn.Module):
    """Expects the answers that it was told of after their prompts, and byte 0 elsewhere."""

    device = torch.device("cpu")

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.known = [TOKENIZER(text).input_ids for text in texts]

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        assert not use_cache
        assert not torch.is_grad_enabled()
        ids = input_ids[0].tolist()
        logits = torch.zeros(1, len(ids), 300)
        for end in range(1, len(ids) + 1):
            for text in self.known:
                if text[:end] == ids[:end] and len(text) > end:
                    logits[0, end - 1, text[end]] = 1
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


@pytest.fixture
def samples() -> list[RulerSample]:
    sampler = RulerSampler(RULER_TASKS["niah_single_1"], TOKENIZER, 600, new_tokens=16)
    return [sampler.sample(depth, index) for depth in (0, 50) for index in range(3)]


def test_answers_that_would_be_generated_are_right(samples: list[RulerSample]) -> None:
    told = [f"{sample.prompt} {sample.answers[0]}" for sample in samples]
    assert ask_in_one_pass(Knowing(told[:4]), TOKENIZER, samples) == [True] * 4 + [False] * 2
    # Wrong in the last character only, and in the first only.
    wrong = [f"{told[0][:-1]}x", f"{samples[1].prompt} x{samples[1].answers[0][1:]}", told[2]]
    assert ask_in_one_pass(Knowing(wrong), TOKENIZER, samples) == [False, False, True, False, False, False]


def test_a_model_that_trains_goes_on_training(samples: list[RulerSample]) -> None:
    model = Knowing([]).train()
    assert ask_in_one_pass(model, TOKENIZER, samples[:1]) == [False]
    assert model.training


def test_several_answers_and_joined_tokens_are_refused(samples: list[RulerSample]) -> None:
    many = RulerSampler(
        RULER_TASKS["niah_multivalue"],
        TOKENIZER,
        2000,
        new_tokens=16,
        essays=Essays(["It was the best of times. " * 200]),
    )
    with pytest.raises(ValueError, match="asks for 4 values"):
        answer_tokens(TOKENIZER, many.sample(50, 0))

    def joined(text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[len(text)])

    with pytest.raises(ValueError, match="joins the end of the prompt"):
        answer_tokens(joined, samples[0])
