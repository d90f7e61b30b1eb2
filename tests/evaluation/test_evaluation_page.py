"""The code of docs/evaluation.md runs as it stands, and what the page names is there."""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch

from holdfast import HybridForCausalLM
from holdfast.cli import main
from holdfast.data.text import byte_tokenizer
from holdfast.evaluation.intervals import wilson_interval
from holdfast.evaluation.ruler import RulerSettings
from holdfast.evaluation.scorers import SCORERS

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def code_of(section: str) -> CodeType:
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    return compile(code, "docs/evaluation.md", "exec")


def test_the_evaluations_of_the_page_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(code_of("From Python"), names)
    result = names["result"]
    assert result.blocks == len(names["blocks"]) > 8
    assert result.bits_per_byte == pytest.approx(result.bits_per_token)  # a byte is a token, and the text one document
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"{result.perplexity} {result.perplexity_interval} {result.bits_per_byte}"
    assert len(Path("perplexity.samples.jsonl").read_text().splitlines()) == result.blocks
    assert Path("perplexity.png").stat().st_size > 1000
    assert "A random model" in Path("inspection.html").read_text(encoding="utf-8")


def test_a_scorer_of_ones_own_is_entered_and_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = {name: SCORERS[name] for name in ("value_norm", "recency")}  # others than the page's: enough, and quick
    monkeypatch.setattr("holdfast.evaluation.scorers.SCORERS", two)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(code_of("A scorer of one's own"), names)
    assert set(names["results"]) == {
        (name, size) for name in ("value_norm", "recency", "small_values") for size in (8, 16)
    }
    assert all(found["count"] > 64 for found in names["results"].values())
    assert names["results"]["small_values", 8] != names["results"]["recency", 8]
    assert "small_values, 16 slots: " in capsys.readouterr().out


def test_perplexities_are_computed_again_from_their_file(
    small_model: Callable[..., HybridForCausalLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("All happy families are alike. " * 40)
    for seed, name in enumerate(("one", "two")):
        small_model(vocab_size=259, seed=seed).save_pretrained(name)
        byte_tokenizer().save_pretrained(name)
    options = ["--data", "text.txt", "--length", "64", "--json", "perplexity.json"]
    assert main(["evaluate", "perplexity", "one", "two", *options]) == 0
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(code_of("Perplexity, its interval, and bits per byte"), names)
    one, two = names["results"].values()
    difference = two.difference(one)
    assert difference is not None
    assert f"one {one.perplexity} {one.perplexity_interval} {one.bits_per_byte}" in capsys.readouterr().out
    assert json.loads(Path("perplexity.json").read_text())["models"]["two"]["difference"]["value"] == difference.value


def test_what_the_page_names_is_there() -> None:
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \| (`[^|]+) \|$", PAGE, re.M)
    assert len(rows) == 11
    for calls, modules in rows:
        found = [importlib.import_module(f"holdfast.evaluation.{name}") for name in re.findall(r"`(\w+)`", modules)]
        for name in re.findall(r"`(\w+)", calls):
            assert any(hasattr(module, name) for module in found), name


def test_intervals_of_so_many_answers_are_those_of_the_page() -> None:
    between = r"([\d.]+) to ([\d.]+) %"
    rows = re.findall(rf"^\| ([\d,]+) \| {between} \| {between} \| ([\d.]+) to 100 % \|$", PAGE, re.M)
    assert len(rows) == 5
    for number, *shown in rows:
        count = int(number.replace(",", ""))
        half, most, all_right = (wilson_interval(share * count, count) for share in (0.5, 0.9, 1.0))
        assert shown == [f"{100 * end:.1f}" for end in (*half, *most, all_right[0])]


def test_so_many_answers_are_needed_for_an_interval_and_no_fewer() -> None:
    rows = re.findall(r"^\| ±(\d+) points? \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", PAGE, re.M)
    assert len(rows) == 4

    def width(share: float, count: int) -> float:
        low, high = wilson_interval(share * count, count)
        return (high - low) / (1 if share == 1 else 2)

    for points, *numbers in rows:
        for share, number in zip((0.5, 0.9, 1.0), numbers, strict=True):
            count = int(number.replace(",", ""))
            assert width(share, count) <= int(points) / 100 < width(share, count - 1)


def test_depths_are_the_grid_that_the_page_tells_of() -> None:
    assert RulerSettings().depths == tuple(range(0, 101, 10))
    assert "0, 10, …, 100 %" in PAGE
