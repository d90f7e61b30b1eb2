"""Needles in haystacks of text, as RULER defines them (Hsieh et al., arXiv 2404.06654, table 2), for any tokenizer.

    Some special magic numbers are hidden within the following text. Make sure to memorize it. …
    … haystack … One of the special magic numbers for quiet-harbor is: 4810253. … haystack …
    What are all the special magic numbers for quiet-harbor mentioned in the provided text? The special magic …

Templates, needles, haystacks, numbers of keys, values and queries, the 40 depths, and room for 128 answered tokens are
RULER's. Its own differ in words and sentences: RULER names keys by the lists of `wonderwords` and finds sentences with
NLTK, neither of which is needed here. Essays are the texts that the caller gives; they start again at their end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import random
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal

from holdfast.data.key_words import ADJECTIVES, NOUNS

__all__ = [
    "NEEDLE",
    "NOISE",
    "RULER_TASKS",
    "Essays",
    "RulerSample",
    "RulerSampler",
    "RulerTask",
    "draw",
    "units_that_fit",
]

NEEDLE = "One of the special magic {values} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
MANY = (
    "Some special magic {values} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {values} afterwards.\n{context}\n"
    "What are all the special magic {values} for {query} mentioned in the provided text?"
)
MANY_PREFIX = "The special magic {values} for {query} mentioned in the provided text are"
ONE = (
    "A special magic {value} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {value} afterwards.\n{context}\n"
    "What is the special magic {value} for {query} mentioned in the provided text?"
)
ONE_PREFIX = "The special magic {value} for {query} mentioned in the provided text is"
RANDOM_DEPTHS = tuple(round(100 * step / 39) for step in range(40))
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]])) (?=[\"'(\[]?[A-Z0-9])")


@dataclasses.dataclass(frozen=True)
class RulerTask:
    """One of RULER's retrieval tasks.

    Attributes:
        haystack: "noise" (five short sentences again and again), "essays", or "needles" (nothing but other needles).
        keys: what names a needle: "words" (adjective-noun) or "uuids".
        values: what is asked for: "numbers" of seven digits or "uuids".
        num_keys: different keys hidden; those not asked for distract.
        num_values: values of each key, all of them asked for.
        num_queries: keys asked for.
    """

    haystack: Literal["noise", "essays", "needles"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


RULER_TASKS = {
    "niah_single_1": RulerTask("noise"),
    "niah_single_2": RulerTask("essays"),
    "niah_single_3": RulerTask("essays", values="uuids"),
    "niah_multikey_1": RulerTask("essays", num_keys=4),
    "niah_multikey_2": RulerTask("needles"),
    "niah_multikey_3": RulerTask("needles", keys="uuids", values="uuids"),
    "niah_multivalue": RulerTask("essays", num_values=4),
    "niah_multiquery": RulerTask("essays", num_keys=4, num_queries=4),
}
"""RULER's tasks by RULER's names."""


class Essays:
    """The words and sentences of texts, joined in order, for haystacks of any length.

    Attributes:
        sentences: the words of each.
        words: how many there are.
        sha256: of the text.

    Raises:
        ValueError: if there is no word in them.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        text = " ".join(" ".join(texts).split())
        if not text:
            raise ValueError("the haystack holds no text; give files with essays or other prose.")
        self.sentences = [sentence.split(" ") for sentence in SENTENCE_END.split(text)]
        self.words = sum(map(len, self.sentences))
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()

    def between(self, start: int, stop: int) -> list[str]:
        """The sentences of the words `start` to `stop` − 1, the first and the last cut off there. O(stop)."""
        sentences = []
        at = start - start % self.words
        for sentence in itertools.cycle(self.sentences):
            if at >= stop:
                break
            if piece := sentence[max(0, start - at) : stop - at]:
                sentences.append(" ".join(piece))
            at += len(sentence)
        return sentences


def units_that_fit(tokens: Callable[[int], int], room: int, guess: int) -> tuple[int, float]:
    """About how many units of text (words, lines) fill `room` tokens, and the tokens of one more of them.

    Args:
        tokens: length of a text that has so many units; a few passes of the tokenizer.
        room: tokens that the text may have, those it has without any unit included.
        guess: units to begin with, at least 1.
    """
    empty = tokens(0)
    units, each = guess, 1.0
    for _ in range(4):  # the text gets better known as the guess comes closer to the room
        each = max((tokens(units) - empty) / units, 1e-3)
        units = max(1, int((room - empty) / each))
    return (units if room > empty else 0), each


@dataclasses.dataclass(frozen=True)
class RulerSample:
    """One prompt.

    Attributes:
        text: what RULER calls the input: haystack and question.
        prefix: how the answer begins.
        answers: all values asked for.
        depths: depth of each answer, in percent of the sentences or lines of the haystack.
        ids: the tokens of `prompt`.
    """

    text: str
    prefix: str
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    ids: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return f"{self.text} {self.prefix}"


@dataclasses.dataclass(frozen=True)
class _Needles:
    """What one sample hides and asks, before there is a haystack: a depth and a sentence for each needle."""

    hidden: tuple[tuple[float, str], ...]
    keys: tuple[str, ...]
    query: str
    answers: tuple[str, ...]
    depths: tuple[float, ...]


class RulerSampler:
    """Samples of one task at one length. A sample depends on the arguments here, its depth and its index only.

    Args:
        task: such as `RULER_TASKS["niah_single_2"]`.
        tokenizer: of the model; its special tokens count, where it adds any.
        length: tokens of a sample at the most, `new_tokens` included. Haystacks fill it up to a few tokens.
        essays: haystack of the tasks that have essays.
        new_tokens: tokens left free for the answer.
        seed: of all samples.

    Raises:
        ValueError: if the task needs essays and there are none, or the needles alone do not fit in `length`.
    """

    def __init__(
        self,
        task: RulerTask,
        tokenizer: Any,
        length: int,
        *,
        essays: Essays | None = None,
        new_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        if task.haystack == "essays" and essays is None:
            raise ValueError("this task hides needles in essays; give text files as the haystack.")
        self.task = task
        self.tokenizer = tokenizer
        self.length = length
        self.new_tokens = new_tokens
        self.seed = seed
        self._essays = essays
        self._units, self._tokens_per_unit = self._calibrate()
        if not self._units:
            self.sample(50, 0)  # refuses now what would not fit later

    def sample(self, depth: float, index: int) -> RulerSample:
        """Sample number `index` whose first answer lies at `depth` (0 to 100 percent); others lie at random depths.

        A few passes of the tokenizer over the prompt.
        """
        if not 0 <= depth <= 100:
            raise ValueError(f"depth is {depth}; give 0 to 100 percent.")
        name = f"{self.seed}/{self.task}/{self.length}/{depth:g}/{index}"
        needles = self._needles(random.Random(name), depth)
        units = self._units
        while True:
            sample = self._compose(needles, units, random.Random(f"{name}/haystack"))
            excess = len(sample.ids) + self.new_tokens - self.length
            if excess <= 0 or units == 0:
                break
            units = max(0, units - math.ceil(excess / self._tokens_per_unit))
        if excess > 0:
            raise ValueError(
                f"the needles and the question take {len(sample.ids)} tokens and {self.new_tokens} are left for the "
                f"answer: more than the length of {self.length}; give a greater one."
            )
        return sample

    def _calibrate(self) -> tuple[int, float]:
        """Units of the haystack (words of essays, else lines) that about fill the length, and the tokens of one."""
        needles = self._needles(random.Random(f"{self.seed}"), 50)

        def tokens(units: int) -> int:
            return len(self._compose(needles, units, random.Random(f"{self.seed}/haystack")).ids)

        guess = 64 if self.task.haystack == "essays" else 8
        return units_that_fit(tokens, self.length - self.new_tokens, guess)

    def _needles(self, rng: random.Random, depth: float) -> _Needles:
        task = self.task
        keys: list[str] = []
        for _ in range(task.num_keys):
            keys.append(draw(task.keys, rng, keys))
        values = [[draw(task.values, rng) for _ in range(task.num_values)] for _ in keys]
        # The first keys are those asked for: which they are says nothing, since every depth but the first is random.
        asked = keys[: task.num_queries]
        others = task.num_keys * task.num_values - 1
        depths = [depth, *rng.sample([step for step in RANDOM_DEPTHS if step != depth], others)]
        pairs = [(key, value) for key, of_key in zip(keys, values, strict=True) for value in of_key]
        hidden = [
            (at, NEEDLE.format(values=task.values, key=key, value=value))
            for at, (key, value) in zip(depths, pairs, strict=True)
        ]
        count = task.num_queries * task.num_values
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        answers = tuple(value for _, value in pairs[:count])
        return _Needles(tuple(sorted(hidden)), tuple(keys), query, answers, tuple(depths[:count]))

    def _compose(self, needles: _Needles, units: int, rng: random.Random) -> RulerSample:
        """The sample with a haystack of `units` words or lines."""
        hay = self._hay(units, needles.keys, rng)
        pieces: list[str] = []
        before = 0
        for depth, needle in needles.hidden:
            at = int(len(hay) * depth / 100)
            pieces += [*hay[before:at], needle]
            before = at
        context = (" " if self.task.haystack == "essays" else "\n").join([*pieces, *hay[before:]])
        text, prefix = (MANY, MANY_PREFIX) if len(needles.answers) > 1 else (ONE, ONE_PREFIX)
        words = {"values": self.task.values, "value": self.task.values[:-1], "query": needles.query}
        sample = RulerSample(
            text.format(context=context, **words), prefix.format(**words), needles.answers, needles.depths, ()
        )
        return dataclasses.replace(sample, ids=tuple(self.tokenizer(sample.prompt).input_ids))

    def _hay(self, units: int, taken: tuple[str, ...], rng: random.Random) -> list[str]:
        """Sentences or lines; needles among them have other keys than those `taken`."""
        task = self.task
        if task.haystack == "essays":
            assert self._essays is not None
            return self._essays.between(0, units)
        if task.haystack == "noise":
            return [NOISE] * units
        return [
            NEEDLE.format(values=task.values, key=draw(task.keys, rng, taken), value=draw(task.values, rng))
            for _ in range(units)
        ]


def draw(kind: str, rng: random.Random, taken: Sequence[str] = ()) -> str:
    """A random key or value that is not `taken`: a pair of words, a number of seven digits, or a UUID."""
    while True:
        if kind == "words":
            drawn = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        elif kind == "numbers":
            drawn = str(rng.randrange(10**6, 10**7))
        else:
            drawn = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if drawn not in taken:
            return drawn
