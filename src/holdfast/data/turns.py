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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from holdfast.data.key_words import ADJECTIVES, NOUNS
from holdfast.data.needle import NeedleTask
from holdfast.data.ruler import NEEDLE, NOISE, Essays, draw, units_that_fit

__all__ = ["NeedleTurns", "Question", "TextTurns", "TurnPlan", "TurnScript", "fitting_plan"]

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


@runtime_checkable
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
        shortest = self.shortest_turn(plan)
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

    @staticmethod
    def shortest_turn(plan: TurnPlan) -> int:
        """Tokens of a turn without noise."""
        return 2 * plan.facts + 1 + 2 * plan.questions

    def conversation(self, seed: int, index: int) -> list[Question]:
        """See `TurnScript.conversation`."""
        task, plan = self.task, self.plan
        rng = random.Random(f"{seed}/{index}")
        keys = [task.first_key_id + key for key in rng.sample(range(task.num_keys), plan.turns * plan.facts)]
        values = [task.first_value_id + rng.randrange(task.num_values) for _ in keys]
        noise = self.turn_length - self.shortest_turn(plan)
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
        turn_length: tokens of a turn at the most: questions, room for the answers, and the introduction of the first
            included.
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
        shortest = self.shortest_turn(plan, tokenizer, new_tokens)
        if turn_length < shortest:
            raise ValueError(
                f"a turn has {turn_length} tokens; {plan.facts} facts and {plan.questions} questions with answers "
                f"need {shortest}."
            )
        facts = _long_facts(plan.facts, tokenizer)
        room = turn_length - _length(tokenizer, _asked(facts[0][0])) * plan.questions - new_tokens * plan.questions

        def tokens(words: int) -> int:
            return _length(tokenizer, self._passage(facts, 1, range(words), random.Random(0)))

        self._words, self._tokens_per_word = units_that_fit(tokens, room, 32)

    @staticmethod
    def shortest_turn(plan: TurnPlan, tokenizer: Any, new_tokens: int = 16) -> int:
        """Tokens that a turn needs at least: those of the first, which also introduces the task, with no haystack."""
        facts = _long_facts(plan.facts, tokenizer)
        told = LINE_BREAK + " ".join(_told(*fact) for fact in facts)
        answered = _length(tokenizer, _asked(facts[0][0])) + new_tokens
        return _length(tokenizer, INTRODUCTION + told) + plan.questions * answered

    def conversation(self, seed: int, index: int) -> list[Question]:
        """See `TurnScript.conversation`.

        A few passes of the tokenizer over every passage: its haystack shrinks until the turn has its length.

        Raises:
            ValueError: the facts and questions of a turn take more tokens than it has.
        """
        plan = self.plan
        rng = random.Random(f"{seed}/{index}")
        keys: list[str] = []
        for _ in range(plan.turns * plan.facts):
            keys.append(draw("words", rng, keys))
        facts = [(key, draw("numbers", rng)) for key in keys]
        questions: list[Question] = []
        words = range(0)
        for turn, picked in enumerate(plan.asked(rng)):
            asked = [facts[earlier * plan.facts + number] for earlier, number in picked]
            ids = [self._ids(_asked(key), special=False) for key, _ in asked]
            room = self.turn_length - sum(map(len, ids)) - self.new_tokens * len(ids)
            told = facts[turn * plan.facts : (turn + 1) * plan.facts]
            words, passage = self._filled(told, turn, words.stop, room, f"{seed}/{index}/{turn}")
            for (key, value), (earlier, _), tokens in zip(asked, picked, ids, strict=True):
                questions.append(Question(passage, tokens, key, value, turn, turn - earlier))
                passage = ()
        return questions

    def _filled(
        self, facts: Sequence[tuple[str, str]], turn: int, start: int, room: int, places: str
    ) -> tuple[range, tuple[int, ...]]:
        """The passage of a turn in `room` tokens, and which words of the haystack stand in it, from `start` on.

        `places` seeds where the facts stand.
        """
        count = self._words
        while True:
            words = range(start, start + count)
            ids = self._ids(self._passage(facts, turn, words, random.Random(places)), special=turn == 0)
            excess = len(ids) - room
            if excess <= 0:
                return words, ids
            if not count:
                raise ValueError(
                    f"turn {turn} has {self.turn_length} tokens, and its facts and questions with answers take "
                    f"{self.turn_length + excess}; give longer turns, or fewer facts or questions."
                )
            count = max(0, count - math.ceil(excess / self._tokens_per_word))

    def describe(self, ids: Sequence[int]) -> str:
        """The text of the tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def right(self, expected: str, given: str) -> bool:
        """The number stands in the answer."""
        return expected in given

    def to_dict(self) -> dict[str, Any]:
        """See `TurnScript.to_dict`."""
        own = {name: getattr(self, name) for name in ("turn_length", "new_tokens", "asides")}
        # The version changes when the same settings make other conversations or answers, so that logs do not mix them.
        return {"kind": "text", "version": 3, **asdict(self.plan), **own, "haystack_sha256": self._essays.sha256}

    def _passage(self, facts: Sequence[tuple[str, str]], turn: int, words: range, rng: random.Random) -> str:
        """Facts at random places of these words of the haystack."""
        sentences = self._essays.between(words.start, words.stop)
        for key, value in facts:
            sentences.insert(rng.randrange(len(sentences) + 1), _told(key, value))
        return (INTRODUCTION if turn == 0 else "") + LINE_BREAK + " ".join(sentences)

    def _ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=special).input_ids)


def fitting_plan(fits: Callable[[TurnPlan], bool], most: int) -> TurnPlan | None:
    """The plan of at most `most` turns, and of at least two where `most` allows them, that `fits`; None without any.

    Four facts and two questions in a turn where that fits with some number of turns, else two and one, else one and
    one; of these the one with the most turns.
    """
    for facts, questions in ((4, 2), (2, 1), (1, 1)):
        for turns in range(most, min(most, 2) - 1, -1):
            plan = TurnPlan(turns=turns, facts=facts, questions=questions)
            if fits(plan):
                return plan
    return None


def _told(key: str, value: str) -> str:
    return NEEDLE.format(values="numbers", key=key, value=value)


def _asked(key: str) -> str:
    return LINE_BREAK + ASKED.format(key=key)


def _long_facts(count: int, tokenizer: Any) -> list[tuple[str, str]]:
    """Facts with as many tokens as any have, nearly: the longest words, and the longest of many numbers."""
    rng = random.Random(0)
    key = "-".join(_longest(words, tokenizer) for words in (ADJECTIVES, NOUNS))
    return [(key, _longest([draw("numbers", rng) for _ in range(100)], tokenizer))] * count


def _longest(texts: Sequence[str], tokenizer: Any) -> str:
    """The text with the most tokens."""
    lengths = map(len, tokenizer(list(texts)).input_ids)
    return max(zip(lengths, texts, strict=True), key=lambda pair: pair[0])[1]


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text).input_ids)
