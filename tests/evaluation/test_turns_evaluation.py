"""Several turns: who remembers all is right at any distance, who remembers little only near by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from listener import Listener, MergingListener
from templates import tokenizer_with

from holdfast import HybridForCausalLM
from holdfast.data.needle import NeedleTask
from holdfast.data.ruler import Essays
from holdfast.data.text import byte_tokenizer
from holdfast.data.turns import NeedleTurns, TextTurns, TurnPlan
from holdfast.evaluation.sample_log import SampleLog
from holdfast.evaluation.turns import evaluate_turns, plot_turns

PLAN = TurnPlan(turns=4, facts=3, questions=2)
TASK = NeedleTask(num_keys=20, num_values=8, num_noise=3)


def text(asides: bool = False, new_tokens: int = 9) -> TextTurns:
    return TextTurns(PLAN, byte_tokenizer(), 600, asides=asides, new_tokens=new_tokens)


@pytest.mark.parametrize("asides", [False, True])
def test_who_remembers_all_is_always_right(asides: bool) -> None:
    result = evaluate_turns(Listener(), text(asides), conversations=5, progress=False)
    assert result.total.accuracy == 1
    assert result.total.count == 5 * 8
    assert result.total.effective < 10  # conversations, not 40 independent answers
    assert list(result.by_turn) == [0, 1, 2, 3]
    assert all(share.count == 10 for share in result.by_turn.values())
    assert list(result.by_back) == [0, 1, 2, 3]
    assert sum(share.count for share in result.by_back.values()) == 40
    assert result.conversations == 5
    assert result.cache_bytes > 0


def test_what_stands_before_the_line_break_in_its_token_counts() -> None:
    model = MergingListener()
    script = TextTurns(PLAN, model.tokenizer, 600, new_tokens=9)
    assert evaluate_turns(model, script, conversations=2, progress=False).total.accuracy == 1


@pytest.mark.parametrize("asides", [False, True])
def test_who_remembers_the_last_turn_is_right_about_it(asides: bool) -> None:
    result = evaluate_turns(Listener(reach=600), text(asides), conversations=12, progress=False)
    assert result.by_back[0].accuracy > 0.9
    assert result.by_back[2].accuracy == result.by_back[3].accuracy == 0


def test_no_token_is_read_twice() -> None:
    model = Listener()
    script = text(new_tokens=len(" 1234567"))  # so that nothing follows the last token of an answer
    result = evaluate_turns(model, script, conversations=6, batch_size=4, progress=False)
    read = sum(int(mask.sum()) for mask in model.calls)
    told = [script.conversation(0, index) for index in range(6)]
    questions = sum(len(q.told) + len(q.asked) for conversation in told for q in conversation)
    answers = 6 * 8 * len(" 1234567")
    assert result.tokens_said == (questions + answers) / 6
    assert read == result.tokens_read * 6 == questions + answers - 6
    # Aside, only what is told stays; questions are read once too.
    model.calls.clear()
    kept = evaluate_turns(model, text(asides=True, new_tokens=8), conversations=6, progress=False)
    assert kept.tokens_said == kept.tokens_read == sum(len(q.told) for c in told for q in c) / 6
    assert sum(int(mask.sum()) for mask in model.calls) == questions + answers - 6 * 8


def test_a_cache_that_saw_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stutter(Listener):
        def forward(self, input_ids: Any, attention_mask: Any, past_key_values: Any, logits_to_keep: int) -> Any:
            output = super().forward(input_ids, attention_mask, past_key_values, logits_to_keep)
            past_key_values.seen += 1
            return output

    with pytest.raises(RuntimeError, match="the cache has seen other tokens than were said"):
        evaluate_turns(Stutter(), text(), conversations=1, progress=False)


@pytest.mark.parametrize("asides", [False, True])
@pytest.mark.parametrize("mixer", ["learned_eviction", "native_sparse_attention", "full_attention"])
def test_needle_turns_in_any_batch(
    small_model: Callable[..., HybridForCausalLM], mixer: str, asides: bool, tmp_path: Path
) -> None:
    model = small_model("gated_deltanet", mixer)
    script = NeedleTurns(PLAN, TASK, 14, asides=asides)
    log = SampleLog(tmp_path / "log", {})
    result = evaluate_turns(model, script, conversations=5, batch_size=5, log=log, progress=False)
    assert result.tokens_said == (1 + 4 * 14 if not asides else 1 + 4 * 9)
    assert result.tokens_read == result.tokens_said - (not asides)
    single = evaluate_turns(model, script, conversations=5, batch_size=2, progress=False)
    assert (single.total, single.by_back, single.by_turn) == (result.total, result.by_back, result.by_turn)
    assert all(record["tokens_said"] == result.tokens_said for record in log.records.values())
    asked = log.records["3"]["questions"]
    assert [question["key"] for question in asked] == [question.key for question in script.conversation(0, 3)]
    assert {question["right"] for question in asked} <= {True, False}


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    model = Listener(reach=700)
    whole = evaluate_turns(model, text(), conversations=5, progress=False)
    evaluate_turns(model, text(), conversations=2, log=SampleLog(tmp_path / "log", {}), progress=False)
    model.calls.clear()
    result = evaluate_turns(model, text(), conversations=5, log=SampleLog(tmp_path / "log", {}), progress=False)
    assert result.resumed == 2
    assert model.calls[0].shape[0] == 3
    assert (result.total, result.by_back, result.tokens_said) == (whole.total, whole.by_back, whole.tokens_said)


def test_what_does_not_fit_is_refused(small_model: Callable[..., HybridForCausalLM]) -> None:
    with pytest.raises(ValueError, match="'h' is token 104 of the tokenizer, and the model knows tokens up to 103"):
        evaluate_turns(Listener(vocab_size=104), text(), progress=False)
    ascii_only = Listener(vocab_size=128)
    foreign = TextTurns(PLAN, byte_tokenizer(), 600, essays=Essays(["Alter Käse. " * 99]))
    with pytest.raises(ValueError, match="is token 195 of the tokenizer, and the model knows tokens up to 127"):
        evaluate_turns(ascii_only, foreign, progress=False)
    assert ascii_only.calls == []
    with pytest.raises(ValueError, match=r"2,400 tokens are more than the 2,399 .*--beyond"):
        evaluate_turns(Listener(max_position_embeddings=2399), text(), progress=False)
    with pytest.raises(ValueError, match="conversations is 0"):
        evaluate_turns(Listener(), text(), conversations=0, progress=False)
    few = NeedleTurns(PLAN, NeedleTask(num_keys=80), 14)
    with pytest.raises(ValueError, match="the model has 100 token ids, the conversation 131"):
        evaluate_turns(small_model("gated_deltanet"), few, progress=False)
    ends = TextTurns(PLAN, tokenizer_with("$A END"), 600)
    with pytest.raises(ValueError, match=r"puts '<\|eos\|>' behind every text"):
        evaluate_turns(Listener(), ends, conversations=1, progress=False)


def test_plot(tmp_path: Path) -> None:
    results = {
        "near": evaluate_turns(Listener(reach=600), text(), conversations=4, progress=False),
        "all": evaluate_turns(Listener(), text(), conversations=4, progress=False),
    }
    assert json.loads(json.dumps(results["all"].to_dict(), allow_nan=False))["by_back"][3]["accuracy"] == 1
    picture = matplotlib.image.imread(plot_turns(results, tmp_path / "turns.png"))
    colours = {tuple(colour) for colour in (picture[:, :, :3] * 255).round().astype(int).reshape(-1, 3)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line for each
    with pytest.raises(ValueError, match="at least one result"):
        plot_turns({}, tmp_path / "none.png")
