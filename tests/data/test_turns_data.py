"""Conversations of several turns: what is told, what is asked, and that nothing is asked that was not told."""

import collections
import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.data.needle import NeedleTask
from holdfast.data.ruler import NOISE, Essays
from holdfast.data.text import byte_tokenizer, train_tokenizer
from holdfast.data.turns import NeedleTurns, TextTurns, TurnPlan, fitting_plan

TASK = NeedleTask(num_keys=40, num_values=8, num_noise=3)


@given(st.integers(1, 9), st.integers(1, 6), st.data(), st.integers(0, 99))
def test_a_plan_asks_for_what_was_told_and_never_twice(turns: int, facts: int, data: st.DataObject, seed: int) -> None:
    questions = data.draw(st.integers(1, facts))
    asked = TurnPlan(turns=turns, facts=facts, questions=questions).asked(random.Random(seed))
    assert [len(picked) for picked in asked] == [questions] * turns
    assert all(0 <= told <= turn and 0 <= number < facts for turn, of in enumerate(asked) for told, number in of)
    assert len({fact for picked in asked for fact in picked}) == turns * questions


def test_plans_ask_far_back_often_enough_to_measure() -> None:
    plan = TurnPlan(turns=8, facts=4, questions=2)
    backs = collections.Counter(
        turn - told
        for seed in range(100)
        for turn, picked in enumerate(plan.asked(random.Random(seed)))
        for told, _ in picked
    )
    assert min(backs[back] for back in range(8)) > 30


def test_a_plan_without_enough_facts_is_refused() -> None:
    for settings in ({"turns": 0}, {"questions": 0}, {"facts": 2, "questions": 3}):
        with pytest.raises(ValueError, match="no more questions than facts"):
            TurnPlan(**settings)


@pytest.mark.parametrize("asides", [False, True])
def test_needle_turns(asides: bool) -> None:
    script = NeedleTurns(TurnPlan(turns=5, facts=3, questions=2), TASK, 14, asides=asides)
    questions = script.conversation(3, 1)
    assert questions == script.conversation(3, 1) != script.conversation(3, 2)
    assert len(questions) == 10
    told: dict[str, tuple[str, int]] = {}
    length = 0
    for number, question in enumerate(questions):
        words = script.describe(question.told).split()
        for key, value in itertools.pairwise(words):
            if key.startswith("k"):
                assert key not in told
                told[key] = (value, question.turn)
        assert bool(question.told) == (number % 2 == 0)
        assert (words[:1] == ["bos"]) == (number == 0)
        marker = ["?"] if asides or number % 2 == 0 else []
        assert script.describe(question.asked).split() == [*marker, question.key]
        assert told[question.key] == (question.expected, question.turn - question.back)
        length += len(question.told) + len(question.asked) + script.new_tokens
    assert len(told) == 15
    assert script.length == 1 + 5 * 14 == length - 5 * asides  # aside, each question has a marker of its own
    assert len({question.key for question in questions}) == 10


def test_text_turns() -> None:
    essays = Essays(["One two three. Four five six seven. Eight nine."])
    script = TextTurns(TurnPlan(turns=4, facts=3, questions=2), byte_tokenizer(), 600, essays=essays, new_tokens=9)
    questions = script.conversation(0, 0)
    told: dict[str, tuple[str, int]] = {}
    lengths = collections.Counter()
    for question in questions:
        text = script.describe(question.told)
        assert text.startswith("Some special magic numbers are hidden") == (question is questions[0])
        for key, value in re.findall(r"magic numbers for (\S+) is: (\d{7})\.", text):
            told[key] = (value, question.turn)
        assert script.describe(question.asked) == (
            f"\nWhat is the special magic number for {question.key}? The special magic number for {question.key} is"
        )
        assert told[question.key] == (question.expected, question.turn - question.back)
        lengths[question.turn] += len(question.told) + len(question.asked) + script.new_tokens
    assert len(told) == 12
    assert all(480 < lengths[turn] <= 600 for turn in lengths)  # keys differ in length
    # What stands between the facts goes on from turn to turn.
    filler = [re.sub(r"One of the special magic numbers.*?\d\. ?", "", script.describe(q.told)) for q in questions[::2]]
    words = " ".join(part.split("quiz you about the numbers.")[-1].strip() for part in filler).split()
    assert words == " ".join(essays.between(0, len(words))).split()


@pytest.mark.parametrize("length", [700, 1024, 3000])
@pytest.mark.parametrize(
    "essays", [None, Essays(["I am, and so are we all. " * 30, "Nobody understands harbours. " * 30])]
)
def test_no_turn_of_text_is_longer_than_was_asked_for(length: int, essays: Essays | None) -> None:
    """Whatever the facts and the piece of the haystack that stands between them: some take more tokens than others."""
    prose = "One of the special magic numbers for quiet-harbor is: 1234567. I am, and you were. " * 40
    for tokenizer in (byte_tokenizer(), train_tokenizer([prose, NOISE * 20], 400, progress=False)):
        script = TextTurns(TurnPlan(turns=6), tokenizer, length, essays=essays)
        for index in range(3):
            lengths: collections.Counter[int] = collections.Counter()
            for question in script.conversation(1, index):
                lengths[question.turn] += len(question.told) + len(question.asked) + script.new_tokens
            assert max(lengths.values()) <= length
            assert sum(lengths.values()) <= script.length
            assert essays or min(lengths.values()) > 0.9 * length


def test_a_turn_of_text_holds_what_its_shortest_length_says() -> None:
    plan, tokenizer = TurnPlan(turns=3), byte_tokenizer()
    shortest = TextTurns.shortest_turn(plan, tokenizer)
    for index in range(5):
        TextTurns(plan, tokenizer, shortest).conversation(0, index)
    with pytest.raises(ValueError, match=f"need {shortest}"):
        TextTurns(plan, tokenizer, shortest - 1)


def test_the_plan_that_fits() -> None:
    def fits(tokens: int) -> TurnPlan | None:
        return fitting_plan(lambda plan: plan.turns * NeedleTurns.shortest_turn(plan) <= tokens, 8)

    assert fits(8 * 13) == TurnPlan(turns=8, facts=4, questions=2)
    assert fits(8 * 13 - 1) == TurnPlan(turns=7, facts=4, questions=2)
    assert fits(2 * 13 - 1) == TurnPlan(turns=3, facts=2, questions=1)
    assert fits(2 * 5) == TurnPlan(turns=2, facts=1, questions=1)
    assert fits(2 * 5 - 1) is None


def test_answers() -> None:
    needle = NeedleTurns(TurnPlan(), TASK, 20)
    assert needle.describe([TASK.first_value_id + 3]) == "v3"
    assert needle.describe([TASK.vocab_size]) == f"<{TASK.vocab_size}>"
    assert needle.right("v3", "v3")
    assert not needle.right("v3", "v31")
    text = TextTurns(TurnPlan(), byte_tokenizer(), 900)
    assert text.right("1234567", " surely 1234567.")
    assert not text.right("1234567", " 123456")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="4 facts and 2 questions need 13"):
        NeedleTurns(TurnPlan(), TASK, 12)
    NeedleTurns(TurnPlan(), TASK, 13).conversation(0, 0)
    with pytest.raises(ValueError, match="9 turns of 5 facts need 45 keys, the task has 40"):
        NeedleTurns(TurnPlan(turns=9, facts=5), TASK, 20)
    with pytest.raises(ValueError, match=r"a turn has 300 tokens; 4 facts and 2 questions with answers need \d+\."):
        TextTurns(TurnPlan(), byte_tokenizer(), 300)


def test_what_conversations_follow_from_is_told() -> None:
    plan, tokenizer = TurnPlan(), byte_tokenizer()
    scripts = [
        NeedleTurns(plan, TASK, 20),
        NeedleTurns(plan, TASK, 21),
        NeedleTurns(plan, TASK, 20, asides=True),
        NeedleTurns(TurnPlan(turns=7), TASK, 20),
        TextTurns(plan, tokenizer, 900),
        TextTurns(plan, tokenizer, 900, new_tokens=9),
        TextTurns(plan, tokenizer, 900, essays=Essays(["Some other text."])),
    ]
    assert len({str(script.to_dict()) for script in scripts}) == len(scripts)
