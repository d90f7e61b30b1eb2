"""`holdfast evaluate scorers`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast import HybridForCausalLM
from holdfast.cli import main
from holdfast.data.text import byte_tokenizer
from holdfast.evaluation.intervals import Share

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
    assert found["models"] == [f"{tmp_path.name}/m0", f"{tmp_path.name}/m1"]
    assert found["environment"]["packages"]["torch"]
    assert len(found["values"]) == 7
    for by_budget in found["values"].values():
        assert list(by_budget) == ["5", "9"]
        assert all(len(shares) == 2 and all(0 <= share <= 1 for share in shares) for shares in by_budget.values())
    assert plot.stat().st_size > 5_000
    assert main(["evaluate", "scorers", *models, models[0], *options]) == 0  # a model given twice counts once
    assert json.loads(out.read_text()) == found


def test_accuracies_have_counts_and_intervals(small_model: Callable[..., HybridForCausalLM], tmp_path: Path) -> None:
    models = [saved(small_model(seed=seed), tmp_path / f"m{seed}") for seed in (0, 1)]
    out = tmp_path / "out.json"
    options = ["--scorers", "recency", "--budgets", "9", "--samples", "8", "--json", str(out)]
    assert main(["evaluate", "scorers", *models, *options]) == 0
    found = json.loads(out.read_text())
    shares = found["shares"]["recency"]["9"]
    assert [share["accuracy"] for share in shares] == found["values"]["recency"]["9"]
    for share in shares:
        assert share["count"] >= 8
        assert share["interval"] == list(Share.from_dict(share).interval or ())
        assert share["interval"][0] < share["interval"][1]


def test_a_scorer_that_a_model_lacks_is_left_out_or_refused_before_measuring(
    small_model: Callable[..., HybridForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    alone = RECIPE.replace('"gated_deltanet", "learned', '"learned').replace("mixer_options.gated_deltanet", "rest")
    alone = alone.replace("[model.rest]\nnum_heads = 2\nhead_dim = 8\n", "")
    model = saved(small_model("learned_eviction"), tmp_path / "m", alone)
    options = ["--budgets", "9", "9", "--samples", "4", "--json", str(tmp_path / "out.json")]
    assert main(["evaluate", "scorers", model, *options]) == 0
    assert "write_magnitude is left out" in " ".join(capsys.readouterr().err.split())
    values = json.loads((tmp_path / "out.json").read_text())["values"]
    assert "write_magnitude" not in values
    assert all(len(by_budget["9"]) == 1 for by_budget in values.values())
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
    options = f"--data {text} --length 64 --max-blocks 4 --scorers random recency --budgets 5 --json {out}"
    assert main(["evaluate", "scorers", model, *options.split()]) == 0
    values = json.loads(out.read_text())["values"]
    assert set(values) == {"random", "recency"}
    assert values["random"]["5"] != values["recency"]["5"]
    assert "shares" not in json.loads(out.read_text())


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
