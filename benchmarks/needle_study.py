"""Lengths beyond training, several turns, and other scorers, for the models of the demo; writes benchmarks/results.

    holdfast demo --seed 0 --output runs/demo0    # and seeds 1 and 2
    python benchmarks/needle_study.py runs/demo0 runs/demo1 runs/demo2

The variants of the scorer, models whose λ is steered to a budget, and these with switches of training set otherwise,
are trained first, into runs/needle-study.
Finished ones are used again, and interrupted ones go on; a directory with a run by other settings is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from books_study import course

from holdfast.cli.common import quieten_transformers, read_model, read_task
from holdfast.cli.train import chosen_recipe
from holdfast.data.turns import NeedleTurns, TurnPlan
from holdfast.evaluation.needle import evaluate_needle
from holdfast.evaluation.scorers import scoring
from holdfast.evaluation.turns import evaluate_turns
from holdfast.files import write_json
from holdfast.machine import describe_machine
from holdfast.training.history import read_history
from holdfast.training.run_directory import holds

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = ("needle-gdn", "needle-gdn-swa", "needle-lalte", "needle-lansa", "needle-gdn-full")
TIMES = (1, 2, 4, 8)
"""Lengths, in lengths of training."""
PARTS = ("lengths", "turns", "variants", "steered", "switches")
BUDGETS = (8, 16, 24, 32, 40, 64)
_KERNEL, _DILATION = (f"--model.mixer-options.learned-eviction.conv-{part}" for part in ("size", "dilation"))
VARIANTS = {
    "CNN, R = 13": [],
    "CNN, R = 7": [_DILATION, "1", "1", "1"],
    "CNN, R = 13, no deferral": ["--model.mixer-options.learned-eviction.scorer-causal"],
    "MLP, no context": [_KERNEL, "1", "1", "1", _DILATION, "1", "1", "1"],
}
_BUDGET = "--model.mixer-options.learned-eviction.budget"
STEERED = {
    "b = 16": [_BUDGET, "16"],
    "b = 64": [_BUDGET, "64"],
    "b = 256": [
        _BUDGET,
        "256",
        "--model.max-position-embeddings",
        "512",
        "--data.task.length",
        "512",
        "--data.curriculum",
        *["0", "4", "24", "280", "8", "48", "400", "16", "512"],
    ],
}
"""Steered to a budget; 256 pairs want more than 128 tokens."""
_AT_ONCE = ["--retention.eviction-start", "0"]
_EXPLORING = ["--retention.exploration", "0.33", "--retention.exploration-end", "0.6"]
SWITCHES = {
    "exploration": [],
    "budget not enforced": ["--retention.no-enforce-budget"],
    "no exploration": ["--retention.exploration", "0"],
    "exploration and soft gate": ["--retention.soft-gate", "1", "--retention.soft-gate-end", "0.6"],
    "eviction from step 0": _AT_ONCE,
    "eviction from step 0, scorer frozen till 500": [*_AT_ONCE, "--retention.scorer-freeze-steps", "500"],
    "one scorer for both heads": ["--model.mixer-options.learned-eviction.scorer-sharing", "layer"],
    "one lambda for both heads": ["--controller.sharing", "layer"],
}
"""One switch of `needle-lalte-steered` with exploration set otherwise, at b = 16; without it that is the recipe."""
MOST_SEEDS = {"b = 256": 2}
"""Of variants that take a quarter of an hour each."""


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


def steered(run: Path) -> dict[str, Any]:
    """Pairs that each head kept over the last steps, the course of them, and accuracy."""
    result = evaluate_needle(read_model(run), read_task(run))
    return course(read_history(run)) | {"within": result.within.to_dict(), "beyond": result.beyond.to_dict()}


class Trainings:
    """Runs of a recipe with other settings, which are trained if they are not there yet."""

    def __init__(self, folder: Path, seeds: int, jobs: int) -> None:
        self.folder, self.seeds, self.jobs = folder, seeds, jobs

    def of(self, recipe: str, variants: Mapping[str, list[str]]) -> list[tuple[str, Path]]:
        """The runs of every variant, one per seed, as (variant, directory); all are finished when this returns."""
        wanted = [
            (name, seed)
            for seed, name in itertools.product(range(self.seeds), variants)
            if seed < MOST_SEEDS.get(name, self.seeds)
        ]
        with ThreadPoolExecutor(self.jobs) as pool:
            places = list(pool.map(lambda run: self._train(recipe, *run, variants[run[0]]), wanted))
        return [(name, place) for (name, _), place in zip(wanted, places, strict=True)]

    def _train(self, recipe: str, name: str, seed: int, settings: list[str]) -> Path:
        place = self.folder / f"{name.replace(', ', '-').replace(' ', '').lower()}-seed{seed}"
        overrides = ["--training.seed", str(seed), *settings, "--output.directory", str(place)]
        if not holds(place / recipe, chosen_recipe(recipe, overrides)):
            subprocess.run([sys.executable, "-m", "holdfast.cli", "train", recipe, "--resume", *overrides], check=True)
        return place / recipe


def study(what: str, measure: Callable[[Path], Any], runs: Iterable[tuple[str, Path]]) -> dict[str, Any]:
    """`measure` of every run, listed by model, with the machine."""
    values: dict[str, list[Any]] = {}
    for name, run in runs:
        print(f"{what}: {name}, {run}", flush=True)
        values.setdefault(name, []).append(measure(run))
    return {"what": what, "environment": describe_machine(), "values": values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", type=Path, help="directories of demos, one per seed")
    parser.add_argument("--runs", type=Path, default=Path("runs/needle-study"), help="where variants are trained")
    parser.add_argument("--seeds", type=int, default=3, help="of the variants")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time; OMP_NUM_THREADS=1 suits several")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    given = parser.parse_args()
    if not given.demos and {"lengths", "turns"} & {*given.parts}:
        parser.error("lengths and turns are measured of demos: name their directories, or other --parts.")
    quieten_transformers()
    runs = [(name, demo / name) for name in MODELS for demo in given.demos]
    trainings = Trainings(given.runs, given.seeds, given.jobs)
    if "lengths" in given.parts:
        what = "accuracy within and beyond the window at 1, 2, 4 and 8 times the length of training, 256 samples"
        write_json(RESULTS / "needle-lengths.json", study(what, lengths, runs))
    if "turns" in given.parts:
        what = "facts of earlier turns: 8 turns, 4 pairs told and 2 asked for in each, 128 conversations"
        write_json(RESULTS / "turns.json", study(what, turns, runs))
    if "variants" in given.parts:
        what = "accuracy beyond the window of laLTE with other scorers, trained with 40 slots, by budget, 512 samples"
        write_json(RESULTS / "scorer-variants.json", study(what, budgets, trainings.of("needle-lalte", VARIANTS)))
    if "steered" in given.parts:
        what = "pairs that heads keep at the end of training, steered to a budget, on the needle task"
        by_budget = trainings.of("needle-lalte-steered", STEERED)
        write_json(RESULTS / "needle-steered.json", study(what, steered, by_budget))
    if "switches" in given.parts:
        what = "switches of training on the needle task, steered to b = 16: pairs kept at the end, and accuracy"
        switched = {name: [*STEERED["b = 16"], *_EXPLORING, *overrides] for name, overrides in SWITCHES.items()}
        by_switch = trainings.of("needle-lalte-steered", switched)
        write_json(RESULTS / "switches.json", study(what, steered, by_switch))


if __name__ == "__main__":
    main()
