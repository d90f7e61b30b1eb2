"""Conversations: every token is read once, whatever stands beside it, and the answers are those of a fresh reading."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch

from holdfast import HybridForCausalLM
from holdfast.data.text import byte_tokenizer, train_tokenizer
from holdfast.evaluation import conversation
from holdfast.evaluation.conversation import Conversation, first_line, line_break_tokens
from holdfast.mixers import MIXERS

Model = Callable[..., HybridForCausalLM]
LENGTHS = ((7, 1, 23), (2, 30, 4), (1, 1, 1), (12, 3, 19))  # of each turn in each of three conversations
STOP = range(0, 100, 9)  # ends some answers early


def random_turns(seed: int = 0) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(100, (n,), generator=generator).tolist() for n in lengths] for lengths in LENGTHS]


def answer_alone(model: HybridForCausalLM, ids: list[int], max_new_tokens: int, stop: Collection[int]) -> list[int]:
    """The answer found by reading all that was said again for every token."""
    answer: list[int] = []
    while len(answer) < max_new_tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + answer]), use_cache=False).logits[0, -1].argmax())
        if token in stop:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("at_once", [2048, 5])
@pytest.mark.parametrize("mixer", MIXERS)
def test_turns_side_by_side_are_fresh_readings_and_nothing_is_read_twice(
    small_model: Model, monkeypatch: pytest.MonkeyPatch, mixer: str, at_once: int
) -> None:
    monkeypatch.setattr(conversation, "COLUMNS_AT_ONCE", at_once)
    model = small_model("gated_deltanet", mixer)
    calls: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        mask = kwargs["attention_mask"]
        calls.append(args[0].numel() if mask is None else int(mask.sum()))

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    talk = Conversation(model)
    turns = random_turns()
    answers = []
    for rows in turns:
        talk.read(rows)
        answers.append(talk.answer(5, STOP))
    hook.remove()

    said: list[list[int]] = [[], [], []]
    for rows, answered in zip(turns, answers, strict=True):
        for text, row, answer in zip(said, rows, answered, strict=True):
            text += row
            assert answer == answer_alone(model, text, 5, STOP)
            text += answer
    assert {len(answer) for answered in answers for answer in answered} > {0, 5}
    assert talk.tokens_said.tolist() == [len(text) for text in said]
    assert sum(calls) == int(talk.tokens_read.sum())
    assert talk.cache.seen.tolist() == talk.tokens_read.tolist()
    assert all(0 <= behind <= 1 for behind in (talk.tokens_said - talk.tokens_read).tolist())


def test_a_batch_with_pads_answers_as_generate_does(small_model: Model) -> None:
    model = small_model("gated_deltanet", "learned_eviction")
    rows = random_turns()[0]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    talk = Conversation(model)
    talk.read(rows)
    assert talk.answer(12) == generated[:, width:].tolist()


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_is_said_aside_is_forgotten(small_model: Model, mixer: str) -> None:
    model = small_model("gated_deltanet", mixer)
    turns = random_turns(1)
    talk, plain = Conversation(model), Conversation(model)
    for speaker in (talk, plain):
        speaker.read(turns[0])
        speaker.answer(3)
    with talk.aside():
        talk.read(turns[1])
        aside = talk.answer(4)
    assert talk.tokens_said.tolist() == plain.tokens_said.tolist()
    for speaker in (talk, plain):
        speaker.read(turns[3])
    assert talk.tokens_read.tolist() == talk.cache.seen.tolist() == plain.tokens_read.tolist()
    torch.testing.assert_close(talk._logits, plain._logits, rtol=0, atol=0)
    assert talk.answer(5) == plain.answer(5)
    again = Conversation(model)
    again.read(turns[0])
    again.answer(3)
    again.read(turns[1])
    assert again.answer(4) == aside


@pytest.mark.parametrize("mixer", MIXERS)
def test_bf16(small_model: Model, mixer: str) -> None:
    model = small_model("gated_deltanet", mixer).bfloat16()
    talk, single = Conversation(model), Conversation(model)
    rows = random_turns(2)[3]
    talk.read(rows)
    single.read(rows[:1])
    torch.testing.assert_close(talk._logits[:1], single._logits, rtol=0.05, atol=0.05)  # beside others, with pads
    assert all(len(answer) == 4 for answer in talk.answer(4))
    assert all(layer.nbytes > 0 for layer in talk.cache.layers)


def test_the_token_that_ended_an_answer_is_known(small_model: Model) -> None:
    model = small_model("gated_deltanet")
    rows = random_turns()[0]
    free, talk = Conversation(model), Conversation(model)
    free.read(rows)
    talk.read(rows)
    whole = free.answer(8)
    assert free.ended_by == [[], [], []]
    stop = {whole[0][3]}
    for answer, end, unstopped in zip(talk.answer(8, stop), talk.ended_by, whole, strict=True):
        assert stop.isdisjoint(answer)
        assert answer + end == unstopped[: len(answer) + len(end)]
        assert set(end) == stop if len(answer) < 8 else end == []
    assert first_line("7.\nWhat") == "7."
    assert first_line("7.") == "7."


def test_wrong_use_is_refused(small_model: Model) -> None:
    talk = Conversation(small_model("gated_deltanet"))
    with pytest.raises(ValueError, match="nothing to answer; read the next turn first"):
        talk.answer(1)
    with pytest.raises(ValueError, match="at least one token to each"):
        talk.read([[1], []])
    talk.read([[1], [2]])
    with pytest.raises(ValueError, match="1 rows for 2 conversations"):
        talk.read([[1]])
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        talk.answer(0)
    talk.answer(2)
    with pytest.raises(ValueError, match="nothing to answer"):
        talk.answer(2)


def test_line_breaks() -> None:
    assert line_break_tokens(byte_tokenizer()) == {10, 258}
    tokenizer = train_tokenizer(["end.\n\nbegin.\n\n" * 50], 300, progress=False)
    breaks = line_break_tokens(tokenizer)
    assert {tokenizer.decode([token]) for token in breaks} > {"\n", "\n\n"}
    assert tokenizer.eos_token_id in breaks
    assert not any("\n" in tokenizer.decode([token]) for token in set(range(len(tokenizer))) - breaks)
