"""RULER's tasks: what is hidden where, what is asked, and how long a prompt is."""

import re

import pytest

from holdfast.data import ruler
from holdfast.data.key_words import ADJECTIVES, NOUNS
from holdfast.data.ruler import NOISE, RULER_TASKS, Essays, RulerSample, RulerSampler, RulerTask, units_that_fit
from holdfast.data.text import byte_tokenizer, train_tokenizer

PROSE = (
    'Rain fell on the harbour all day. "Will it stop?" asked the boy. "Nobody knows!" The boats, 12 of them, '
    "lay still.\n"
    "Mr Hale counted nets... Then he slept (as always). In the morning the sea was calm; the wind had gone."
)
ESSAYS = Essays([PROSE, "Another text. It has two sentences."])
TOLD = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.(?=\s)")


def sampler(name: str, length: int = 2000, **settings: object) -> RulerSampler:
    return RulerSampler(RULER_TASKS[name], byte_tokenizer(), length, essays=ESSAYS, **settings)


def context(sample: RulerSample) -> str:
    """What stands between the introduction and the question."""
    return sample.text.split("afterwards.\n", 1)[1].rsplit("\n", 1)[0]


EXPECTED = {  # needles hidden beside those of a haystack of needles, answers, kinds of keys and values
    "niah_single_1": (1, 1, "words", "numbers"),
    "niah_single_2": (1, 1, "words", "numbers"),
    "niah_single_3": (1, 1, "words", "uuids"),
    "niah_multikey_1": (4, 1, "words", "numbers"),
    "niah_multikey_2": (None, 1, "words", "numbers"),
    "niah_multikey_3": (None, 1, "uuids", "uuids"),
    "niah_multivalue": (4, 4, "words", "numbers"),
    "niah_multiquery": (4, 4, "words", "numbers"),
}
FORMS = {
    "words": r"[a-z]+-[a-z]+",
    "numbers": r"[1-9]\d{6}",
    "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}


@pytest.mark.parametrize("name", RULER_TASKS)
def test_what_is_hidden_is_what_is_asked_for(name: str) -> None:
    hidden, answers, keys, values = EXPECTED[name]
    for index in range(5):
        sample = sampler(name, 3000).sample(30, index)
        told = TOLD.findall(context(sample) + "\n")
        assert {kind for kind, _, _ in told} == {values}
        assert all(re.fullmatch(FORMS[keys], key) and re.fullmatch(FORMS[values], value) for _, key, value in told)
        assert hidden is None or len(told) == hidden
        assert len(sample.answers) == len(sample.depths) == answers
        asked = re.search(r"for (.*) mentioned in", sample.prefix)[1].replace(", and ", ", ").split(", ")
        # Every value of the keys asked for is an answer, and no other needle has their key.
        assert {value for _, key, value in told if key in asked} == set(sample.answers)
        assert all(context(sample).count(answer) == 1 for answer in sample.answers)
        assert f"for {', and '.join([', '.join(asked[:-1]), asked[-1]]) if asked[1:] else asked[0]} m" in sample.text


def test_the_words_are_rulers() -> None:
    one = sampler("niah_single_1", 1000, new_tokens=100).sample(0, 0)
    key, (value,) = re.search(r"for (\S+) mentioned", one.text)[1], one.answers
    lines = [f"One of the special magic numbers for {key} is: {value}.", *[NOISE] * one.text.count(NOISE)]
    assert one.prompt == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n" + "\n".join(lines) + f"\nWhat is the special magic number for {key} mentioned in "
        f"the provided text? The special magic number for {key} mentioned in the provided text is"
    )
    many = sampler("niah_multivalue").sample(0, 0)
    key = re.search(r"for (\S+) mentioned", many.text)[1]
    assert many.text.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\nOne of the special magic numbers for "
    )
    assert many.prompt.endswith(
        f"\nWhat are all the special magic numbers for {key} mentioned in the provided text? The special magic numbers "
        f"for {key} mentioned in the provided text are"
    )


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2"])
@pytest.mark.parametrize("depth", [0, 25, 50, 77.5, 100])
def test_depth_is_the_share_of_lines_before_the_needle(name: str, depth: float) -> None:
    sample = sampler(name, 4000).sample(depth, 3)
    lines = context(sample).split("\n")
    (at,) = [number for number, line in enumerate(lines) if sample.answers[0] in line]
    assert at == int((len(lines) - 1) * depth / 100)
    assert sample.depths == (depth,)


@pytest.mark.parametrize("depth", [0, 31, 50, 100])
def test_needles_stand_between_whole_sentences_of_the_essays(depth: float) -> None:
    sample = sampler("niah_single_2", 3000).sample(depth, 1)
    before, after = re.split(r"One of the special magic numbers for \S+ is: \d+\.", context(sample))
    sentences = ESSAYS.between(0, len(f"{before} {after}".split()))
    assert len(sentences) > 20
    assert before.strip() == " ".join(sentences[: int(len(sentences) * depth / 100)])
    assert after.strip() == " ".join(sentences[int(len(sentences) * depth / 100) :])


@pytest.mark.parametrize("name", RULER_TASKS)
def test_prompts_fill_the_length_and_never_exceed_it(name: str) -> None:
    texts = [PROSE * 20, NOISE * 20, "One of the special magic numbers for able-acorn is: 1234567." * 9]
    for tokenizer in (byte_tokenizer(), train_tokenizer(texts, 400, progress=False)):
        made = RulerSampler(RULER_TASKS[name], tokenizer, 2500, essays=ESSAYS, new_tokens=64)
        for index in range(4):
            sample = made.sample(25.0 * index, index)
            assert list(sample.ids) == tokenizer(sample.prompt).input_ids
            line = 140 if RULER_TASKS[name].haystack != "essays" else 20  # of the haystack, and what keys differ by
            assert 2500 - 64 - line - 30 < len(sample.ids) <= 2500 - 64


def test_samples_follow_from_depth_index_and_seed_alone() -> None:
    first, second = sampler("niah_multiquery"), sampler("niah_multiquery")
    first.sample(10, 5)
    assert first.sample(20, 1) == second.sample(20, 1)
    others = [second.sample(20, 2), second.sample(30, 1), sampler("niah_multiquery", seed=1).sample(20, 1)]
    assert len({first.sample(20, 1).answers, *(other.answers for other in others)}) == 4


def test_no_other_needle_has_the_key_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruler, "ADJECTIVES", ("red", "blue"))
    monkeypatch.setattr(ruler, "NOUNS", ("sea", "sky", "hat"))
    for name in ("niah_multikey_1", "niah_multikey_2"):
        sample = sampler(name).sample(40, 0)
        keys = [key for _, key, _ in TOLD.findall(context(sample) + "\n")]
        assert keys.count(re.search(r"for (\S+) mentioned", sample.prefix)[1]) == 1
        assert len(keys) > 4 or len(set(keys)) == 4


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="more than the length of 300; give a greater one"):
        sampler("niah_single_1", 300)
    with pytest.raises(ValueError, match="give text files as the haystack"):
        RulerSampler(RULER_TASKS["niah_single_2"], byte_tokenizer(), 2000)
    with pytest.raises(ValueError, match="depth is 101; give 0 to 100"):
        sampler("niah_single_1").sample(101, 0)
    with pytest.raises(ValueError, match="the haystack holds no text"):
        Essays([" \n", ""])


def test_the_smallest_length_has_no_haystack() -> None:
    task = RulerTask("noise")
    bare = next(n for n in range(330, 600) if _fits(task, n))
    sample = RulerSampler(task, byte_tokenizer(), bare, new_tokens=1).sample(50, 0)
    assert NOISE not in sample.text
    assert sample.answers[0] in sample.text


def _fits(task: RulerTask, length: int) -> bool:
    try:
        RulerSampler(task, byte_tokenizer(), length, new_tokens=1).sample(50, 0)
    except ValueError:
        return False
    return True


def test_essays_begin_again_at_their_end() -> None:
    words = " ".join(f"{PROSE} Another text. It has two sentences.".split()).split(" ")
    assert ESSAYS.words == len(words)
    assert [" ".join(sentence) for sentence in ESSAYS.sentences[:4]] == [
        "Rain fell on the harbour all day.",
        '"Will it stop?" asked the boy.',
        '"Nobody knows!"',
        "The boats, 12 of them, lay still.",
    ]
    for start, stop in ((0, 5), (3, 11), (0, len(words)), (len(words) - 2, len(words) + 3), (70, 140), (4, 4)):
        expected = [words[at % len(words)] for at in range(start, stop)]
        assert " ".join(ESSAYS.between(start, stop)).split() == expected


def test_units_fill_the_room() -> None:
    assert units_that_fit(lambda units: 10 + 3 * units, 100, 4) == (30, 3.0)
    assert units_that_fit(lambda units: 10 + 3 * units, 9, 4)[0] == 0


def test_key_words_are_distinct_and_plain() -> None:
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) > 150
    assert len(set(NOUNS)) == len(NOUNS) > 200
    assert all(re.fullmatch("[a-z]+", word) for word in (*ADJECTIVES, *NOUNS))
