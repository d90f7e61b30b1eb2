"""Checkpoints load through transformers' Auto classes in programs that know nothing of holdfast."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from holdfast import HybridForCausalLM, HybridModel
from holdfast.checkpoints import convert
from holdfast.configuration import AUTO_FILE

PROGRAM = """
import sys
from transformers import AutoModel, AutoModelForCausalLM
assert "holdfast" not in sys.modules
source, target = sys.argv[1:]
stack = AutoModel.from_pretrained(source, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
model.save_pretrained(target)
print(type(model).__module__, type(model).__name__, type(stack).__name__)
"""


def test_loading_where_holdfast_is_not_imported(small_model: Callable[..., HybridForCausalLM], tmp_path: Path) -> None:
    source, target, modules = (tmp_path / name for name in ("source", "target", "modules"))
    small_model("gated_deltanet", "learned_eviction").save_pretrained(source)
    command = [sys.executable, "-c", PROGRAM, str(source), str(target)]
    environment = os.environ | {"HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["holdfast.modeling", "HybridForCausalLM", "HybridModel"]
    assert {path.name for path in target.glob("*.py")} == {AUTO_FILE}  # no sources are copied
    assert (target / "config.json").read_text() == (source / "config.json").read_text()


def test_the_published_format_has_none_of_it(small_model: Callable[..., HybridForCausalLM], tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    model = small_model("gated_deltanet", "learned_eviction")
    model.model.l1_lambda.copy_(torch.tensor([[-0.5, 0.25]]))  # the published rule knows no λ below 0
    model.save_pretrained(source)
    convert(source, target, format="published")
    assert load_file(target / "model.safetensors")["model.l1_lambda"].tolist() == [[0.0, 0.25]]
    assert not (target / AUTO_FILE).exists()
    assert "auto_map" not in json.loads((target / "config.json").read_text())


@pytest.mark.parametrize("tied", [True, False])
def test_the_stack_alone_loads_from_a_language_model(
    tied: bool, small_model: Callable[..., HybridForCausalLM], tmp_path: Path
) -> None:
    model = small_model("full_attention", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    for stack in (HybridModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(stack, HybridModel)
        assert all(torch.equal(weight, model.model.state_dict()[name]) for name, weight in stack.state_dict().items())
