"""Needle evaluation: an oracle, a guesser and a model with a window get the scores that they must."""

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.data.needle import NeedleTask
from holdfast.evaluation.intervals import wilson_interval
from holdfast.evaluation.needle import NeedleResult, evaluate_needle, plot_accuracy_by_distance

TASK = NeedleTask(length=64, num_pairs=6, num_keys=8, num_values=4, num_noise=3, window=10)


class Recall(nn.Module):
    """Looks the last token up among the earlier ones at most `reach` steps back, and predicts what followed it."""

    def __init__(self, task: NeedleTask, reach: float = math.inf, margin: float = 20.0) -> None:
        super().__init__()
        self.task, self.reach, self.margin = task, reach, margin
        self.dropout = nn.Dropout()
        self.frozen = nn.Dropout().eval()
        self.calls: list[tuple[int, bool, bool]] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        self.calls.append((len(input_ids), self.training or self.dropout.training, torch.is_grad_enabled()))
        rows, length = input_ids.shape
        logits = torch.zeros(rows, length, self.task.vocab_size)
        for row in range(rows):
            ids = input_ids[row].tolist()
            for i in range(length):
                for j in range(1, i):  # j holds the value, j − 1 the key
                    if ids[j - 1] == ids[i] and i - j <= self.reach:
                        logits[row, i, ids[j]] = self.margin
        return SimpleNamespace(logits=logits)


class Guess(nn.Module):
    """Knows that a value comes, but not which; breaks ties at random."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        logits = torch.full((*input_ids.shape, TASK.vocab_size), -100.0)
        noise = torch.rand(*input_ids.shape, TASK.num_values, generator=torch.Generator().manual_seed(0))
        logits[..., TASK.first_value_id :] = noise * 1e-4
        return SimpleNamespace(logits=logits)


def test_an_oracle_is_always_right() -> None:
    result = evaluate_needle(Recall(TASK), TASK, samples=20, batch_size=8, progress=True)
    assert result.total.accuracy == result.within.accuracy == result.beyond.accuracy == 1
    assert result.total.count == result.within.count + result.beyond.count == 20 * 6
    assert result.total.effective < 30  # samples, not 120 independent answers
    assert sum(part.tally.count for part in result.bins) == 20 * 6
    assert result.total.perplexity == pytest.approx(1, abs=1e-5)


def test_a_guesser_is_right_by_chance() -> None:
    result = evaluate_needle(Guess(), TASK, samples=2000, progress=False)
    assert result.total.accuracy == pytest.approx(0.25, abs=0.02)
    assert result.total.perplexity == pytest.approx(4, rel=1e-3)
    low, high = result.total.interval
    assert low < result.total.accuracy < high
    assert high - low < 0.02


def test_a_model_with_a_window_answers_within_it_and_no_farther() -> None:
    """Also the proof that the boundary is the attention's own: i − j ≤ w is within."""
    blind = evaluate_needle(Recall(TASK, reach=TASK.window), TASK, samples=64, progress=False)
    assert blind.within.accuracy == 1
    assert blind.within.count > 30
    assert blind.beyond.correct == 0  # equal logits: the first id wins, and it is no value
    assert blind.beyond.perplexity == pytest.approx(TASK.vocab_size, rel=1e-5)
    shorter = evaluate_needle(Recall(TASK, reach=TASK.window - 1), TASK, samples=64, progress=False)
    assert shorter.within.accuracy < 1
    for part in blind.bins:
        assert part.tally.accuracy in (None, 1.0 if part.high <= TASK.window else 0.0)


def test_bins_are_seamless_and_have_an_edge_at_the_window() -> None:
    for window in (0, 1, 2, 7, 10, 16, 61, 500):
        task = dataclasses.replace(TASK, window=window)
        bins = evaluate_needle(Guess(), task, samples=40, progress=False).bins
        assert bins[0].low == 1
        assert bins[-1].high == 60
        assert all(a.high + 1 == b.low for a, b in itertools.pairwise(bins))
        assert all(part.low <= part.high for part in bins)
        assert not 0 < window < 60 or window in [part.high for part in bins]
        assert sum(part.tally.count for part in bins) == 40 * 6


def test_counts_agree_with_answers_counted_one_by_one() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TASK.vocab_size + 5, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    result = evaluate_needle(model, TASK, samples=10, seed=7, progress=False)
    batch = TASK.sample(np.random.default_rng(7), 10)
    logits = model(input_ids=batch["input_ids"]).logits.detach()
    correct = {True: 0, False: 0}
    nll = {True: 0.0, False: 0.0}
    for row, at in (batch["labels"] != -100).nonzero().tolist():
        within = bool(batch["distance"][row, at] <= TASK.window)
        answer = batch["input_ids"][row, at]
        correct[within] += int(logits[row, at - 1].argmax() == answer)
        nll[within] -= float(logits[row, at - 1].log_softmax(-1)[answer])
    assert (result.within.correct, result.beyond.correct) == (correct[True], correct[False])
    assert result.within.nll == pytest.approx(nll[True], rel=1e-5)
    assert result.beyond.nll == pytest.approx(nll[False], rel=1e-5)


def test_result_does_not_depend_on_the_batch_size() -> None:
    model = Recall(TASK, reach=20)
    results = [evaluate_needle(model, TASK, samples=11, batch_size=size, progress=False) for size in (1, 4, 64)]
    assert results[0] == results[1] == results[2]
    assert [call[0] for call in model.calls] == [1] * 11 + [4, 4, 3] + [11]
    assert evaluate_needle(model, TASK, samples=11, seed=1, progress=False) != results[0]


def test_model_is_read_in_eval_mode_and_put_back() -> None:
    model = Recall(TASK).train()
    model.frozen.eval()
    evaluate_needle(model, TASK, samples=2, progress=False)
    assert model.calls == [(2, False, False)]
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training


def test_model_with_too_small_a_vocabulary_is_refused_and_put_back() -> None:
    class Small(Recall):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(input_ids, use_cache).logits[..., 1:])

    model = Small(TASK).train()
    with pytest.raises(ValueError, match="the model has 17 token ids, the task 18; give a larger model"):
        evaluate_needle(model, TASK, samples=2, progress=False)
    assert model.training


def test_bf16_logits() -> None:
    class Rounded(Recall):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(input_ids, use_cache).logits.bfloat16())

    assert evaluate_needle(Rounded(TASK), TASK, samples=4, progress=False).total.accuracy == 1


def test_result_survives_json() -> None:
    result = evaluate_needle(Recall(TASK, reach=20), dataclasses.replace(TASK, window=0), samples=5, progress=False)
    assert result.within.count == 0  # nothing to divide by
    assert (result.within.accuracy, result.within.interval, result.within.perplexity) == (None, None, None)
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert NeedleResult.from_dict(json.loads(text)) == result
    assert json.loads(text)["beyond"]["accuracy"] == result.beyond.accuracy


def test_wilson_interval() -> None:
    # Table values: 8 of 10, and the closed forms z²/(n + z²) at the ends.
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    square = 1.959963984540054**2
    assert wilson_interval(0, 20) == pytest.approx((0, square / (20 + square)))
    assert wilson_interval(20, 20) == pytest.approx((20 / (20 + square), 1))
    for successes, trials in ((0, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match=f"{successes} successes of {trials}"):
            wilson_interval(successes, trials)


@pytest.mark.parametrize("counts", [{"samples": 0}, {"batch_size": 0}])
def test_counts_below_one_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give at least 1"):
        evaluate_needle(Guess(), TASK, **counts)


def test_plot_is_a_whole_picture_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {
        "blind": evaluate_needle(Recall(TASK, reach=10), TASK, samples=8, progress=False),
        "guess": evaluate_needle(Guess(), dataclasses.replace(TASK, window=20), samples=8, progress=False),
    }
    path = plot_accuracy_by_distance(results, tmp_path / "plots" / "recall.png")
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 400
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20  # lines, not a blank page
    assert [file.name for file in path.parent.iterdir()] == ["recall.png"]
    with pytest.raises(ValueError, match="at least one result"):
        plot_accuracy_by_distance({}, path)

    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plot_accuracy_by_distance({"guess": results["guess"]}, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["recall.png"]
