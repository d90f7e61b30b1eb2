"""The needle task: what a sample holds, that nothing leaks, and that samples depend on seed and index only."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from holdfast.data.needle import NeedleStream, NeedleTask


@st.composite
def tasks(draw: st.DrawFn) -> NeedleTask:
    pairs = draw(st.integers(1, 9))
    queries = draw(st.one_of(st.none(), st.integers(1, pairs)))
    shortest = 2 + 2 * pairs + 2 * (pairs if queries is None else queries)
    return NeedleTask(
        length=shortest + draw(st.integers(0, 30)),
        num_pairs=pairs,
        num_queries=queries,
        num_keys=pairs + draw(st.integers(0, 5)),
        num_values=draw(st.integers(1, 5)),
        num_noise=draw(st.integers(1, 4)),
        window=draw(st.integers(0, 20)),
    )


def read_by_hand(task: NeedleTask, ids: list[int]) -> tuple[dict[int, tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of the context, key → (value, its position), and the questions, (position, key); token by token."""
    context, questions = {}, []
    marker = ids.index(task.query_token_id)
    for position, token in enumerate(ids):
        if not task.first_key_id <= token < task.first_value_id:
            continue
        if position < marker:
            assert token not in context, "a key stands twice in the context"
            context[token] = (ids[position + 1], position + 1)
        else:
            questions.append((position, token))
    return context, questions


@settings(max_examples=60, deadline=None)
@given(task=tasks(), seed=st.integers(0, 10_000))
def test_a_sample_read_token_by_token_agrees_with_labels_and_distances(task: NeedleTask, seed: int) -> None:
    batch = task.sample(seed, 3)
    for ids, labels, distance in zip(
        *(batch[name].tolist() for name in ("input_ids", "labels", "distance")), strict=True
    ):
        assert len(ids) == task.length
        assert ids[0] == task.bos_token_id
        assert ids.count(task.query_token_id) == 1
        assert task.pad_token_id not in ids
        context, questions = read_by_hand(task, ids)
        assert len(context) == task.num_pairs
        assert len(questions) == task.answers
        assert len({key for _, key in questions}) == task.answers, "a key is asked twice"
        expected_labels, expected_distance = [-100] * task.length, [0] * task.length
        for position, key in questions:
            value, value_at = context[key]
            assert task.first_value_id <= value < task.vocab_size
            assert ids[position + 1] == value
            expected_labels[position + 1] = value
            expected_distance[position + 1] = position - value_at
            if position - value_at > task.window:  # neither the key nor the value of the pair is in sight
                assert key not in ids[max(0, position - task.window) : position]
        assert labels == expected_labels
        assert distance == expected_distance


def test_nothing_but_the_pair_in_the_context_tells_the_answer() -> None:
    """Without the asked pair, what is left of the sample says nothing about its value."""
    task = NeedleTask(length=40, num_pairs=4, num_keys=6, num_values=4, num_noise=3)
    batch = task.sample(0, 4000)
    answers = batch["labels"][batch["labels"] != -100].view(-1, 4) - task.first_value_id
    share = torch.stack([answers.flatten().eq(value).float().mean() for value in range(4)])
    assert (share - 0.25).abs().max() < 0.02
    same_as_an_earlier_answer = (answers[:, 1:] == answers[:, :-1]).float().mean()
    assert abs(same_as_an_earlier_answer - 0.25) < 0.02


def test_placement_is_uniform_over_the_context() -> None:
    task = NeedleTask(length=24, num_pairs=3, num_keys=3, num_queries=1)
    ids = task.sample(0, 20_000)["input_ids"][:, 1 : 1 + task.context_length]
    is_key = (ids >= task.first_key_id) & (ids < task.first_value_id)
    # 20 context tokens in 17 slots, 3 of them pairs: the first token is a key with probability 3/17.
    assert abs(is_key[:, 0].float().mean() - 3 / 17) < 0.01
    assert abs(is_key[:, -2].float().mean() - 3 / 17) < 0.01
    assert not is_key[:, -1].any()


def test_every_key_is_asked_equally_often_and_in_any_order() -> None:
    task = NeedleTask(length=40, num_pairs=4, num_keys=4, num_queries=2)
    batch = task.sample(0, 8000)
    first_question = 2 + task.context_length
    asked = batch["input_ids"][:, first_question] - task.first_key_id
    assert (torch.bincount(asked) / 8000 - 0.25).abs().max() < 0.02
    distance = batch["distance"][:, [first_question + 1, first_question + 3]]
    assert abs((distance[:, 0] < distance[:, 1]).float().mean() - 0.5) < 0.05


def test_samples_follow_from_the_seed_and_not_from_the_batches() -> None:
    task = NeedleTask()
    whole = task.sample(3, 8)
    generator = np.random.default_rng(3)
    parts = [task.sample(generator, size) for size in (1, 5, 2)]
    for name, tensor in whole.items():
        assert tensor.dtype == torch.int64
        assert torch.equal(tensor, torch.cat([part[name] for part in parts]))
    assert not torch.equal(whole["input_ids"], task.sample(4, 8)["input_ids"])


def test_the_window_only_labels() -> None:
    wide = dataclasses.replace(NeedleTask(), window=64)
    assert torch.equal(NeedleTask().sample(0, 4)["input_ids"], wide.sample(0, 4)["input_ids"])


def test_description() -> None:
    task = NeedleTask(num_noise=2, num_keys=16, num_values=16)
    ids = [1, 3, task.first_key_id + 7, task.first_value_id + 3, 4, 2, task.first_key_id + 7, 0]
    assert task.describe(torch.tensor(ids)) == "bos · k7 v3 · ? k7 _"
    with pytest.raises(ValueError, match=r"token id 37 is out of range; this task has ids 0 to 36"):
        task.describe([task.vocab_size])
    with pytest.raises(ValueError, match="-1"):
        task.describe([-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pairs": 0}, "num_pairs is 0"),
        ({"num_noise": 0}, "num_noise is 0"),
        ({"window": -1}, "window is -1"),
        ({"num_keys": 15}, "num_keys is 15; 16 pairs"),
        ({"num_queries": 17}, "num_queries is 17"),
        ({"num_queries": 0}, "num_queries is 0"),
        ({"length": 65}, "length is 65; 16 pairs and 16 questions need 66"),
    ],
)
def test_settings_that_make_no_task_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeedleTask(**settings)
    assert NeedleTask(length=66).sample(0, 2)["input_ids"].shape == (2, 66)  # the shortest has no noise


def test_stream_gives_the_same_sample_for_an_index_however_it_is_read() -> None:
    stream = NeedleStream(NeedleTask(), [(0, 4, 128), (10, 16, 128)], seed=5, size=24)
    alone = [stream[index] for index in range(24)]
    together = stream.__getitems__([23, 3, 9, 10, 11])
    for index, sample in zip([23, 3, 9, 10, 11], together, strict=True):
        assert all(torch.equal(sample[name], alone[index][name]) for name in sample)
    collate = NeedleStream.collate
    loaders = [DataLoader(stream, 7, collate_fn=collate), DataLoader(stream, 5, num_workers=2, collate_fn=collate)]
    for loader in loaders:
        ids = torch.cat([batch["input_ids"] for batch in loader])
        assert torch.equal(ids, torch.cat([sample["input_ids"] for sample in alone]))
    assert len({tuple(sample["input_ids"].flatten().tolist()) for sample in alone}) == 24


def test_stream_depends_on_its_seed_and_shares_nothing_with_evaluation_samples() -> None:
    task = NeedleTask()
    one, two = (NeedleStream(task, seed=seed)[0]["input_ids"] for seed in (0, 1))
    assert not torch.equal(one, two)
    assert not torch.equal(one, task.sample(0, 1)["input_ids"][0])


def test_short_stages_hold_several_sequences_in_a_sample() -> None:
    stream = NeedleStream(NeedleTask(length=128), [(0, 4, 24), (2, 16, 128)], size=4)
    assert [tuple(sample["input_ids"].shape) for sample in stream] == [(5, 24), (5, 24), (1, 128), (1, 128)]
    first = stream[0]
    assert len({tuple(row.tolist()) for row in first["input_ids"]}) == 5
    assert ((first["labels"] != -100).sum(1) == 4).all()
    batch = NeedleStream.collate([stream[0], stream[1]])
    assert torch.equal(batch["distance"], torch.cat([stream[0]["distance"], stream[1]["distance"]]))
    with pytest.raises(ValueError, match="a stage of 129 tokens is longer"):
        NeedleStream(NeedleTask(length=128), [(0, 4, 129)])


def test_curriculum_goes_by_index() -> None:
    task = NeedleTask(num_queries=8)
    stream = NeedleStream(task, [(0, 4, 128), (3, 8, 128), (5, 16, 128)], size=7)
    answers = [int((stream[index]["labels"] != -100).sum()) for index in range(7)]
    assert answers == [4, 4, 4, 8, 8, 8, 8]
    keys = [
        int(((ids >= task.first_key_id) & (ids < task.first_value_id)).sum())
        for ids in (s["input_ids"] for s in stream)
    ]
    assert keys == [8, 8, 8, 16, 16, 24, 24]  # in the context and asked for
    assert [stream.task_at(index).num_pairs for index in (0, 2, 3, 4, 5, 1000)] == [4, 4, 8, 8, 16, 16]


def test_stream_ends_and_counts_from_the_back() -> None:
    stream = NeedleStream(NeedleTask(), size=3)
    assert len(list(stream)) == len(stream) == 3
    assert torch.equal(stream[-1]["input_ids"], stream[2]["input_ids"])
    for index in (3, -4):
        with pytest.raises(IndexError, match="3 samples"):
            stream[index]


@pytest.mark.parametrize(
    "curriculum", [[], [(1, 4, 64)], [(0, 4, 64), (0, 8, 64)], [(0, 4, 64), (5, 8, 64), (3, 16, 128)]]
)
def test_curriculum_that_does_not_rise_from_zero_is_refused(curriculum: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="curriculum starts at"):
        NeedleStream(NeedleTask(), curriculum)


def test_curriculum_stage_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="num_keys is 32; 33 pairs"):
        NeedleStream(NeedleTask(length=256), [(0, 33, 256)])
    with pytest.raises(ValueError, match="seed is -1"):
        NeedleStream(NeedleTask(), seed=-1)
