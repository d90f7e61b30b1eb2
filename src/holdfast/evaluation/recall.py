"""How often the answer to a question about a real text stands in what a model writes next."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from holdfast.data.progress import track
from holdfast.data.recall import RecallSample
from holdfast.evaluation.arguments import check_kind, check_log, check_model, check_tokenizer_kind
from holdfast.evaluation.conversation import Conversation, first_line, line_break_tokens
from holdfast.evaluation.inference import evaluating
from holdfast.evaluation.intervals import Share, effective_count
from holdfast.evaluation.limits import check_length, check_texts, check_tokenizer
from holdfast.evaluation.sample_log import SampleLog

__all__ = ["RecallResult", "contains_an_answer", "evaluate_recall"]


@dataclasses.dataclass(frozen=True)
class RecallResult:
    """Result of `evaluate_recall`.

    Attributes:
        contains: samples whose continuation, up to its first line break, contains an answer. Its interval takes the
            questions of one passage together, where the samples say which these are.
        tokens: mean length of the prompts.
        longest: longest prompt in tokens.
        resumed: answers that came from the log.
    """

    contains: Share
    tokens: float
    longest: int
    resumed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self) | {"contains": self.contains.to_dict()}


def evaluate_recall(
    model: Any,
    tokenizer: Any,
    samples: Sequence[RecallSample],
    *,
    new_tokens: int = 48,
    log: SampleLog | None = None,
    batch_size: int = 8,
    beyond: bool = False,
    progress: bool = True,
) -> RecallResult:
    """Let a model complete prompts, greedily, one line each, in batches with left padding.

    Args:
        model: a `HybridForCausalLM`.
        tokenizer: its tokenizer.
        samples: prompts and answers, such as those of `holdfast.data.recall.load_recall`.
        new_tokens: tokens of a continuation at the most.
        log: where continuations are kept and, after an interruption, found again; None keeps none.
        batch_size: prompts read side by side; those of like lengths, so that few pads are needed.
        beyond: allow prompts beyond the model's `max_position_embeddings`.
        progress: show a progress bar when standard error is a terminal.

    Raises:
        TypeError: an argument is no model, no tokenizer, no samples or no log.
        ValueError: there is no sample, a count is below 1, or the tokenizer or a prompt does not fit the model.
    """
    check_model(model, hybrid=True)
    check_tokenizer_kind(tokenizer)
    check_log(log)
    _check_samples(samples)
    if not samples or min(new_tokens, batch_size) < 1:
        raise ValueError("give at least one sample, and new_tokens and batch_size of at least 1.")
    check_tokenizer(tokenizer, model.config)
    ids = [tokenizer(sample.prompt).input_ids for sample in samples]
    check_texts(ids, tokenizer, model.config)
    lengths = [len(row) for row in ids]
    check_length(model.config, max(lengths) + new_tokens, beyond=beyond)
    log = SampleLog(None, {}) if log is None else log
    names = [_name(index, sample) for index, sample in enumerate(samples)]
    waiting = sorted((i for i, name in enumerate(names) if name not in log.records), key=lambda i: -lengths[i])
    stop = line_break_tokens(tokenizer) if waiting else frozenset()
    batches = [waiting[start : start + batch_size] for start in range(0, len(waiting), batch_size)]
    with evaluating(model):
        for batch in track(batches, "recall", progress=progress):
            conversation = Conversation(model)
            conversation.read([ids[index] for index in batch])
            answers = conversation.answer(new_tokens, stop)
            ended = [[*ids, *end] for ids, end in zip(answers, conversation.ended_by, strict=True)]
            given = [first_line(text) for text in tokenizer.batch_decode(ended, skip_special_tokens=True)]
            log.append(
                {
                    names[index]: {
                        "given": text,
                        "answers": list(samples[index].answers),
                        "contains": contains_an_answer(text, samples[index].answers),
                        "tokens": lengths[index],
                    }
                    for index, text in zip(batch, given, strict=True)
                }
            )
    share = _share(samples, [log.records[name]["contains"] for name in names])
    return RecallResult(share, sum(lengths) / len(lengths), max(lengths), len(names) - len(waiting))


def _check_samples(samples: Any) -> None:
    wanted = "RecallSamples, such as those of holdfast.data.recall.load_recall('squad', path)"
    check_kind("samples", samples, Sequence, f"a list of {wanted}")
    for index, sample in enumerate(samples):
        check_kind(f"sample {index}", sample, RecallSample, wanted)


def contains_an_answer(given: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in `given`, letter case aside."""
    return any(answer.lower() in given.lower() for answer in answers)


def _share(samples: Sequence[RecallSample], right: Sequence[bool]) -> Share:
    """A sample without a passage is one by itself."""
    passages = [-1 - index if sample.passage is None else sample.passage for index, sample in enumerate(samples)]
    return Share(len(right), sum(right), effective=effective_count(passages, right))


def _name(index: int, sample: RecallSample) -> str:
    """The place of a sample in its data, with a hash: other data must not be taken for these."""
    return f"{index}/{hashlib.sha256(repr(sample).encode()).hexdigest()[:12]}"
