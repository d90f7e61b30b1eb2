"""The demonstration from beginning to end."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from holdfast.data.needle import NeedleTask
from holdfast.demo.measure import HELD_OUT_SEED, Measurement, measure
from holdfast.demo.report import Claim, check_claim, comparison_table
from holdfast.demo.settings import SLOWEST_FIRST, TITLES, DemoSettings
from holdfast.demo.training import train_all
from holdfast.evaluation.answering import answer_questions
from holdfast.evaluation.needle import plot_accuracy_by_distance
from holdfast.evaluation.retention import plot_kept_tokens, retention_map
from holdfast.evaluation.selection import plot_selected_blocks, selection_map
from holdfast.evaluation.token_rows import needle_kinds
from holdfast.files import write_json
from holdfast.machine import available_cores, describe_machine
from holdfast.modeling import HybridForCausalLM
from holdfast.settings import SettingsError
from holdfast.training.recipe import NeedleData, Recipe, load_recipe

__all__ = ["DemoFolderError", "run_demo"]

MARKER, RESULTS = "demo.json", "results.json"


class DemoFolderError(RuntimeError):
    """The output folder holds something that the demonstration did not write."""


def run_demo(settings: DemoSettings, console: Console, progress: Console) -> dict[str, Any]:
    """Train the models, measure them, show a table and an answer, and write everything down.

    Files, in `settings.output`: the runs under the names of their recipes, logs/, results.json,
    accuracy_by_distance.png, kept_tokens.png and selected_blocks.png.

    Args:
        settings: what was chosen.
        console: for the results.
        progress: for what happens on the way.

    Returns:
        What results.json holds.

    Raises:
        DemoFolderError: if the output folder holds something else.
        ChildFailedError: if a training process fails.
    """
    started = time.monotonic()
    recipes = {name: settings.recipe(name) for name in TITLES}
    _claim_folder(settings, progress)
    todo = [recipes[name] for name in SLOWEST_FIRST if not (settings.keep and _is_finished(recipes[name]))]
    if todo:
        jobs = min(settings.jobs or available_cores(), len(todo))
        progress.print(f"Training {len(todo)} models, {jobs} at a time, into {settings.output}.", soft_wrap=True)
        train_all(todo, settings.output / "logs", jobs, progress)
    progress.print("Measuring.")
    results = {
        name: measure(settings.output / name, _task(recipe), settings.samples) for name, recipe in recipes.items()
    }
    claim = check_claim(results)
    plot_accuracy_by_distance(
        {TITLES[name]: result.needle for name, result in results.items()},
        settings.output / "accuracy_by_distance.png",
    )
    model = HybridForCausalLM.from_pretrained(settings.output / "needle-lalte")
    task = _task(recipes["needle-lalte"])
    _draw_kept(model, task, settings.output / "kept_tokens.png")
    sparse = HybridForCausalLM.from_pretrained(settings.output / "needle-lansa")
    _draw_selected(sparse, task, settings.output / "selected_blocks.png")
    written = _results(settings, recipes, results, claim, time.monotonic() - started)
    write_json(settings.output / RESULTS, written)
    _show(model, task, results, claim, settings, console)
    return written


def _claim_folder(settings: DemoSettings, progress: Console) -> None:
    """Make the output folder this demonstration's, or raise."""
    folder = settings.output
    if folder.exists() and not folder.is_dir():
        raise DemoFolderError(f"{folder} is not a folder; give another one with --output.")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise DemoFolderError(f"{folder} holds something that no demo wrote; give another folder with --output.")
        what = "Models that do not fit and all results" if settings.keep else "The models and results"
        progress.print(f"{what} of an earlier demo in {folder} are replaced.", soft_wrap=True)
    values = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(settings).items()}
    write_json(folder / MARKER, values)


def _is_finished(recipe: Recipe) -> bool:
    """Whether the run of this very recipe has left its model."""
    directory = Path(recipe.output.directory) / recipe.name
    if not (directory / "summary.json").is_file():
        return False
    try:
        before = load_recipe(directory / "recipe.toml")
    except (OSError, SettingsError):
        return False
    return dataclasses.replace(before, output=recipe.output) == recipe


def _task(recipe: Recipe) -> NeedleTask:
    assert isinstance(recipe.data, NeedleData)
    return recipe.data.task


def _draw_kept(model: HybridForCausalLM, task: NeedleTask, path: Path) -> None:
    ids = task.sample(HELD_OUT_SEED, 1)["input_ids"][0]
    plot_kept_tokens(
        retention_map(model, ids), needle_kinds(task, ids.tolist()), path, title="What laLTE holds after one sample"
    )


def _draw_selected(model: HybridForCausalLM, task: NeedleTask, path: Path) -> None:
    """What the first question reads whose answer lies beyond the window, or the last one."""
    sample = task.sample(HELD_OUT_SEED, 1)
    distance = sample["distance"][0]
    beyond = (distance > task.window).nonzero().flatten()
    answer = int(beyond[0] if len(beyond) else distance.nonzero()[-1])
    ids = sample["input_ids"][0, :answer]
    title = f"What laNSA reads when it is asked for a value {int(distance[answer])} tokens ago"
    plot_selected_blocks(selection_map(model, ids), needle_kinds(task, ids.tolist()), path, title=title)


def _results(
    settings: DemoSettings,
    recipes: dict[str, Recipe],
    results: dict[str, Measurement],
    claim: Claim,
    seconds: float,
) -> dict[str, Any]:
    models = {}
    for name, result in results.items():
        recipe = dataclasses.asdict(recipes[name])
        del recipe["output"]  # a path of this machine says nothing elsewhere
        models[name] = {"title": TITLES[name], **result.to_dict(), "recipe": recipe}
    return {
        "shortened": settings.shortened,
        "claim": dataclasses.asdict(claim),
        "seed": settings.seed,
        "evaluation_seed": HELD_OUT_SEED,
        "seconds": round(seconds, 1),
        "environment": describe_machine(),
        "models": models,
    }


def _show(
    model: HybridForCausalLM,
    task: NeedleTask,
    results: dict[str, Measurement],
    claim: Claim,
    settings: DemoSettings,
    console: Console,
) -> None:
    console.print(comparison_table(results, settings.shortened))
    console.print(
        "In brackets: 95 % intervals. Chance is "
        f"{1 / task.num_values:.1%}. Cache: fp32, one sequence. tokens/s: on one thread."
    )
    dialogue = answer_questions(model, task, seed=HELD_OUT_SEED)
    console.print("\nlaLTE reads, one `generate` per answer:")
    console.print(dialogue.prompt)
    table = Table(box=None, show_header=False)
    for answer in dialogue.answers:
        place = "within" if answer.distance <= task.window else "beyond"
        mark = Text("✓", "green") if answer.correct else Text("✗", "red")
        table.add_row(
            f"{answer.question}?",
            f"expected {answer.expected}",
            f"given {answer.given}",
            mark,
            f"{answer.distance} tokens ago, {place} the window",
        )
    console.print(table)
    console.print(f"\n{claim.sentence}")
    if settings.shortened:
        console.print("This was a shortened run: `holdfast demo` trains each model to the end of its recipe.")
    console.print(f"Numbers, pictures and models are in {settings.output}.", soft_wrap=True)
