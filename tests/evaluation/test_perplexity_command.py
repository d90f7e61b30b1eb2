"""`holdfast evaluate perplexity` of several models."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast import HybridForCausalLM
from holdfast.cli import main
from holdfast.data.text import PackedText, byte_tokenizer, load_text, train_tokenizer
from holdfast.evaluation.perplexity import PerplexityResult, evaluate_perplexity
from refusals import refused

LINES = "It was the best of times, it was the wörst of times: {}. "


@pytest.fixture(scope="module")
def models(small_model: Callable[..., HybridForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two` read bytes, `words` reads longer tokens, and `tasks` no text."""
    folder = tmp_path_factory.mktemp("models")
    text = "".join(LINES.format(number) for number in range(60))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    for seed, name in enumerate(("one", "two", "words", "tasks")):
        words = train_tokenizer([text], 300, progress=False)
        model = small_model(vocab_size=300, max_position_embeddings=48, seed=seed)
        model.save_pretrained(folder / name)
        if name != "tasks":
            (words if name == "words" else byte_tokenizer()).save_pretrained(folder / name)
    return folder


def evaluate(models: Path, *names: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
    argv = ["evaluate", "perplexity", *(str(models / name) for name in names), "--data", str(models / "text.txt")]
    assert main([*argv, "--json", str(models / "out.json"), *options]) == 0
    return json.loads((models / "out.json").read_text())


def test_several_models_in_one_table_and_one_file(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(models, "one", "two", options=("--bins", "3", "--plot", str(models / "p.png")))
    assert list(found["models"]) == ["one", "two"]
    out = capsys.readouterr().out
    for shown in ("0 to 15", "32 to 47", "than that of one.", "bits per byte", "do not cover the seeds of training"):
        assert shown in out
    assert (models / "p.png").stat().st_size > 5_000
    blocks = PackedText.from_texts(load_text(models / "text.txt"), byte_tokenizer(), 48, progress=False)
    results = {}
    for name, written in found["models"].items():
        results[name] = PerplexityResult.from_dict(written)
        model = HybridForCausalLM.from_pretrained(models / name)
        expected = evaluate_perplexity(model, blocks, position_bins=3, progress=False)
        assert results[name].perplexity == pytest.approx(expected.perplexity, rel=1e-6)
        low, high = expected.perplexity_interval or (0, 0)
        assert f"{expected.perplexity:.3f} ({low:.3f} to {high:.3f})" in out
    difference = results["two"].difference(results["one"])
    assert difference is not None
    assert found["models"]["one"]["difference"] is None
    written = found["models"]["two"]["difference"]
    assert (written["to"], written["value"]) == ("one", difference.value)
    assert written["interval"] == list(difference.interval or ())
    by_bin = [
        part.mean_nll - other.mean_nll for part, other in zip(results["two"].bins, results["one"].bins, strict=True)
    ]
    assert [part["value"] for part in written["bins"]] == pytest.approx(by_bin)
    for part in [written, *written["bins"]]:
        low, high = (100 * math.expm1(end) for end in part["interval"])
        assert f"{100 * math.expm1(part['value']):+.2f}% ({low:+.2f}% to {high:+.2f}%)" in out


def test_progress_says_which_model_how_many_tokens_and_how_long(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.data.progress.SECONDS_BETWEEN_LINES", -1.0)
    for limit in ((), ("--samples", "5")):
        found = evaluate(models, "one", "two", options=("--batch-size", "2", *limit))["models"]
        lines = capsys.readouterr().err.splitlines()
        for number, name in enumerate(("one", "two"), start=1):
            blocks = found[name]["blocks"]
            start = f"perplexity, model {number} of 2 ({48 * blocks:,} tokens): "
            shown = [line.removeprefix(start) for line in lines if line.startswith(start)]
            assert len(shown) == math.ceil(blocks / 2)
            assert all(line.endswith(" left") for line in shown[1:])
    found = evaluate(models, "one")["models"]
    assert f"perplexity ({48 * found['one']['blocks']:,} tokens): 0 of " in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--samples", "12")])
def test_models_with_other_tokenizers_read_the_same_text(
    models: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    found = evaluate(models, "one", "words", options=options)["models"]
    assert found["one"]["tokens"] > 1.5 * found["words"]["tokens"]
    # All but the first token of each block, and what is left of the last, are the same bytes.
    edges = found["one"]["blocks"] + 20 * found["words"]["blocks"] + 150
    assert abs(found["one"]["bytes"] - found["words"]["bytes"]) < edges < found["one"]["bytes"]
    assert found["words"]["difference"] is None
    assert "other tokens" in capsys.readouterr().out
    for result in found.values():
        low, high = result["bits_per_byte_interval"]
        assert low < result["bits_per_byte"] < high
        assert sum(map(sum, result["by_block"]["bytes"])) == result["bytes"]


def test_an_unfit_model_among_several_is_named(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--data", str(models / "text.txt")]
    argv = ["perplexity", str(models / "one"), str(models / "tasks"), *text]
    assert f"{models / 'tasks'} has no tokenizer.json" in refused(capsys, *argv)
    assert "Give at least one model directory" in refused(capsys, "perplexity", *text)
    assert "--plot is p.txt; give a file that ends in .png" in refused(capsys, *argv[:2], *text, "--plot", "p.txt")


def test_more_samples_than_there_are_are_told_of(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = evaluate(models, "one", options=("--samples", "9999"))["models"]["one"]["blocks"]
    assert f"text.txt has {blocks} blocks, fewer than --samples 9,999." in " ".join(capsys.readouterr().err.split())
    evaluate(models, "one", options=("--samples", "2"))
    assert "fewer than" not in capsys.readouterr().err
