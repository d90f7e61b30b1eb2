"""Perplexity: exact for models whose answer is known, by position, isolated documents apart."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast import HybridForCausalLM
from holdfast.data.text import collate_isolated, pack
from holdfast.evaluation import perplexity as module
from holdfast.evaluation.perplexity import PerplexityResult, evaluate_perplexity
from holdfast.evaluation.sample_log import SampleLog

VOCABULARY = 50


class Uniform(nn.Module):
    """All tokens equally likely; remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, torch.Tensor]] = []
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool, **arguments: torch.Tensor) -> SimpleNamespace:
        assert not use_cache
        self.calls.append({"input_ids": input_ids, **arguments})
        self.modes.append((self.training, torch.is_grad_enabled()))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY))


class FromPosition(nn.Module):
    """Sure of the next token from a position on, uniform before. It may look ahead: it is a test."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        logits = F.one_hot(input_ids.roll(-1, 1), VOCABULARY).float() * 100
        logits[:, : self.position - 1] = 0
        return SimpleNamespace(logits=logits)


def blocks_of(count: int, length: int, **options: bool):
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, VOCABULARY, size) for size in generator.integers(1, 12, count * length)]
    blocks = pack(documents, length, eos_token_id=0, **options)
    return [blocks[n] for n in range(count)]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def test_uniform_model_has_the_perplexity_of_the_vocabulary() -> None:
    result = evaluate_perplexity(Uniform(), blocks_of(5, 16), batch_size=2, position_bins=4)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.bits_per_token == pytest.approx(math.log2(VOCABULARY), rel=1e-6)
    assert (result.blocks, result.tokens) == (5, 5 * 15)
    assert [(part.start, part.stop, part.tokens) for part in result.bins] == [
        (0, 4, 15),  # nothing predicts position 0
        (4, 8, 20),
        (8, 12, 20),
        (12, 16, 20),
    ]
    assert all(part.perplexity == pytest.approx(VOCABULARY, rel=1e-6) for part in result.bins)


def test_positions_are_those_of_the_predicted_token() -> None:
    result = evaluate_perplexity(FromPosition(8), blocks_of(3, 16), position_bins=4, progress=False)
    assert [part.perplexity for part in result.bins] == pytest.approx([VOCABULARY, VOCABULARY, 1, 1], rel=1e-5)
    early = evaluate_perplexity(FromPosition(7), blocks_of(3, 16), position_bins=16, progress=False)
    assert [part.mean_nll is not None and part.mean_nll < 1e-3 for part in early.bins] == [False] * 7 + [True] * 9
    assert early.bins[0].mean_nll is early.bins[0].perplexity is None


@pytest.mark.parametrize("length", [2, 33, 130])
def test_agrees_with_the_loss_of_transformers(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 32)
    model, blocks = tiny_llama().eval(), blocks_of(5, length)
    ids = torch.stack([block["input_ids"] for block in blocks])
    expected = model(input_ids=ids, labels=ids).loss.item()
    for batch_size in (1, 2, 5):
        result = evaluate_perplexity(model, blocks, batch_size=batch_size, progress=False)
        assert result.mean_nll == pytest.approx(expected, rel=1e-5)
        assert sum(part.tokens for part in result.bins) == result.tokens == 5 * (length - 1)


@pytest.mark.parametrize("isolate", [False, True])
def test_logits_are_made_in_slices_and_give_the_same_numbers(
    small_model: Callable[..., HybridForCausalLM], monkeypatch: pytest.MonkeyPatch, isolate: bool
) -> None:
    model, blocks = small_model(vocab_size=VOCABULARY), blocks_of(3, 40, isolate=isolate)
    if isolate:
        joined = collate_isolated(blocks)
        given = {"input_ids": joined["input_ids"], "cu_seqlens": joined["cu_seqlens"]}
        labels = joined["labels"]
    else:
        given = {"input_ids": torch.stack([block["input_ids"] for block in blocks])}
        labels = given["input_ids"]
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    counted = labels[:, 1:].flatten() != -100
    rows: list[int] = []
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 16)
    model.lm_head.register_forward_hook(lambda _, args, logits: rows.append(logits.shape[:-1].numel()))
    result = evaluate_perplexity(model, blocks, batch_size=3, position_bins=40, progress=False)
    assert rows == [16] * 7 + [8]
    assert result.tokens == counted.sum()
    assert result.mean_nll == pytest.approx(nll[counted].mean().item(), rel=1e-6)
    if not isolate:
        by_position = nll.view(3, 39).mean(0).tolist()
        assert [part.mean_nll for part in result.bins[1:]] == pytest.approx(by_position, rel=1e-5)


def test_what_a_log_holds_is_not_measured_again(tmp_path: Path) -> None:
    model, blocks, path = Uniform(), blocks_of(7, 16), tmp_path / "log.jsonl"

    def evaluate(blocks: list[dict[str, torch.Tensor]], **options: int) -> PerplexityResult:
        model.calls.clear()
        log = SampleLog(path, {"model": "uniform"})
        return evaluate_perplexity(model, blocks, log=log, progress=False, **options)

    evaluate(blocks, batch_size=2, max_blocks=3)
    result = evaluate(blocks, batch_size=2)
    assert [len(call["input_ids"]) for call in model.calls] == [1, 2, 1]
    assert result == evaluate_perplexity(Uniform(), blocks, batch_size=2, progress=False)
    assert evaluate(blocks, batch_size=5) == result
    assert model.calls == []
    changed = [*blocks[:4], {name: ids.flip(0) for name, ids in blocks[4].items()}, *blocks[5:]]
    assert evaluate(changed).tokens == result.tokens
    assert [call["input_ids"].tolist() for call in model.calls] == [[changed[4]["input_ids"].tolist()]]


def test_labels_say_what_counts() -> None:
    block = blocks_of(1, 12)[0]
    block["labels"] = torch.full((12,), -100)
    block["labels"][5] = block["input_ids"][5]
    assert evaluate_perplexity(FromPosition(5), [block], progress=False).mean_nll < 1e-3
    result = evaluate_perplexity(FromPosition(6), [block], position_bins=12, progress=False)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert [part.tokens for part in result.bins] == [0] * 5 + [1] + [0] * 6
    block["labels"][5] = -100
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate_perplexity(Uniform(), [block], progress=False)


def test_isolated_documents_are_joined_and_positions_start_again() -> None:
    model, blocks = Uniform(), blocks_of(3, 20, isolate=True)
    result = evaluate_perplexity(model, blocks, batch_size=2, position_bins=20, progress=False)
    assert [call["input_ids"].shape for call in model.calls] == [(1, 40), (1, 20)]
    assert model.calls[0]["cu_seqlens"].tolist()[-1] == 40
    lengths = torch.cat([block["cu_seqlens"].diff() for block in blocks])
    assert len(lengths) > 6
    assert [part.tokens for part in result.bins] == [0, *(int((lengths > n).sum()) for n in range(1, 20))]
    assert result.tokens == int((lengths - 1).sum())


def test_max_blocks_and_datasets_without_a_length() -> None:
    blocks = blocks_of(5, 8)
    model = Uniform()
    result = evaluate_perplexity(model, (block for block in blocks), batch_size=2, max_blocks=3, progress=True)
    assert result.blocks == 3
    assert [len(call["input_ids"]) for call in model.calls] == [2, 1]
    assert torch.equal(model.calls[1]["input_ids"][0], blocks[2]["input_ids"])


def test_a_packed_text_is_read_to_its_end() -> None:
    blocks = pack([[1, 2, 3, 4, 5]] * 4, 6, eos_token_id=0)
    assert evaluate_perplexity(Uniform(), blocks, batch_size=3, progress=False).blocks == 4


def test_model_is_read_in_eval_mode_and_put_back() -> None:
    model = Uniform().train()
    evaluate_perplexity(model, blocks_of(1, 8), progress=False)
    assert model.modes == [(False, False)]
    assert model.training


def test_bf16_model_is_measured_in_fp32() -> None:
    model = tiny_llama().bfloat16()
    blocks = blocks_of(2, 16)
    ids = torch.stack([block["input_ids"] for block in blocks])
    logits = model.eval()(input_ids=ids).logits
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()).item()
    assert evaluate_perplexity(model, blocks, progress=False).mean_nll == pytest.approx(expected, rel=1e-6)


def test_result_survives_json() -> None:
    result = evaluate_perplexity(Uniform(), blocks_of(2, 8), position_bins=8, progress=False)
    assert PerplexityResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result
    assert PerplexityResult(1, 1, 1e6, ()).perplexity == math.inf


def test_blocks_that_differ_in_length_are_named() -> None:
    blocks = [*blocks_of(3, 8), *blocks_of(1, 9)]
    for batch_size in (3, 4):
        with pytest.raises(ValueError, match="block 3 has 9 tokens, block 0 has 8"):
            evaluate_perplexity(Uniform(), blocks, batch_size=batch_size, progress=False)
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate_perplexity(Uniform(), [], progress=False)


@pytest.mark.parametrize("counts", [{"batch_size": 0}, {"position_bins": 0}, {"max_blocks": 0}])
def test_counts_below_one_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(counts))} is 0; give at least 1"):
        evaluate_perplexity(Uniform(), blocks_of(1, 8), **counts)
