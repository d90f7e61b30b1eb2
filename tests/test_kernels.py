"""Kernels compiled ahead of time, in a process of their own: here Triton interprets them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.cli import main
from holdfast.kernels import CompiledKernel

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

NAME = "window_step/write/bf16/64/budget 0/splits 1"


@needs_triton
def test_a_small_kernel_compiles_for_both_makers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "holdfast.cli", "kernels", f"{NAME}", "--targets", "sm_90", "gfx942"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    path = tmp_path / "kernels.json"
    done = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert NAME in done.stdout
    written = json.loads(path.read_text())
    assert written["faults"] == []
    kernels = [kernel for kernel in written["kernels"] if kernel["name"] == NAME]
    assert [kernel["target"] for kernel in kernels] == ["sm_90", "gfx942"]
    for kernel in kernels:
        assert 0 < kernel["registers"] < 256
        assert kernel["spills"] == 0
        assert 0 < kernel["instructions"]["memory"] < kernel["instructions"]["all"]


def test_what_must_not_be_shipped() -> None:
    assert CompiledKernel("k", "sm_80", 255, 0, 166_912, {}).faults == []
    spilling = CompiledKernel("k", "sm_80", 255, 8, 166_913, {}).faults
    assert len(spilling) == 2
    assert "spills (8)" in spilling[0]
    assert "166913 of 166912 bytes" in spilling[1]


def test_refusals_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["kernels", "--targets", "sm_70"]) == 2
    assert "no target 'sm_70'" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["kernels"]) == 1
    assert "Triton is not installed" in capsys.readouterr().err
