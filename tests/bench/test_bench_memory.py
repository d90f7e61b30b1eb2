"""Peak memory of a piece of work, in a process of its own."""

import operator

import torch

from holdfast.bench.memory import peak_bytes

MIB = 1 << 20


def test_memory_that_was_given_back_counts_at_its_peak_and_that_of_this_process_does_not() -> None:
    held = b"x" * (300 * MIB)  # of the parent, which must not count
    peak = peak_bytes(operator.mul, (b"x", 150 * MIB), warm_up=(b"x", MIB), device=torch.device("cpu"))
    assert 148 * MIB < peak < 170 * MIB
    assert len(held) == 300 * MIB
