"""What Python callers are likely to give in place of what evaluations take, and the line that they get."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from holdfast import HybridConfig, HybridForCausalLM
from holdfast.data.needle import NeedleTask
from holdfast.data.recall import RecallSample
from holdfast.data.text import byte_tokenizer
from holdfast.data.turns import TurnPlan
from holdfast.evaluation.inspection import inspect_sequence
from holdfast.evaluation.needle import evaluate_needle
from holdfast.evaluation.perplexity import evaluate_perplexity
from holdfast.evaluation.recall import evaluate_recall
from holdfast.evaluation.retention import retention_map
from holdfast.evaluation.ruler import RulerSettings, evaluate_ruler
from holdfast.evaluation.scorers import KeyNorm, compare_scorers, scoring
from holdfast.evaluation.selection import selection_map
from holdfast.evaluation.turns import evaluate_turns

TOKENIZER = byte_tokenizer()
MODEL = HybridForCausalLM(
    HybridConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        mixers=["learned_eviction"],
        mixer_options={"learned_eviction": {"num_heads": 2, "window": 8, "budget": 4}},
    )
)
IDS = torch.randint(0, 31, (3, 16), generator=torch.Generator().manual_seed(0))
SAMPLES = [RecallSample("The sea was", ("blue",))]


def compared(model: Any = MODEL, measure: Any = int, **options: Any) -> list[Any]:
    return list(compare_scorers(model, measure, **{"budgets": [5], **options}))


def scored(model: Any, scorer: Any, budget: Any) -> None:
    with scoring(model, scorer, budget):
        pass


EVERY_EVALUATION: dict[str, Callable[..., Any]] = {
    "perplexity": lambda model, **options: evaluate_perplexity(model, IDS, **options),
    "needle": lambda model, **options: evaluate_needle(model, NeedleTask(), **options),
    "recall": lambda model, **options: evaluate_recall(model, TOKENIZER, SAMPLES, **options),
    "turns": lambda model, **options: evaluate_turns(model, None, **options),
    "ruler": lambda model, **options: evaluate_ruler(model, TOKENIZER, RulerSettings(), **options),
    "scorers": compared,
    "inspection": lambda model: inspect_sequence(model, IDS[0]),
    "retention": lambda model: retention_map(model, IDS[0]),
    "selection": lambda model: selection_map(model, IDS[0]),
}
OF_THIS_LIBRARY = sorted(set(EVERY_EVALUATION) - {"perplexity", "needle"})


@pytest.mark.parametrize("name", EVERY_EVALUATION)
def test_the_path_of_a_model_is_no_model(name: str) -> None:
    with pytest.raises(
        TypeError, match=r"^model is the path 'runs/a': load it first, .*from_pretrained\('runs/a'\)\.$"
    ):
        EVERY_EVALUATION[name]("runs/a")
    with pytest.raises(TypeError, match=r"^model is a dict: give a (model|HybridForCausalLM)"):
        EVERY_EVALUATION[name]({})


@pytest.mark.parametrize("name", OF_THIS_LIBRARY)
def test_a_model_of_another_library_where_its_layers_are_looked_at(name: str) -> None:
    with pytest.raises(TypeError, match=r"^model is a Linear: give a HybridForCausalLM\.$"):
        EVERY_EVALUATION[name](nn.Linear(2, 2))


@pytest.mark.parametrize("name", sorted({"perplexity", "needle", "recall", "ruler", "scorers"}))
def test_the_path_of_a_log_is_no_log(name: str) -> None:
    with pytest.raises(TypeError, match=r"^log is a str: give SampleLog\(path, determines\)"):
        EVERY_EVALUATION[name](MODEL, log="answers.jsonl")


def rows() -> Iterator[list[int]]:
    yield [1, 2, 3]


BLOCKS = [
    ("a long text", "blocks is a str: give blocks of token ids, such as PackedText"),
    (TOKENIZER("a long text"), "blocks is a BatchEncoding: give blocks"),
    (None, "blocks is None: give blocks"),
    (3, "blocks is an int: give blocks"),
    (IDS[0], "blocks is a tensor of shape [16]: give [N, L]"),
    (IDS.float(), "blocks is a tensor of torch.float32: give token ids, an int64 tensor [N, L]."),
    ([1, 2, 3], "block 0 is an int: give blocks"),
    ([[1, 2, 3]], "block 0 is a list: give blocks"),
    (rows(), "block 0 is a list: give blocks"),
    (["a text"], "block 0 is a str: give blocks"),
    ([{"text": "a"}], "block 0 has no input_ids, but text: give blocks"),
    ([{"input_ids": [1, 2]}], "block 0's input_ids is a list: give token ids, an int64 tensor [L]."),
    ([IDS[0], IDS], "block 1's input_ids have the shape [3, 16]: give one sequence [L] for each block."),
]


@pytest.mark.parametrize(("blocks", "message"), BLOCKS, ids=[message[:40] for _, message in BLOCKS])
def test_what_is_no_block_of_text(blocks: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        evaluate_perplexity(MODEL, blocks, progress=False)


def test_perplexity_of_bare_token_ids() -> None:
    expected = evaluate_perplexity(MODEL, [{"input_ids": row} for row in IDS], batch_size=2, progress=False)
    for blocks in (IDS, list(IDS), iter(IDS)):
        assert evaluate_perplexity(MODEL, blocks, batch_size=2, progress=False) == expected
    assert expected.blocks == 3


WRONG = {
    "token_bytes is a TokenizersBackend: give TokenBytes.of(tokenizer).": lambda: evaluate_perplexity(
        MODEL, IDS, token_bytes=TOKENIZER
    ),
    "task is a dict: give a NeedleTask.": lambda: evaluate_needle(MODEL, {"length": 128}),
    "task is the class NeedleTask: give a NeedleTask.": lambda: evaluate_needle(MODEL, NeedleTask),
    "tokenizer is None: give that of the model": lambda: evaluate_recall(MODEL, None, SAMPLES),
    "tokenizer is the name 'byte': load it first": lambda: evaluate_ruler(MODEL, "byte", RulerSettings()),
    "samples is a str: give a list of RecallSamples": lambda: evaluate_recall(MODEL, TOKENIZER, "dev-v2.0.json"),
    "sample 1 is a str: give RecallSamples": lambda: evaluate_recall(MODEL, TOKENIZER, [*SAMPLES, "The sea was"]),
    "script is a TurnPlan: give NeedleTurns(…) or TextTurns(…).": lambda: evaluate_turns(MODEL, TurnPlan()),
    "settings is a str: give RulerSettings(…).": lambda: evaluate_ruler(MODEL, TOKENIZER, "niah_single_1"),
    "measure is a float: give a function without arguments": lambda: compared(measure=0.5),
    "budgets is an int: give a list of numbers.": lambda: compared(budgets=8),
    "scorers is a str: give a list of names": lambda: compared(scorers="key_norm"),
    "scorer is the class KeyNorm: give its name in SCORERS": lambda: scored(MODEL, KeyNorm, 5),
    "budget is a float: give a number of slots.": lambda: scored(MODEL, "key_norm", 5.0),
    "input_ids is a str: give token ids, an int64 tensor [T] or [1, T].": lambda: inspect_sequence(MODEL, "a text"),
    "input_ids is a list: give token ids": lambda: retention_map(MODEL, [1, 2, 3]),
    "input_ids is a tensor of torch.float32: give token ids": lambda: retention_map(MODEL, IDS[0].float()),
    "input_ids is None: give token ids": lambda: selection_map(MODEL, None),
    "input_ids have the shape [1, 3, 16]; give [T] or [1, T].": lambda: retention_map(MODEL, IDS[None]),
}


@pytest.mark.parametrize("message", WRONG)
def test_other_arguments(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}") as caught:
        WRONG[message]()
    assert "\n" not in str(caught.value)


def test_tokens_that_the_model_does_not_know_are_named(small_model: Callable[..., HybridForCausalLM]) -> None:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    ids[1, 3] = 50
    with pytest.raises(ValueError, match="block 1 has token 50, and the model knows 50 tokens"):
        evaluate_perplexity(small_model(vocab_size=50), ids)
