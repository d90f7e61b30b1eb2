"""Whether TF32 is allowed, by PyTorch's two ways to say so; each in a process of its own, since they mix badly."""

import subprocess
import sys

import pytest
import torch

from holdfast.ops.precision import without_autocast

WAYS = {
    "pass": False,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('highest')": False,
    "torch.backends.cuda.matmul.allow_tf32 = True": True,
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
    "torch.backends.fp32_precision = 'tf32'": True,
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
}


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="an older PyTorch: one way only")
def test_both_ways_of_allowing_tf32_are_known() -> None:
    program = "import sys, torch\nfrom holdfast.ops.precision import allows_tf32\n{}\nsys.exit(40 + allows_tf32())"
    processes = {way: subprocess.Popen([sys.executable, "-c", program.format(way)]) for way in WAYS}
    assert {way: process.wait(120) - 40 for way, process in processes.items()} == WAYS


def test_autocast_is_left_out_only_where_it_is_on() -> None:
    x = torch.randn(3, 3)
    assert without_autocast(x) is without_autocast(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x):
            assert (x @ x).dtype == torch.float32
    assert without_autocast(x.to("meta")) is without_autocast(x)
