"""What a model still knows several turns later, with a cache that carries all turns and reads nothing twice."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from holdfast.data.progress import track
from holdfast.data.turns import Question, TurnScript
from holdfast.evaluation.arguments import check_kind, check_log, check_model
from holdfast.evaluation.conversation import Conversation, first_line, line_break_tokens
from holdfast.evaluation.inference import evaluating
from holdfast.evaluation.intervals import Share, draw_shares, effective_count
from holdfast.evaluation.limits import check_length, check_texts, check_tokenizer
from holdfast.evaluation.sample_log import SampleLog
from holdfast.pictures import picture

__all__ = ["TurnsResult", "evaluate_turns", "plot_turns", "told_texts"]


@dataclasses.dataclass(frozen=True)
class TurnsResult:
    """Result of `evaluate_turns`.

    Attributes:
        total: all questions.
        by_back: questions by the number of turns between the one that told the fact and the one that asks for it.
        by_turn: questions by the turn that asks, from 0.
        conversations: how many were held.
        tokens_said: mean length of a conversation in tokens, answers included; what was said aside does not count.
        tokens_read: mean number of these that the model was called with: all, but for the last token answered where
            nothing follows it.
        cache_bytes: of one conversation at its end.
        resumed: conversations that came from the log.
    """

    total: Share
    by_back: Mapping[int, Share]
    by_turn: Mapping[int, Share]
    conversations: int
    tokens_said: float
    tokens_read: float
    cache_bytes: float
    resumed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "total": self.total.to_dict(),
            "by_back": [{"back": back, **share.to_dict()} for back, share in self.by_back.items()],
            "by_turn": [{"turn": turn, **share.to_dict()} for turn, share in self.by_turn.items()],
        }


def evaluate_turns(
    model: Any,
    script: TurnScript,
    *,
    conversations: int = 64,
    seed: int = 0,
    log: SampleLog | None = None,
    batch_size: int = 16,
    beyond: bool = False,
    progress: bool = True,
) -> TurnsResult:
    """Hold conversations, greedily, several side by side; the model's answers stay in them, right or wrong.

    Args:
        model: a `HybridForCausalLM`.
        script: what is told and asked: `NeedleTurns` or `TextTurns`.
        conversations: how many to hold.
        seed: of what is told and asked.
        log: where answers are kept and, after an interruption, found again; None keeps none.
        batch_size: conversations held side by side.
        beyond: allow conversations beyond the model's `max_position_embeddings`.
        progress: show a progress bar when standard error is a terminal.

    Raises:
        TypeError: an argument is no model, no script or no log.
        ValueError: a count is below 1, or the conversation or its tokenizer does not fit the model.
        RuntimeError: the cache has not seen exactly the tokens that were said, each once.
    """
    check_model(model, hybrid=True)
    check_kind("script", script, TurnScript, "NeedleTurns(…) or TextTurns(…)")
    check_log(log)
    if min(conversations, batch_size) < 1:
        raise ValueError(f"conversations is {conversations}, batch_size is {batch_size}; give at least 1 of each.")
    if script.tokenizer is not None:
        check_tokenizer(script.tokenizer, model.config)
    elif model.config.vocab_size < script.vocab_size:
        raise ValueError(f"the model has {model.config.vocab_size} token ids, the conversation {script.vocab_size}.")
    check_length(model.config, script.length, beyond=beyond)
    log = SampleLog(None, {}) if log is None else log
    waiting = [index for index in range(conversations) if str(index) not in log.records]
    if script.tokenizer is not None:
        check_texts(told_texts(script, seed, waiting), script.tokenizer, model.config)
    stop = frozenset() if script.tokenizer is None else line_break_tokens(script.tokenizer)
    batches = [waiting[start : start + batch_size] for start in range(0, len(waiting), batch_size)]
    with evaluating(model):
        for batch in track(batches, "turns", progress=progress):
            records = _held(model, script, [script.conversation(seed, index) for index in batch], stop)
            log.append({str(index): record for index, record in zip(batch, records, strict=True)})
    records = [log.records[str(index)] for index in range(conversations)]
    return _summary(records, resumed=conversations - len(waiting))


def plot_turns(results: Mapping[str, TurnsResult], path: str | Path) -> Path:
    """Draw accuracy by turns back, one line per result with its 95 % interval.

    Args:
        results: results by the name to print in the legend.
        path: file to write; its ending gives the format (png, svg, pdf). Replaced only when the picture is complete.

    Raises:
        ValueError: `results` is empty.
    """
    if not results:
        raise ValueError("results is empty; give at least one result to plot.")
    with picture(path, (7, 4)) as figure:
        axes = figure.add_subplot()
        for name, result in results.items():
            draw_shares(axes, list(result.by_back), list(result.by_back.values()), name)
        axes.set_ylim(-0.02, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("turns between fact and question")
        axes.set_ylabel("accuracy")
        axes.legend(fontsize="small")
    return Path(path)


def told_texts(script: TurnScript, seed: int, conversations: Iterable[int]) -> Iterator[Sequence[int]]:
    """The tokens of all that is told and asked."""
    for index in conversations:
        for question in script.conversation(seed, index):
            yield from (question.told, question.asked)


def _held(
    model: Any, script: TurnScript, questions: Sequence[Sequence[Question]], stop: frozenset[int]
) -> list[dict[str, Any]]:
    """Records of conversations [B][questions] that were held side by side."""
    talk = Conversation(model)
    answered: list[list[dict[str, Any]]] = [[] for _ in questions]
    for asked in zip(*questions, strict=True):
        if asked[0].told:
            talk.read([question.told for question in asked])
        with talk.aside() if script.asides else contextlib.nullcontext():
            talk.read([question.asked for question in asked])
            answers = talk.answer(script.new_tokens, stop)
        for row, question, ids, end in zip(answered, asked, answers, talk.ended_by, strict=True):
            given = first_line(script.describe([*ids, *end]))
            shown = {name: getattr(question, name) for name in ("turn", "back", "key", "expected")}
            row.append({**shown, "given": given, "right": script.right(question.expected, given)})
    assert talk.cache.seen is not None
    if not (talk.cache.seen.cpu() == talk.tokens_read).all() or (talk.tokens_read > talk.tokens_said).any():
        raise RuntimeError("the cache has seen other tokens than were said, each once; please report this.")
    return [
        {
            "questions": row,
            "tokens_said": int(said),
            "tokens_read": int(read),
            "cache_bytes": talk.cache.nbytes / len(answered),
        }
        for row, said, read in zip(answered, talk.tokens_said, talk.tokens_read, strict=True)
    ]


def _summary(records: Sequence[Mapping[str, Any]], *, resumed: int) -> TurnsResult:
    questions = [question | {"of": number} for number, record in enumerate(records) for question in record["questions"]]

    def share(selected: list[dict[str, Any]]) -> Share:
        right = [question["right"] for question in selected]
        effective = effective_count([question["of"] for question in selected], right)
        return Share(len(selected), sum(right), effective=effective)

    def by(name: str) -> dict[int, Share]:
        values = sorted({question[name] for question in questions})
        return {value: share([question for question in questions if question[name] == value]) for value in values}

    means = {
        name: float(np.mean([record[name] for record in records]))
        for name in ("tokens_said", "tokens_read", "cache_bytes")
    }
    return TurnsResult(
        total=share(questions),
        by_back=by("back"),
        by_turn=by("turn"),
        conversations=len(records),
        resumed=resumed,
        **means,
    )
