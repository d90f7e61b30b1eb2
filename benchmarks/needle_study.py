"""Lengths beyond training, several turns, and other scorers, for the models of the demo; writes benchmarks/results.

    holdfast demo --seed 0 --output runs/demo0    # and seeds 1 and 2
    python benchmarks/needle_study.py runs/demo0 runs/demo1 runs/demo2

The variants of the scorer are trained first, into runs/scorers, where finished ones are used again.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from holdfast.cli.common import quieten_transformers, read_model, read_task
from holdfast.data.turns import NeedleTurns, TurnPlan
from holdfast.evaluation.needle import evaluate_needle
from holdfast.evaluation.scorers import scoring
from holdfast.evaluation.turns import evaluate_turns
from holdfast.files import write_json
from holdfast.machine import describe_machine

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = ("needle-gdn", "needle-gdn-swa", "needle-lalte", "needle-lansa", "needle-gdn-full")
TIMES = (1, 2, 4, 8)
"""Lengths, in lengths of training."""
BUDGETS = (8, 16, 24, 32, 40, 64)
_KERNEL, _DILATION = (f"--model.mixer-options.learned-eviction.conv-{part}" for part in ("size", "dilation"))
VARIANTS = {
    "CNN, R = 7": [_DILATION, "1", "1", "1"],
    "CNN, R = 13, no deferral": ["--model.mixer-options.learned-eviction.scorer-causal"],
    "MLP, no context": [_KERNEL, "1", "1", "1", _DILATION, "1", "1", "1"],
}


def lengths(run: Path) -> list[dict[str, Any]]:
    """Accuracy at lengths of training and beyond: as many pairs, in more noise."""
    trained_on, model = read_task(run), read_model(run)
    found = []
    for times in TIMES:
        task = dataclasses.replace(trained_on, length=times * trained_on.length)
        result = evaluate_needle(model, task, samples=256)
        found.append({"length": task.length, "within": result.within.to_dict(), "beyond": result.beyond.to_dict()})
    return found


def turns(run: Path) -> dict[str, Any]:
    """Eight turns, in each four pairs told and two asked for, aside and in the stream."""
    task, plan = read_task(run), TurnPlan(turns=8, facts=4, questions=2)
    shares = {}
    for name, asides in (("aside", True), ("in the stream", False)):
        script = NeedleTurns(plan, task, (task.length - 1) // plan.turns, asides=asides)
        shares[name] = evaluate_turns(read_model(run), script, conversations=128).to_dict()
    return shares


def budgets(run: Path) -> list[dict[str, Any]]:
    """Accuracy with stores of other sizes, without further training."""
    task, model = read_task(run), read_model(run)
    found = []
    for budget in BUDGETS:
        with scoring(model, "trained", budget):
            found.append({"budget": budget, "beyond": evaluate_needle(model, task).beyond.to_dict()})
    return found


def trained(variant: str, seed: int, folder: Path) -> Path:
    """The run of a laLTE with another scorer, trained if it is not there yet."""
    folder = folder / f"{variant.replace(', ', '-').replace(' ', '').lower()}-seed{seed}"
    run = folder / "needle-lalte"
    if not (run / "model.safetensors").is_file():
        command = [sys.executable, "-m", "holdfast.cli", "train", "needle-lalte", "--training.seed", str(seed)]
        command += [*VARIANTS[variant], "--output.directory", str(folder), "--output.overwrite"]
        subprocess.run(command, check=True)
    return run


def study(what: str, measure: Callable[[Path], Any], runs: Iterable[tuple[str, Path]]) -> dict[str, Any]:
    """`measure` of every run, listed by model, with the machine."""
    values: dict[str, list[Any]] = {}
    for name, run in runs:
        print(f"{what}: {name}, {run}", flush=True)
        values.setdefault(name, []).append(measure(run))
    return {"what": what, "environment": describe_machine(), "values": values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="+", type=Path, help="directories of demos, one per seed")
    parser.add_argument("--scorers", type=Path, default=Path("runs/scorers"), help="where variants are trained")
    parser.add_argument("--parts", nargs="+", default=["lengths", "turns", "variants"])
    given = parser.parse_args()
    quieten_transformers()
    runs = [(name, demo / name) for name in MODELS for demo in given.demos]
    if "lengths" in given.parts:
        what = "accuracy within and beyond the window at 1, 2, 4 and 8 times the length of training, 256 samples"
        write_json(RESULTS / "needle-lengths.json", study(what, lengths, runs))
    if "turns" in given.parts:
        what = "facts of earlier turns: 8 turns, 4 pairs told and 2 asked for in each, 128 conversations"
        write_json(RESULTS / "turns.json", study(what, turns, runs))
    if "variants" in given.parts:
        variants = [("CNN, R = 13", demo / "needle-lalte") for demo in given.demos]
        variants += [
            (name, trained(name, seed, given.scorers)) for name in VARIANTS for seed in range(len(given.demos))
        ]
        what = "accuracy beyond the window of laLTE with other scorers, trained with 40 slots, by budget, 512 samples"
        write_json(RESULTS / "scorer-variants.json", study(what, budgets, variants))


if __name__ == "__main__":
    main()
