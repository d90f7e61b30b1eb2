"""The code of docs/ops.md runs as it stands, and what the page names is there."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.ops import gated_delta_rule, native_sparse_attention, retained_attention, window_step

PAGE = (Path(__file__).parents[2] / "docs" / "ops.md").read_text(encoding="utf-8")


def test_the_examples_run_one_after_the_other() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    sections = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert len(sections) == 7
    for code in sections:
        exec(compile(code, "docs/ops.md", "exec"), names)
    for name in ("full", "sliding", "evicted", "sparse"):
        assert names[name].shape == (2, 256, 4, 32), name
    assert not torch.equal(names["sliding"], names["evicted"])
    assert names["blocks"].shape == (2, 256, 2, 4)
    assert names["of_both"].shape == (1, 256, 4, 32)
    assert names["second"].abs().max() > 0


def test_what_the_page_names_is_there() -> None:
    rows = re.findall(r"^\| (`.+`) \| `(\w+)` \| [^|]+ \|$", PAGE.split("\n## ")[0], re.M)
    assert len(rows) == 11
    for functions, module in rows:
        for name in re.findall(r"`(\w+)`", functions):
            assert callable(getattr(importlib.import_module(f"holdfast.ops.{module}"), name)), name


def test_the_table_has_every_backend() -> None:
    found: dict[str, set[str]] = {}
    current = ""
    for op, backend in re.findall(r"^\| (?:`(\w+)`)? ?\| `(\w+)` \| ", PAGE.split("\n## Backends")[1], re.M):
        current = op or current
        found.setdefault(current, set()).add(backend)
    modules = (retained_attention, native_sparse_attention, window_step)
    expected = {module.__name__.split(".")[-1]: set(module.BACKENDS) for module in modules}
    expected["gated_delta_rule"] = set(gated_delta_rule._BACKENDS)
    assert found == expected | {"streaming_retention": {"numba", "triton"}}


@pytest.mark.parametrize("name", ["gated_delta_rule", "retained_attention", "native_sparse_attention", "window_step"])
def test_modules_keep_the_names_of_their_functions(name: str) -> None:
    module = importlib.import_module(f"holdfast.ops.{name}")
    assert getattr(importlib.import_module("holdfast.ops"), name) is module
    assert callable(getattr(module, name))
