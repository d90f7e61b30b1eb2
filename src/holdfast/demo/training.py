"""Training several recipes at a time, each in a process of its own with one thread, under one progress display."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from holdfast.files import replacing
from holdfast.settings import to_toml
from holdfast.training.metrics import read_metrics
from holdfast.training.recipe import Recipe

__all__ = ["ChildFailedError", "train_all"]

POLL_SECONDS = 0.25
SECONDS_TO_END = 5
LINES_SHOWN = 15
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


class ChildFailedError(RuntimeError):
    """A training process ended with an error; the message names the model and its log."""


def train_all(recipes: Sequence[Recipe], logs: Path, jobs: int, console: Console) -> None:
    """Train the recipes in the order given, `jobs` at a time; return when all have finished.

    Whatever ends this call early, an interrupt and a termination included, ends the processes too.

    Args:
        recipes: to train; each is written to `logs`/NAME.toml, and what its process prints to `logs`/NAME.log.
        logs: folder for these files.
        jobs: processes at a time, at least 1.
        console: for the progress display; where it is no terminal, a line at every fifth of a run.

    Raises:
        ChildFailedError: if a process fails. The last lines of its log have then been printed.
    """
    waiting = [_Child(recipe, logs) for recipe in recipes]
    running: list[_Child] = []
    display = _Display(waiting, console)
    with _termination_as_exit(), display:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    child = waiting.pop(0)
                    child.start()
                    running.append(child)
                time.sleep(POLL_SECONDS)
                for child in running:
                    display.show(child)
                    child.raise_if_failed(console)
                running = [child for child in running if not child.finished]
        finally:
            _stop([child.process for child in running if child.process is not None])


class _Child:
    """One training process."""

    def __init__(self, recipe: Recipe, logs: Path) -> None:
        self.recipe = recipe
        self.recipe_file, self.log_file = logs / f"{recipe.name}.toml", logs / f"{recipe.name}.log"
        self.metrics_file = Path(recipe.output.directory) / recipe.name / "metrics.jsonl"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with replacing(self.recipe_file) as file:
            file.write_text(to_toml(self.recipe), encoding="utf-8")
        self.metrics_file.unlink(missing_ok=True)  # of an earlier run: its steps must not be shown
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "holdfast.cli", "train", str(self.recipe_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ONE_THREAD,
            )

    @property
    def finished(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def latest(self) -> dict[str, Any]:
        """The metrics logged last; empty before the first."""
        lines = [line for line in read_metrics(self.metrics_file) if "loss" in line]
        return lines[-1] if lines else {}

    def raise_if_failed(self, console: Console) -> None:
        if self.process is None or self.process.poll() in (None, 0):
            return
        lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        console.print("\n".join(lines[-LINES_SHOWN:]), markup=False)
        raise ChildFailedError(
            f"The training of {self.recipe.name} ended with status {self.process.returncode}; "
            f"all that it printed is in {self.log_file}."
        )


class _Display:
    """A bar per model and one for all of them; without a terminal, lines."""

    def __init__(self, children: Sequence[_Child], console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:15}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]:24}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {}
        self._steps: dict[str, int] = {}
        for child in children:
            name, steps = child.recipe.name, child.recipe.training.max_steps
            self._bars[name] = self._progress.add_task(name, total=steps, note="", start=False)
            self._steps[name] = 0
        total = sum(child.recipe.training.max_steps for child in children)
        self._all = self._progress.add_task("all", total=total, note="")

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *args: object) -> None:
        self._progress.stop()

    def show(self, child: _Child) -> None:
        name, total, latest = child.recipe.name, child.recipe.training.max_steps, child.latest()
        step = latest.get("step", 0)
        note = f"loss {latest['loss']:.3f}" if latest.get("loss") is not None else "starting"
        if "stored_mean" in latest:
            note += f", {latest['stored_mean']:.0f} in the store"
        self._progress.start_task(self._bars[name])
        before, self._steps[name] = self._steps[name], step
        self._progress.update(self._bars[name], completed=step, note=note)
        self._progress.update(self._all, completed=sum(self._steps.values()))
        if not self._console.is_terminal and before * 5 // total < step * 5 // total:
            self._console.print(f"{name}: step {step} of {total}, {note}")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the processes that still run: all are asked at once, and those that do not end in time are killed."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait(timeout=SECONDS_TO_END)
    except BaseException as error:  # a second interrupt must leave nothing behind either
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise


@contextmanager
def _termination_as_exit() -> Iterator[None]:
    """Let a SIGTERM run the `finally` blocks, as an interrupt does."""

    def leave(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not in the main thread, where signals do not arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
