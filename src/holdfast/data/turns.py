"""Conversations of several turns: each tells facts and asks for some of this turn's or of earlier ones.

    turn 0: facts, noise, a question, the model's answer, a question, its answer
    turn 1: new facts, noise, a question about a fact of turn 0 or 1, …

No fact is asked for twice, so an answer stands nowhere but where the fact was told. What is read before an answer is
due is one `Question`; the answers are the model's own and stay in the conversation.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from holdfast.data.key_words import ADJECTIVES, NOUNS
from holdfast.data.needle import NeedleTask
from holdfast.data.ruler import NEEDLE, NOISE, Essays, draw, units_that_fit

__all__ = ["NeedleTurns", "Question", "TextTurns", "TurnPlan", "TurnScript"]

INTRODUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers."
)
ASKED = "What is the special magic number for {key}? The special magic number for {key} is"
LINE_BREAK = "\n"


@dataclass(frozen=True)
class Question:
    """What is read from the last answer to the next.

    Attributes:
        told: tokens of new facts and what stands between them; empty where the turn has told all before.
        asked: tokens of the question.
        key: what is asked for.
        expected: the answer.
        turn: the turn it is asked in, from 0.
        back: turns between the one that told the answer and this one.
    """

    told: tuple[int, ...]
    asked: tuple[int, ...]
    key: str
    expected: str
    turn: int
    back: int


@dataclass(frozen=True, kw_only=True)
class TurnPlan:
    """How much is told and asked.

    Args:
        turns: turns of a conversation.
        facts: facts that each turn tells.
        questions: questions at the end of each turn; at most `facts`, so that something is always left to ask.

    Raises:
        ValueError: a count is out of range.
    """

    turns: int = 8
    facts: int = 4
    questions: int = 2

    def __post_init__(self) -> None:
        if self.turns < 1 or not 1 <= self.questions <= self.facts:
            raise ValueError(
                f"turns is {self.turns}, facts is {self.facts}, questions is {self.questions}; "
                "give at least 1 of each, and no more questions than facts."
            )

    def asked(self, rng: random.Random) -> list[list[tuple[int, int]]]:
        """For each turn the facts that it asks for, as (turn, number in the turn).

        Questions far back can be asked in few turns, so those come first where they can: the last turn chooses first,
        numbers of turns back that have been rare so far are likelier, and enough facts are left for the turns before.
        """
        left = [self.facts] * self.turns
        times = [0] * self.turns  # that each number of turns back has been asked
        chosen: list[list[int]] = []
        for turn in reversed(range(self.turns)):
            picked = []
            for number in range(self.questions):
                due = self.questions - number - 1  # in this turn after this question
                backs = [back for back in range(turn + 1) if self._can_take(left, turn - back, turn, due)]
                weights = [4.0 ** -times[back] / (self.turns - back) for back in backs]
                (back,) = rng.choices(backs, weights)
                times[back] += 1
                left[turn - back] -= 1
                picked.append(turn - back)
            chosen.insert(0, rng.sample(picked, len(picked)))
        order = [rng.sample(range(self.facts), self.facts) for _ in range(self.turns)]
        return [[(told, order[told].pop()) for told in picked] for picked in chosen]

    def _can_take(self, left: list[int], told: int, turn: int, due: int) -> bool:
        """Whether a fact of turn `told` can be asked for in `turn` such that enough are left for all before."""
        needed = [self.questions * (earlier + 1) for earlier in range(turn)] + [self.questions * turn + due]
        kept = list(itertools.accumulate(left[: turn + 1]))
        return left[told] > 0 and all(kept[later] - 1 >= needed[later] for later in range(told, turn + 1))


class TurnScript(Protocol):
    """What `holdfast.evaluation.turns.evaluate_turns` asks of a kind of conversation.

    Attributes:
        length: tokens of a conversation at the most, answers included.
        vocab_size: token ids that it may use.
        new_tokens: tokens of an answer at the most.
        asides: every question is asked aside: the conversation goes on as if it had not been (see
            `Conversation.aside`), so neither questions nor answers stand between a fact and a later question.
        tokenizer: of text, whose answers end at a line break; None where answers are no text.
    """

    length: int
    vocab_size: int
    new_tokens: int
    asides: bool
    tokenizer: Any

    def conversation(self, seed: int, index: int) -> list[Question]:
        """Conversation number `index`; the same whenever it is asked for."""

    def describe(self, ids: Sequence[int]) -> str:
        """An answer in readable form."""

    def right(self, expected: str, given: str) -> bool:
        """Whether an answer is right."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that, with the seed, the conversations follow from."""


class NeedleTurns:
    """Conversations in the tokens of the needle task, for models that were trained on it.

        bos · k7 v3 · k2 v9 ? k2 <v9> k7 <v3>  · k5 v1 k4 v6 · ? k5 <v1> …

    Training has questions at the end only; that noise and new pairs follow answers is new to such a model. With
    `asides`, what it reads before a question is as in training:

        bos · k7 v3 · k2 v9 (? k2 <v9>) (? k7 <v3>) · k5 v1 k4 v6 · (? k5 <v1>) …

    Args:
        plan: turns, pairs told and pairs asked for.
        task: whose tokens are used; `num_keys` must be enough for all facts of a conversation.
        turn_length: tokens of a turn, questions and answers included.
        asides: see `TurnScript`.

    Raises:
        ValueError: the facts do not fit in a turn, or there are too few keys.
    """

    new_tokens = 1
    tokenizer = None

    def __init__(self, plan: TurnPlan, task: NeedleTask, turn_length: int, *, asides: bool = False) -> None:
        shortest = 2 * plan.facts + 1 + 2 * plan.questions
        if turn_length < shortest:
            raise ValueError(
                f"a turn has {turn_length} tokens; {plan.facts} facts and {plan.questions} questions need {shortest}."
            )
        if task.num_keys < plan.turns * plan.facts:
            raise ValueError(
                f"{plan.turns} turns of {plan.facts} facts need {plan.turns * plan.facts} keys, "
                f"the task has {task.num_keys}; give fewer turns or facts."
            )
        self.plan = plan
        self.task = task
        self.turn_length = turn_length
        self.asides = asides
        self.length = 1 + plan.turns * turn_length
        self.vocab_size = task.vocab_size

    def conversation(self, seed: int, index: int) -> list[Question]:
        """See `TurnScript.conversation`."""
        task, plan = self.task, self.plan
        rng = random.Random(f"{seed}/{index}")
        keys = [task.first_key_id + key for key in rng.sample(range(task.num_keys), plan.turns * plan.facts)]
        values = [task.first_value_id + rng.randrange(task.num_values) for _ in keys]
        noise = self.turn_length - 2 * plan.facts - 1 - 2 * plan.questions
        questions = []
        for turn, asked in enumerate(plan.asked(rng)):
            told = range(turn * plan.facts, (turn + 1) * plan.facts)
            spans = [[keys[fact], values[fact]] for fact in told]
            spans += [[task.first_noise_id + rng.randrange(task.num_noise)] for _ in range(noise)]
            rng.shuffle(spans)
            passage = [task.bos_token_id] * (turn == 0) + [token for span in spans for token in span]
            marker = [task.query_token_id]
            for earlier, number in asked:
                fact = earlier * plan.facts + number
                key, value = (self.describe([token]) for token in (keys[fact], values[fact]))
                questions.append(Question(tuple(passage), (*marker, keys[fact]), key, value, turn, turn - earlier))
                passage = []
                marker = marker if self.asides else []  # one marker begins a turn's questions
        return questions

    def describe(self, ids: Sequence[int]) -> str:
        """As `NeedleTask.describe` writes it; ids beyond the task's, which a larger model may say, by number."""
        return " ".join(self.task.describe([i]) if i < self.task.vocab_size else f"<{i}>" for i in ids)

    def right(self, expected: str, given: str) -> bool:
        """The one token is the value."""
        return given == expected

    def to_dict(self) -> dict[str, Any]:
        """See `TurnScript.to_dict`."""
        own = {"turn_length": self.turn_length, "asides": self.asides}
        return {"kind": "needle", **asdict(self.plan), **own, "task": asdict(self.task)}


class TextTurns:
    """Conversations in text: RULER's sentences about magic numbers in noise or essays, and questions to complete.

    Args:
        plan: turns, facts told and facts asked for.
        tokenizer: of the model.
        turn_length: tokens of a turn at the most, questions and room for the answers included; the introduction of the
            first is made up for by all.
        essays: what stands between the facts, going on from turn to turn; None: RULER's noise.
        new_tokens: tokens of an answer at the most; it also ends at a line break.
        asides: see `TurnScript`.

    Raises:
        ValueError: the facts and questions do not fit in a turn.
    """

    def __init__(
        self,
        plan: TurnPlan,
        tokenizer: Any,
        turn_length: int,
        *,
        essays: Essays | None = None,
        new_tokens: int = 16,
        asides: bool = False,
    ) -> None:
        self.plan = plan
        self.tokenizer = tokenizer
        self.turn_length = turn_length
        self.length = plan.turns * turn_length
        self.vocab_size = len(tokenizer)
        self.new_tokens = new_tokens
        self.asides = asides
        self._essays = Essays([NOISE]) if essays is None else essays
        longest = "-".join(max(words, key=self._tokens) for words in (ADJECTIVES, NOUNS))
        example = [(longest, "1234567")] * plan.facts
        asked = f"{LINE_BREAK}{ASKED.format(key=longest)}"
        introduction = self._tokens(INTRODUCTION) / plan.turns  # all turns give way to it
        room = turn_length - plan.questions * (self._tokens(asked) + new_tokens) - math.ceil(introduction)

        def tokens(words: int) -> int:
            return self._tokens(self._passage(example, 1, words, random.Random(0)))

        self._words, _ = units_that_fit(tokens, room, 32)
        if room < tokens(0):
            raise ValueError(
                f"a turn has {turn_length} tokens; {plan.facts} facts and {plan.questions} questions with answers "
                f"need {turn_length - room + tokens(0)}."
            )

    def conversation(self, seed: int, index: int) -> list[Question]:
        """See `TurnScript.conversation`."""
        plan = self.plan
        rng = random.Random(f"{seed}/{index}")
        keys: list[str] = []
        for _ in range(plan.turns * plan.facts):
            keys.append(draw("words", rng, keys))
        facts = [(key, draw("numbers", rng)) for key in keys]
        questions: list[Question] = []
        for turn, asked in enumerate(plan.asked(rng)):
            told = facts[turn * plan.facts : (turn + 1) * plan.facts]
            text = self._passage(told, turn, self._words, rng)
            passage = tuple(self.tokenizer(text, add_special_tokens=turn == 0).input_ids)
            for earlier, number in asked:
                key, value = facts[earlier * plan.facts + number]
                ids = self.tokenizer(f"{LINE_BREAK}{ASKED.format(key=key)}", add_special_tokens=False).input_ids
                questions.append(Question(passage, tuple(ids), key, value, turn, turn - earlier))
                passage = ()
        return questions

    def describe(self, ids: Sequence[int]) -> str:
        """The text of the tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def right(self, expected: str, given: str) -> bool:
        """The number stands in the answer."""
        return expected in given

    def to_dict(self) -> dict[str, Any]:
        """See `TurnScript.to_dict`."""
        own = {name: getattr(self, name) for name in ("turn_length", "new_tokens", "asides")}
        return {"kind": "text", **asdict(self.plan), **own, "haystack_sha256": self._essays.sha256}

    def _passage(self, facts: Sequence[tuple[str, str]], turn: int, words: int, rng: random.Random) -> str:
        """Facts at random places of the turn's words."""
        sentences = self._essays.between(turn * words, (turn + 1) * words)
        for key, value in facts:
            needle = NEEDLE.format(values="numbers", key=key, value=value)
            sentences.insert(rng.randrange(len(sentences) + 1), needle)
        return (INTRODUCTION if turn == 0 else "") + LINE_BREAK + " ".join(sentences)

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer(text).input_ids)
