"""Perplexity with its intervals, differences on the same blocks, bits per byte and the picture."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from holdfast.data.text import PackedText, byte_tokenizer, pack
from holdfast.data.token_bytes import TokenBytes
from holdfast.evaluation.perplexity import PerplexityResult, evaluate_perplexity, plot_perplexity
from holdfast.evaluation.perplexity_result import exp_interval
from holdfast.evaluation.ratios import student_quantile

VOCABULARY = 259


class Guessing(nn.Module):
    """Logits that follow from the token before: another model with another seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.logits = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))

    def forward(self, input_ids: torch.Tensor, use_cache: bool, **arguments: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits[input_ids])


def blocks_of(count: int, length: int, *, isolate: bool = False) -> list[dict[str, torch.Tensor]]:
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 250, size) for size in rng.integers(1, 40, count * length)]
    packed = pack(documents, length, eos_token_id=258, isolate=isolate)
    return [packed[index] for index in range(count)]


def test_no_interval_of_a_perplexity_ends_below_one() -> None:
    assert exp_interval((-3.0, 0.5)) == (1.0, math.exp(0.5))
    assert exp_interval(None) is None


@pytest.mark.parametrize("isolate", [False, True])
def test_the_interval_is_that_of_the_losses_of_blocks(isolate: bool) -> None:
    model, blocks = Guessing(0), blocks_of(9, 40, isolate=isolate)
    result = evaluate_perplexity(model, blocks, position_bins=4, progress=False)
    losses, tokens = [], []
    for block in blocks:
        nll = nn.functional.cross_entropy(model.logits[block["input_ids"][:-1]], block["labels"][1:], reduction="none")
        losses.append(nll[block["labels"][1:] != -100].sum().item())
        tokens.append(int((block["labels"][1:] != -100).sum()))
    errors = np.array(losses) - sum(losses) / sum(tokens) * np.array(tokens)
    half = student_quantile(8) * math.sqrt(9 / 8 * (errors**2).sum()) / sum(tokens)
    mean = sum(losses) / sum(tokens)
    assert result.interval == pytest.approx((mean - half, mean + half), rel=1e-5)
    assert result.perplexity_interval == pytest.approx((math.exp(mean - half), math.exp(mean + half)), rel=1e-4)
    assert [sum(each.nll) for each in result.by_block] == pytest.approx(losses, rel=1e-5)
    assert len({each.block for each in result.by_block}) == 9
    for part in result.bins:
        assert part.interval is not None
        assert part.interval[0] < (part.mean_nll or 0) < part.interval[1]
    alone = evaluate_perplexity(model, blocks[:1], progress=False)
    assert alone.interval is alone.perplexity_interval is alone.bins[-1].interval is None


def test_everything_can_be_computed_again_from_json() -> None:
    sizes = TokenBytes.of(byte_tokenizer())
    one, other = (
        evaluate_perplexity(Guessing(seed), blocks_of(7, 30), token_bytes=sizes, position_bins=3, progress=False)
        for seed in (0, 1)
    )
    read = [
        PerplexityResult.from_dict(json.loads(json.dumps(each.to_dict(), allow_nan=False))) for each in (one, other)
    ]
    assert read == [one, other]
    assert read[0].to_dict() == one.to_dict()
    again, difference = read[1].difference(read[0]), other.difference(one)
    assert again is not None
    assert difference is not None
    assert again.interval == difference.interval
    assert difference.value == pytest.approx(other.mean_nll - one.mean_nll)
    written = one.to_dict()
    for name in ("by_block", "bytes"):  # as before there were blocks
        del written[name]
    old = PerplexityResult.from_dict(written)
    assert (old.perplexity, old.interval, old.bits_per_byte) == (one.perplexity, None, None)
    assert old.difference(one) is None


def test_differences_are_of_the_same_blocks_alone() -> None:
    blocks = blocks_of(8, 30)
    one = evaluate_perplexity(Guessing(0), blocks[:6], progress=False)
    assert one.difference(one).interval == (0, 0)
    assert evaluate_perplexity(Guessing(1), blocks[2:], progress=False).difference(one) is None
    assert evaluate_perplexity(Guessing(1), blocks, progress=False).difference(one) is None


@pytest.mark.parametrize("isolate", [False, True])
def test_bytes_are_those_of_the_scored_tokens(isolate: bool) -> None:
    texts = ["naïve größe 東京 🙂 " * n for n in range(1, 9)]
    packed = PackedText.from_texts(texts, byte_tokenizer(), 48, isolate=isolate, progress=False)
    sizes = TokenBytes.of(byte_tokenizer())
    result = evaluate_perplexity(Guessing(0), packed, token_bytes=sizes, position_bins=4, batch_size=3, progress=False)
    scored = [block["labels"][1:][block["labels"][1:] != -100] for block in packed]
    expected = [int((labels < 256).sum()) for labels in scored]  # ends of documents stand for no byte
    assert [sum(each.bytes or ()) for each in result.by_block] == expected
    assert result.bytes == sum(expected) == sum(part.bytes or 0 for part in result.bins)
    assert 0 < result.bytes < result.tokens
    assert result.bits_per_byte == pytest.approx(result.bits_per_token * result.tokens / result.bytes)
    low, high = result.bits_per_byte_interval or (0, 0)
    assert low < result.bits_per_byte < high
    unknown = evaluate_perplexity(Guessing(0), packed, progress=False)
    assert unknown.bytes is unknown.bits_per_byte is unknown.bits_per_byte_interval is None


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: figures.append(figure) or save(figure, *args, **kw)
    )
    return figures


def found_by(*seeds: int, length: int = 64) -> dict[str, PerplexityResult]:
    blocks = blocks_of(5, length)
    return {f"seed {seed}": evaluate_perplexity(Guessing(seed), blocks, progress=False) for seed in seeds}


def legend(figure: Figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def band(axes: Axes, number: int) -> np.ndarray:
    """The corners of a band, [N, 2]: position and value."""
    return np.asarray(axes.collections[number].get_paths()[0].vertices)


def test_the_picture_of_one_has_a_line_a_band_and_the_length_of_training(tmp_path: Path, drawn: list[Figure]) -> None:
    results = found_by(0)
    path = plot_perplexity(results, tmp_path / "p.png", trained={"seed 0": 32})
    assert path.stat().st_size > 5_000
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    assert legend(drawn[0]) == ["seed 0", "trained on 32"]
    bins = results["seed 0"].bins
    assert list(axes.lines[0].get_ydata()) == [part.perplexity for part in bins]
    ends = [end for part in bins for end in part.perplexity_interval or ()]
    assert {*band(axes, 0)[:, 1].round(6)} >= {round(end, 6) for end in ends}
    with pytest.raises(ValueError, match="results is empty"):
        plot_perplexity({}, path)


def test_the_picture_of_several_has_the_paired_differences_below(tmp_path: Path, drawn: list[Figure]) -> None:
    results = found_by(0, 1, 2)
    plot_perplexity(results, tmp_path / "p.png", trained={"seed 0": 32, "seed 1": 48, "seed 2": 500})
    above, below = drawn[0].axes
    assert legend(drawn[0]) == [*results, "trained on 32", "trained on 48"]
    assert not above.collections  # bands of each would hide the differences
    for line, result in zip(above.lines, results.values(), strict=False):
        assert list(line.get_ydata()) == [part.perplexity for part in result.bins]
    assert "beyond that of\nseed 0 (%)" in below.get_ylabel()
    first, *others = results.values()
    assert len(below.collections) == len(others)
    for number, result in enumerate(others):
        found = [result.difference(first, part) for part in range(len(result.bins))]
        shown = [100 * math.expm1(each.value) for each in found if each is not None]
        assert below.lines[number].get_ydata() == pytest.approx(shown)
        ends = {round(100 * math.expm1(end), 6) for each in found if each is not None for end in each.interval or ()}
        assert {*band(below, number)[:, 1].round(6)} >= ends
        assert below.lines[number].get_color() == above.lines[number + 1].get_color()
    looks = {(line.get_color(), line.get_marker()) for line in above.lines[:3]}
    assert len(looks) == len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 3


def test_the_picture_of_results_of_other_tokens_has_no_differences(tmp_path: Path, drawn: list[Figure]) -> None:
    results = found_by(0) | {"other": found_by(1, length=32)["seed 1"]}
    plot_perplexity(results, tmp_path / "p.png")
    (axes,) = drawn[0].axes
    assert len(axes.collections) == 2
    results |= found_by(2)
    plot_perplexity(results, tmp_path / "p.png")
    above, below = drawn[1].axes
    assert (len(above.lines), len(below.collections)) == (3, 1)
