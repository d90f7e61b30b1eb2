"""The demonstration: a tiny run from end to end, what it refuses, and how it ends early."""

import json
import os
import signal
import subprocess
import time
import types
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console

from holdfast.cli import main
from holdfast.data.needle import NeedleTask
from holdfast.demo import training
from holdfast.demo.measure import Measurement
from holdfast.demo.report import check_claim, comparison_table
from holdfast.demo.runner import DemoFolderError, run_demo
from holdfast.demo.settings import SLOWEST_FIRST, TITLES, DemoSettings
from holdfast.evaluation.needle import NeedleResult, Tally
from holdfast.training.recipe import load_recipe

QUIET = Console(quiet=True)


@pytest.mark.timeout(900)  # four processes import everything; a busy machine takes its time
def test_a_tiny_demo_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo"
    argv = ["demo", "--steps", "2", "--samples", "6", "--seed", "3", "--output", str(output)]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "(shortened run)" in shown
    rows = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert rows == list(TITLES.values())
    assert shown.count("expected v") == 16
    assert "The claim does not show in this run" in shown

    results = json.loads((output / "results.json").read_text())
    assert list(results["models"]) == list(TITLES)
    assert (results["shortened"], results["seed"]) == (True, 3)
    assert results["environment"]["packages"]["torch"]
    for name, model in results["models"].items():
        assert model["training"]["steps"] == 2
        assert model["recipe"]["training"]["seed"] == 3
        assert NeedleResult.from_dict(model["needle"]).samples == 6
        grew = model["cache_bytes"]["1280"] > model["cache_bytes"]["128"]
        assert grew == (name in ("needle-gdn-full", "needle-lansa"))
        assert model["tokens_per_second"] > 0
        assert (model["stored"] is None) == (name != "needle-lalte")
        assert (output / name / "model.safetensors").is_file()
    for picture in ("accuracy_by_distance.png", "kept_tokens.png", "selected_blocks.png"):
        assert imread(output / picture).std() > 0.05

    written = {name: (output / name / "model.safetensors").stat().st_mtime_ns for name in TITLES}
    assert main([*argv, "--keep"]) == 0
    again = capsys.readouterr()
    assert "are replaced" in again.err
    assert "Training" not in again.err
    assert written == {name: (output / name / "model.safetensors").stat().st_mtime_ns for name in TITLES}
    accuracy = [model["needle"] for model in json.loads((output / "results.json").read_text())["models"].values()]
    assert accuracy == [model["needle"] for model in results["models"].values()]


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(DemoFolderError, match="that no demo wrote"):
        run_demo(DemoSettings(output=tmp_path, steps=1), QUIET, QUIET)
    with pytest.raises(DemoFolderError, match="is not a folder"):
        run_demo(DemoSettings(output=tmp_path / "thesis.tex", steps=1), QUIET, QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "ten years"


def test_a_shortened_run_keeps_the_proportions() -> None:
    for name in TITLES:
        whole, short = load_recipe(name), DemoSettings(short=True).recipe(name)
        scale = short.training.max_steps / whole.training.max_steps
        assert scale < 1
        assert [stage[1:] for stage in short.data.curriculum] == [stage[1:] for stage in whole.data.curriculum]
        for (start, *_), (before, *_) in zip(short.data.curriculum, whole.data.curriculum, strict=True):
            assert start == pytest.approx(before * scale, abs=0.5)
        assert (short.model, short.controller, short.data.task) == (whole.model, whole.controller, whole.data.task)
        assert DemoSettings().recipe(name).data == whole.data
        assert DemoSettings().recipe(name).training.max_steps == whole.training.max_steps
    assert DemoSettings(short=True).shortened
    assert not DemoSettings().shortened
    assert sorted(SLOWEST_FIRST) == sorted(TITLES)


def test_stages_that_fall_together_leave_the_last() -> None:
    recipe = DemoSettings(steps=1).recipe("needle-lalte")
    assert recipe.data.curriculum == ((0, *load_recipe("needle-lalte").data.curriculum[-1][1:]),)
    assert recipe.training.warmup_steps == 0


def test_settings_out_of_range_are_named() -> None:
    for name in ("steps", "samples", "jobs"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            DemoSettings(**{name: 0})
    with pytest.raises(ValueError, match="seed must be 0 or more"):
        DemoSettings(seed=-1)


def replace_training(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> list[subprocess.Popen[bytes]]:
    """Run a shell script in place of every training process; the list fills with the processes started."""
    program = folder / "program"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    fake = types.SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    fake.TimeoutExpired = subprocess.TimeoutExpired
    monkeypatch.setattr(training.sys, "executable", str(program))
    monkeypatch.setattr(training, "subprocess", fake)
    return started


@pytest.mark.parametrize("script", ["exec sleep 600", "trap '' TERM; while :; do sleep 0.1; done"])
def test_an_interrupt_stops_the_children(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = replace_training(monkeypatch, tmp_path, script)
    monkeypatch.setattr(training, "SECONDS_TO_END", 1)

    def interrupt(seconds: float) -> None:
        time.sleep(0.3)  # long enough for the trap to be set
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "time", types.SimpleNamespace(sleep=interrupt))
    recipes = [DemoSettings(output=tmp_path, steps=1000).recipe(name) for name in SLOWEST_FIRST]
    with pytest.raises(KeyboardInterrupt):
        training.train_all(recipes, tmp_path / "logs", 2, QUIET)
    assert len(started) == 2
    assert all(process.wait(timeout=10) < 0 for process in started)


def test_termination_stops_the_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = replace_training(monkeypatch, tmp_path, "exec sleep 600")
    handler = signal.getsignal(signal.SIGTERM)
    fake = types.SimpleNamespace(sleep=lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(training, "time", fake)
    recipe = DemoSettings(output=tmp_path, steps=1000).recipe("needle-gdn")
    with pytest.raises(SystemExit, match="143"):
        training.train_all([recipe], tmp_path / "logs", 1, QUIET)
    assert [process.wait(timeout=10) for process in started] == [-signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_failing_child_shows_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = replace_training(monkeypatch, tmp_path, "for n in $(seq 40); do echo line $n; done; exit 3")
    recipes = [DemoSettings(output=tmp_path / "runs", steps=5).recipe(name) for name in SLOWEST_FIRST]
    console = Console(record=True, file=open(os.devnull, "w"), width=200)  # noqa: SIM115
    message = r"training of needle-lansa ended with status 3; .*needle-lansa\.log"
    with pytest.raises(training.ChildFailedError, match=message):
        training.train_all(recipes, tmp_path / "logs", 1, console)
    assert len(started) == 1
    shown = console.export_text().split("\n")
    assert "line 40" in shown
    assert "line 20" not in shown


def measurements(**beyond: int) -> dict[str, Measurement]:
    """Made-up results, right answers of 100 beyond the window by model."""
    names = dict(zip(TITLES, ("gdn", "swa", "lalte", "lansa", "full"), strict=True))
    results = {}
    for name, short in names.items():
        within, far = Tally(10, 9, 3.0), Tally(100, beyond.get(short, 50), 50.0)
        needle = NeedleResult(NeedleTask(), 11, 0, Tally(110, 9 + far.correct, 53.0), within, far, ())
        cache_bytes = {128: 1000, 1280: 9000 if short == "full" else 1000}
        results[name] = Measurement(needle, cache_bytes, 80.0, 1234, None, {})
    return results


def test_the_claim_follows_the_numbers() -> None:
    claim = check_claim(measurements(gdn=30, swa=40, lalte=96, full=99))
    assert claim.shown
    assert "laLTE recalls 96.0%, full attention 99.0%, GDN 30.0% and GDN + SWA 40.0%" in claim.sentence
    assert "9.0 times" in claim.sentence
    far_below_full = check_claim(measurements(gdn=30, swa=40, lalte=90, full=99))
    assert not far_below_full.shown
    assert "not near full attention" in far_below_full.sentence
    too_short = check_claim(measurements(gdn=3, swa=4, lalte=43, full=15))
    assert not too_short.shown
    assert "full attention itself has not learned the task yet" in too_short.sentence
    no_better = check_claim(measurements(gdn=30, swa=92, lalte=96, full=99))
    assert not no_better.shown
    assert "not clearly above" in no_better.sentence
    assert "not near" not in no_better.sentence


def test_the_table_has_the_models_in_order() -> None:
    console = Console(record=True, file=open(os.devnull, "w"), width=200)  # noqa: SIM115
    console.print(comparison_table(measurements(gdn=30, swa=40, lalte=96, full=99), shortened=False))
    text = console.export_text()
    rows = [line for line in text.splitlines() if "%" in line]
    assert [row.split("│")[1].strip() for row in rows] == list(TITLES.values())
    assert "96.0% (90.2–98.4)" in rows[2]
    assert "9,000 B" in rows[4]
    assert "shortened" not in text
