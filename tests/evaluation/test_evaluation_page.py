"""The code of docs/evaluation.md runs as it stands, and what the page names is there."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast import HybridForCausalLM
from holdfast.data.needle import NeedleTask
from holdfast.evaluation.ruler import RulerSettings
from holdfast.evaluation.scorers import SCORERS

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_a_scorer_of_ones_own_is_entered_and_compared(
    small_model: Callable[..., HybridForCausalLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = {name: SCORERS[name] for name in ("value_norm", "recency")}  # others than the page's: enough, and quick
    monkeypatch.setattr("holdfast.evaluation.scorers.SCORERS", two)
    task = NeedleTask(length=48, num_pairs=6, num_keys=8, num_values=8, num_noise=4, window=6)
    names: dict[str, Any] = {"model": small_model("gated_deltanet", "learned_eviction"), "task": task}
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    exec(compile(code, "docs/evaluation.md", "exec"), names)
    assert set(names["results"]) == {
        (name, size) for name in ("value_norm", "recency", "small_values") for size in (8, 16)
    }
    assert all(found["count"] > 64 for found in names["results"].values())
    assert names["results"]["small_values", 8] != names["results"]["recency", 8]
    assert "small_values, 16 slots: " in capsys.readouterr().out


def test_what_the_page_names_is_there() -> None:
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \| (`[^|]+) \|$", PAGE, re.M)
    assert len(rows) == 10
    for calls, modules in rows:
        found = [importlib.import_module(f"holdfast.evaluation.{name}") for name in re.findall(r"`(\w+)`", modules)]
        for name in re.findall(r"`(\w+)", calls):
            assert any(hasattr(module, name) for module in found), name


def test_depths_are_the_grid_that_the_page_tells_of() -> None:
    assert RulerSettings().depths == tuple(range(0, 101, 10))
    assert "0, 10, …, 100 %" in PAGE
