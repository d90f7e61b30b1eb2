"""Peak memory of a piece of work, in a process of its own."""

import operator
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from holdfast.bench import memory
from holdfast.bench.memory import peak_bytes

MIB = 1 << 20


def test_memory_that_was_given_back_counts_at_its_peak_and_that_of_this_process_does_not() -> None:
    held = b"x" * (300 * MIB)  # of the parent, which must not count
    peak = peak_bytes(operator.mul, (b"x", 150 * MIB), warm_up=(b"x", MIB), device=torch.device("cpu"))
    assert 148 * MIB < peak < 170 * MIB
    assert len(held) == 300 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="a fork is not safe")
def test_every_process_is_new_and_has_imported_what_is_measured() -> None:
    """The first, which the others do not come from, may take seconds; then none imports PyTorch again."""
    with ProcessPoolExecutor(1, mp_context=memory._processes()) as pool:
        first = pool.submit(os.getpid).result()
    with ProcessPoolExecutor(1, mp_context=memory._processes()) as pool:
        assert pool.submit(os.getpid).result() != first
        assert pool.submit(eval, "'holdfast.bench.efficiency' in __import__('sys').modules").result()
        assert pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result() == {signal.SIGINT}  # until it works
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
