"""What a decoded token gains from C++ linear layers and from threads; writes benchmarks/results/one-token.json.

The model of `holdfast bench decode` after 2,048 tokens, alone in the process; the variants take turns at every token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from holdfast.bench.models import contenders
from holdfast.bench.settings import DecodeSettings
from holdfast.bench.setup import Setup
from holdfast.files import write_json
from holdfast.machine import describe_machine
from holdfast.ops import one_token

RESULTS = Path(__file__).resolve().parent / "results" / "one-token.json"
WARM_UP, STEPS = 20, 400


def alone(*_: int) -> tuple[None, int]:
    """No team of threads."""
    return None, 1


def main() -> None:
    setup = Setup.of(DecodeSettings(peers=False))
    model = contenders(setup.settings, setup.device, setup.dtype)[0].model.eval()
    ids = torch.randint(0, 100, (1, 2048), generator=torch.Generator().manual_seed(0))
    ours, team = one_token.linear, one_token._team
    variants: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "PyTorch's linear layers": (F.linear, alone),
        "linear layers in C++, one thread": (ours, alone),
        "linear layers and slots in C++, all threads": (ours, team),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        for _ in range(WARM_UP + STEPS):
            for name, (one_token.linear, one_token._team) in variants.items():
                start = time.perf_counter()
                model(ids[:, :1], past_key_values=cache, use_cache=True)
                seconds[name].append(time.perf_counter() - start)
    found = {}
    for name, values in seconds.items():
        timed = np.array(values[WARM_UP:])
        found[name] = {"minimum": timed.min(), "median": np.median(timed), "p99": np.quantile(timed, 0.99)}
        found[name]["samples"] = [round(value, 6) for value in values[WARM_UP:]]
    what = f"seconds of a token after 2,048, 43 M parameters, {STEPS} tokens of each variant in turn"
    write_json(RESULTS, {"what": what, "environment": describe_machine(), "values": found})
    for name, each in found.items():
        print(name, *(f"{key} {1e3 * each[key]:.1f} ms" for key in ("minimum", "median", "p99")), sep="  ")


if __name__ == "__main__":
    main()
