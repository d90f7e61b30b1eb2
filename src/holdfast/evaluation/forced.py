"""RULER's needles in one pass: whether a model would say the answer, without it being generated.

What works without a cache only, such as another scorer in place of the trained one, can be asked for needles this way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from holdfast.data.ruler import RulerSample
from holdfast.evaluation.inference import evaluating

__all__ = ["answer_tokens", "ask_in_one_pass"]


def ask_in_one_pass(model: Any, tokenizer: Any, samples: Iterable[RulerSample]) -> list[bool]:
    """Which samples a model would answer, going on greedily, by exactly the value asked for.

    The prompt and the answer are read together; the answer is right if each of its tokens is the likeliest after those
    before it. That is stricter than RULER's own score, which finds the answer anywhere in what is generated, so the
    numbers are not to be compared with those of `evaluate_ruler`.

    Args:
        model: a `HybridForCausalLM`; read in eval mode without gradients, and put back in the mode it came in.
        tokenizer: its tokenizer.
        samples: of tasks with one answer, in whatever order.

    Raises:
        ValueError: a sample has several answers, which could be given in any order.

    One pass per sample; memory of the logits of the answer alone.
    """
    right: list[bool] = []
    with evaluating(model):
        for sample in samples:
            tokens = answer_tokens(tokenizer, sample)
            ids = torch.tensor([[*sample.ids, *tokens[:-1]]], device=model.device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(tokens)).logits
            right.append(logits[0].argmax(dim=-1).tolist() == list(tokens))
    return right


def answer_tokens(tokenizer: Any, sample: RulerSample) -> Sequence[int]:
    """The tokens by which the answer of `sample` goes on from its prompt.

    Raises:
        ValueError: there are several answers, or the answer's tokens cannot be told from the prompt's.
    """
    if len(sample.answers) != 1:
        raise ValueError(f"a sample asks for {len(sample.answers)} values; one pass can ask for one only.")
    whole = list(tokenizer(f"{sample.prompt} {sample.answers[0]}").input_ids)
    if (known := len(sample.ids)) < len(whole) and whole[:known] == list(sample.ids):
        return whole[known:]
    raise ValueError("the tokenizer joins the end of the prompt with the answer, so one pass cannot ask for it.")
