"""The study of the budget controller: simulated heads do what their formula says, and the rule itself steers them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from holdfast.bench.controller import SimulatedHeads, plot_controller_study, study_controller
from holdfast.bench.settings import ControllerStudySettings
from holdfast.cli import main

QUIET = {"positions": 200, "valued": 1e-3, "walk": 0.0, "noise": 0.0, "shared_noise": 0.0, "seed": 0}
SMALL = ControllerStudySettings(
    intervals=(4,),
    tolerances=((0.9, 1.1),),
    factors=((1.1, 1.1),),
    dampings=(None,),
    time_constants=(5.0, 50.0),
    paces=(),
    heads=3,
    steps=1500,
    shared_noise=0.0,
)


def test_heads_come_to_what_their_penalty_leaves_them() -> None:
    heads = SimulatedHeads((5.0, 50.0), (), 2, **QUIET)
    kept, counted = heads.step()
    assert torch.equal(kept, counted)
    assert (kept > 199).all()  # λ = 0: everything is worth keeping
    heads.l1_lambda.fill_(1e-3)
    for _ in range(50):
        kept, _ = heads.step()
    assert kept[0] == pytest.approx([100, 100], abs=0.1)
    # After one time constant, 1 / e of the way in log-odds is left: 6 · 0.364.
    assert kept[1] == pytest.approx([200 * torch.sigmoid(torch.tensor(6 * 0.98**50)).item()] * 2, rel=1e-3)


def test_heads_with_a_pace_move_as_fast_whatever_the_size_of_the_penalty() -> None:
    for penalty in (1.0, 1000.0):
        heads = SimulatedHeads((5.0,), (0.05,), 2, **QUIET)
        heads.l1_lambda.fill_(penalty)
        for _ in range(100):
            kept, _ = heads.step()
        # 100 steps of 0.05, less the ten in which the mean comes up.
        assert kept[1] == pytest.approx([200 * torch.sigmoid(torch.tensor(6 - 0.05 * 91)).item()] * 2, rel=0.02)


def test_damping_settles_heads_with_a_pace() -> None:
    settings = ControllerStudySettings(
        intervals=(8,),
        tolerances=((0.95, 1.0),),
        factors=((1.3, 1.3),),
        dampings=(None, 0.0, 4.0),
        time_constants=(),
        paces=(0.1,),
        steps=3000,
    )
    whole, proportional, damped = study_controller(settings, progress=False)["cases"]
    assert [case["damping"] for case in (whole, proportional, damped)] == [None, 0.0, 4.0]
    assert (whole["tolerance"], proportional["tolerance"], damped["factors"]) == ((0.95, 1.0), None, (1.3,))
    assert whole["within"] < 0.3
    assert proportional["within"] < 0.7
    assert damped["within"] > 0.8


def test_gentle_factors_keep_quick_heads_at_their_budget() -> None:
    study = study_controller(SMALL, progress=False)
    assert [case["time_constant"] for case in study["cases"]] == [5.0, 50.0]
    for case in study["cases"]:
        assert 700 < case["reached"] < 1000  # about 160 updates from 1e-9 to 3e-3, and what τ adds
        assert case["within"] > 0.6
        assert 0.4 < case["lowest"] < 1
    assert {"commit", "packages"} <= study["machine"].keys()
    again = study_controller(SMALL, progress=False)
    assert again["cases"] == study["cases"]


def test_proportional_factors_stay_nearer_and_are_as_quick() -> None:
    published = {"intervals": (8,), "tolerances": ((0.95, 1.0),), "factors": ((1.5, 2.0),)}
    settings = dataclasses.replace(SMALL, **published, dampings=(None, 0.0), steps=3000)
    whole, _, proportional, _ = study_controller(settings, progress=False)["cases"]
    assert (whole["damping"], proportional["damping"]) == (None, 0.0)
    assert proportional["reached"] < 1.1 * whole["reached"]
    assert whole["within"] < 0.6
    assert proportional["within"] > 0.9


def test_a_budget_that_is_not_reached_is_said_to_be_so(tmp_path: Path) -> None:
    study = study_controller(
        ControllerStudySettings(intervals=(64,), steps=50, heads=1, plot=Path("x")), progress=False
    )
    assert {case["reached"] for case in study["cases"]} == {None}
    assert {case["within"] for case in study["cases"]} == {0.0}
    assert "plot" not in study["settings"]
    path = plot_controller_study(json.loads(json.dumps(study)), tmp_path / "study.png")
    assert path.stat().st_size > 5_000


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, plot = tmp_path / "study.json", tmp_path / "study.svg"
    short = ["--steps", "40", "--heads", "1", "--intervals", "4", "--tolerances", "0.9", "1.1", "--time-constants", "5"]
    short += ["--factors", "1.5", "2", "--dampings", "None", "6", "--paces", "0.1"]
    assert main(["bench", "controller", *short, "--output", str(output), "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "reached at step" in shown
    assert "never" in shown
    assert [case["interval"] for case in json.loads(output.read_text())["cases"]] == [
        4
    ] * 4  # two kinds of heads, two dampings
    assert plot.exists()
    for arguments, message in (
        (["--plot", "study.gif"], "ends in .png, .svg or .pdf"),
        (["--intervals", "0"], "intervals must be at least 1, got 0"),
        (["--time-constants", "0.5"], "time constants of 1 step or more"),
        (["--paces", "0"], "paces above 0"),
    ):
        assert main(["bench", "controller", *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
