"""`holdfast evaluate scorers`."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast import HybridForCausalLM
from holdfast.cli import main
from holdfast.data.text import byte_tokenizer, train_tokenizer
from holdfast.evaluation.intervals import Share
from holdfast.evaluation.needle import evaluate_needle
from holdfast.evaluation.perplexity import PerplexityResult
from holdfast.evaluation.scorer_results import SampleAnswers
from holdfast.evaluation.scorers import SCORERS, scoring
from holdfast.training.recipe import load_recipe

RECIPE = """
[model]
vocab_size = 23
hidden_size = 32
num_hidden_layers = 2
intermediate_size = 48
mixers = ["gated_deltanet", "learned_eviction"]

[model.mixer_options.gated_deltanet]
num_heads = 2
head_dim = 8

[model.mixer_options.learned_eviction]
num_heads = 2
window = 6
budget = 5

[data]
kind = "needle"

[data.task]
length = 24
num_pairs = 3
num_keys = 8
num_values = 8
num_noise = 4
window = 6

[training]
max_steps = 1
"""


def saved(model: HybridForCausalLM, folder: Path, recipe: str = RECIPE) -> str:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if recipe:
        (folder / "recipe.toml").write_text(recipe)
    return str(folder)


def test_recall_of_several_models(small_model: Callable[..., HybridForCausalLM], tmp_path: Path) -> None:
    models = [saved(small_model(seed=seed), tmp_path / f"m{seed}") for seed in (0, 1)]
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--budgets", "5", "9", "--samples", "8", "--json", str(out), "--plot", str(plot)]
    assert main(["evaluate", "scorers", *models, *options]) == 0
    found = json.loads(out.read_text())
    assert found["evaluation"] == "scorers"
    assert found["settings"]["budgets"] == [5, 9]
    assert len(found["settings"]["scorers"]) == 7
    assert found["machine"]["packages"]["torch"]
    assert list(found["models"]) == ["m0", "m1"]
    for model in found["models"].values():
        places = [(cell["scorer"], cell["budget"]) for cell in model["cells"]]
        assert places == [(scorer, budget) for budget in (5, 9) for scorer in found["settings"]["scorers"]]
        assert all(0 <= cell["accuracy"] <= 1 and cell["task"] == "beyond the window" for cell in model["cells"])
    assert plot.stat().st_size > 5_000
    assert main(["evaluate", "scorers", *models, models[0], *options]) == 2  # a model given twice would count twice
    assert json.loads(out.read_text()) == found


def test_accuracies_have_counts_and_intervals(small_model: Callable[..., HybridForCausalLM], tmp_path: Path) -> None:
    models = [saved(small_model(seed=seed), tmp_path / f"m{seed}") for seed in (0, 1)]
    out = tmp_path / "out.json"
    options = ["--scorers", "recency", "--budgets", "9", "--samples", "8", "--json", str(out)]
    assert main(["evaluate", "scorers", *models, *options]) == 0
    for model in json.loads(out.read_text())["models"].values():
        (cell,) = model["cells"]
        assert cell["count"] >= 8
        assert cell["interval"] == list(Share.from_dict(cell).interval or ())
        assert cell["interval"][0] < cell["interval"][1]
        answers = SampleAnswers.from_dict(cell)
        assert (len(answers.answers), answers.share) == (8, Share.from_dict(cell))
    task = load_recipe(Path(models[0]) / "recipe.toml").data.task
    model = HybridForCausalLM.from_pretrained(models[0])
    with scoring(model, "recency", 9):
        expected = evaluate_needle(model, task, samples=8, progress=False).beyond
    found = json.loads(out.read_text())["models"]["m0"]["cells"][0]
    assert Share.from_dict(found) == Share.from_dict(expected.to_dict())


def test_a_scorer_that_a_model_lacks_is_left_out_or_refused_before_measuring(
    small_model: Callable[..., HybridForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    alone = RECIPE.replace('"gated_deltanet", "learned', '"learned').replace("mixer_options.gated_deltanet", "rest")
    alone = alone.replace("[model.rest]\nnum_heads = 2\nhead_dim = 8\n", "")
    model = saved(small_model("learned_eviction"), tmp_path / "m", alone)
    options = ["--budgets", "9", "9", "--samples", "4", "--json", str(tmp_path / "out.json")]
    assert main(["evaluate", "scorers", model, *options]) == 0
    assert "write_magnitude is left out" in " ".join(capsys.readouterr().err.split())
    cells = json.loads((tmp_path / "out.json").read_text())["models"]["m"]["cells"]
    assert sorted(cell["scorer"] for cell in cells) == sorted(SCORERS.keys() - {"write_magnitude"})
    for refused in (["--scorers", "recency", "write_magnitude", "--budgets", "9"], ["--budgets", "9", "1"]):
        assert main(["evaluate", "scorers", model, *refused, "--json", str(tmp_path / "no.json")]) == 2
        assert f"{tmp_path}/m, scorer " in capsys.readouterr().err
    wide = saved(
        small_model(), tmp_path / "wide", RECIPE.replace("window = 6\n\n[training]", "window = 23\n\n[training]")
    )
    assert main(["evaluate", "scorers", wide, "--budgets", "9", "--samples", "4"]) == 2
    assert "asks nothing beyond its window of 23 tokens" in capsys.readouterr().err


def test_perplexity_of_text(small_model: Callable[..., HybridForCausalLM], tmp_path: Path) -> None:
    model = saved(small_model(vocab_size=259), tmp_path / "m", recipe="")
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("All happy families are alike; every unhappy family is unhappy in its own way. " * 9)
    options = f"--data {text} --length 64 --samples 4 --scorers random recency --budgets 5 --json {out}"
    assert main(["evaluate", "scorers", model, *options.split()]) == 0
    cells = json.loads(out.read_text())["models"]["m"]["cells"]
    found = {cell["scorer"]: PerplexityResult.from_dict(cell) for cell in cells}
    assert set(found) == {"random", "recency"}
    assert found["random"].perplexity != found["recency"].perplexity
    assert [cell["bits_per_byte"] for cell in cells] == [each.bits_per_byte for each in found.values()]
    difference = found["recency"].difference(found["random"])
    assert difference is not None
    assert cells[0]["difference"] is None
    assert cells[1]["difference"] == {"to": "random", **difference.to_dict()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scorers", "luck"], "luck"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        ([], "recipe.toml"),
        (["--data", "text.txt", "--budgets", "1"], "sinks"),
    ],
)
def test_what_cannot_be_is_one_line(
    options: list[str],
    message: str,
    small_model: Callable[..., HybridForCausalLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("All happy families are alike. " * 40)
    model = saved(small_model(vocab_size=259), tmp_path / "m", recipe="")
    assert main(["evaluate", "scorers", model, *options]) != 0
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_tasks_have_tables_of_their_own_and_one_of_their_mean(
    small_model: Callable[..., HybridForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [saved(small_model(vocab_size=259, seed=seed), tmp_path / f"m{seed}", recipe="") for seed in (0, 1)]
    tasks, out = ["niah_single_1", "niah_multikey_2"], tmp_path / "out.json"
    argv = ["evaluate", "scorers", *models, "--scorers", "trained", "random", "--budgets", "5", "9", "--beyond"]
    options = ["--samples", "3", "--length", "1200", "--tasks", *tasks, "--json", str(out)]
    assert main([*argv, *options, "--plot", str(tmp_path / "out.png")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for task in tasks:
        assert (
            f"{task}: needles found in one pass, by slots per head: 3 samples; mean of 2 models [least to most] (95 %"
            in shown
        )
    assert "mean of 2 tasks: needles found in one pass, by slots per head: 6 samples; mean of 2 models" in shown
    assert shown.count("random beside trained") == 3
    assert shown.count("[0.0% to 0.0%]") == 3 * 4
    assert "they do not cover the seeds of training" in shown
    assert (tmp_path / "out.png").stat().st_size > 5_000
    assert shown.count("0.0%") >= 2 * 3 * 4  # nothing is found: a value and the end of its interval
    for model in json.loads(out.read_text())["models"].values():
        assert [cell["task"] for cell in model["cells"][:2]] == sorted(tasks)
        differences = [cell["difference"] for cell in model["cells"][:4]]
        assert differences[:2] == [None, None]
        assert [difference["to"] for difference in differences[2:]] == ["trained", "trained"]


def test_recall_is_shown_with_its_interval_and_the_number_of_answers(
    small_model: Callable[..., HybridForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = saved(small_model(), tmp_path / "m"), tmp_path / "out.json"
    argv = ["evaluate", "scorers", model, "--scorers", "recency", "random", "--budgets", "9", "--samples", "8"]
    assert main([*argv, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    first, second = json.loads(out.read_text())["models"]["m"]["cells"]
    assert f"{first['count']:,} answers in 8 samples" in " ".join(shown.split())
    for cell in (first, second):
        low, high = cell["interval"]
        assert f" {cell['accuracy']:.1%} " in shown
        assert f"({low:.1%} to {high:.1%})" in shown
    low, high = second["difference"]["interval"]
    assert f"({100 * low:+.1f} to {100 * high:+.1f})" in shown
    assert second["difference"]["value"] == pytest.approx(second["accuracy"] - first["accuracy"])


def test_the_mean_of_models_is_shown_with_the_least_and_the_most(
    small_model: Callable[..., HybridForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [saved(small_model(vocab_size=300, seed=seed), tmp_path / f"m{seed}", recipe="") for seed in (0, 1)]
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("All happy families are alike; every unhappy family is unhappy in its own way. " * 9)
    options = ["--data", str(text), "--length", "64", "--scorers", "random", "recency", "--budgets", "5"]
    argv = ["evaluate", "scorers", *models, *options, "--json", str(out)]
    assert main([*argv, "--plot", str(tmp_path / "out.png")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    by_model = [
        {cell["scorer"]: cell for cell in model["cells"]} for model in json.loads(out.read_text())["models"].values()
    ]
    for scorer in ("random", "recency"):
        found = [cells[scorer] for cells in by_model]
        least, most = sorted(cell["perplexity"] for cell in found)
        assert f"[{least:.3f} to {most:.3f}]" in shown
        assert f" {math.exp((found[0]['mean_nll'] + found[1]['mean_nll']) / 2):.3f} " in shown
    assert "mean of 2 models [least to most]" in shown
    train_tokenizer([text.read_text()], 300, progress=False).save_pretrained(models[1])
    assert main(argv) == 2
    assert "m1 has another tokenizer than " in capsys.readouterr().err
