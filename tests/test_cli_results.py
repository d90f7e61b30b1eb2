"""Files of results: what an evaluation replaces, what it refuses to, and what it says of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast import HybridForCausalLM
from holdfast.cli import main
from holdfast.data.text import byte_tokenizer
from refusals import refused

Run = Callable[..., str]


@pytest.fixture
def run(
    small_model: Callable[..., HybridForCausalLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Call an evaluation of models `a` and `b` in the working directory; gives what it says of replaced results."""
    for seed, name in enumerate(("a", "b")):
        model = small_model("gated_deltanet", "learned_eviction", vocab_size=259, seed=seed)
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("It was the best of times. " * 50)
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> str:
        capsys.readouterr()
        assert main(["evaluate", *argv, "--json", "r.json"]) == 0
        return "".join(line for line in capsys.readouterr().err.splitlines() if "replaced" in line)

    return call


def perplexity(model: str, bins: int = 2) -> list[str]:
    return ["perplexity", model, "--data", "text.txt", "--length", "32", "--samples", "2", "--bins", str(bins)]


def scorers(*models: str, budget: int = 4) -> list[str]:
    text = ["--data", "text.txt", "--length", "32", "--samples", "1"]
    return ["scorers", *models, *text, "--scorers", "recency", "--budgets", str(budget)]


def test_results_of_others_are_not_replaced_in_silence(run: Run) -> None:
    assert run(*perplexity("a")) == ""
    first = Path("r.json").read_text()
    assert run(*perplexity("a")) == ""
    assert json.loads(Path("r.json").read_text())["models"] == json.loads(first)["models"]
    told = run(*perplexity("b"))
    assert told.startswith("r.json: the results of a are replaced. What they follow from stays in r.samples.jsonl")
    assert list(json.loads(Path("r.json").read_text())["models"]) == ["b"]
    told = run(*perplexity("b", bins=4))
    assert told.startswith("r.json: the results of b, which were measured with other settings, are replaced.")


def test_another_model_of_the_same_name_and_another_plan_are_told(run: Run) -> None:
    assert run(*perplexity("a")) == ""
    Path("other").mkdir()
    shutil.copytree("b", "other/a")
    assert run(*perplexity("other/a")).startswith("r.json: the results of a are replaced.")
    Path("r.json").unlink()
    turns = ["turns", "a", "--facts", "1", "--questions", "1", "--turn-length", "400", "--samples", "1", "--beyond"]
    assert run(*turns, "--turns", "1") == ""
    assert run(*turns, "--turns", "1") == ""
    assert "the results of a are replaced" in run(*turns, "--turns", "2")


def test_results_of_scorers(run: Run) -> None:
    assert run(*scorers("a", "b")) == ""
    assert json.loads(Path("r.json").read_text())["evaluation"] == "scorers"
    assert run(*scorers("a", "b")) == ""
    told = run(*scorers("a"))
    assert "the results of b are replaced" in told
    assert "with other settings, are replaced" in run(*scorers("a", budget=5))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"precious": 1}', "something that no evaluation has written"),
        (b"[1, 2]", "something that no evaluation has written"),
        (b"\xff no JSON", "something that no evaluation has written"),
        (b'{"evaluation": "needle", "models": {}}', "results of `evaluate needle`"),
    ],
)
@pytest.mark.parametrize("command", ["needle", "recall", "turns", "perplexity", "scorers", "efficiency"])
def test_what_is_something_else_is_refused_before_anything_is_read(
    command: str, content: bytes, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if b"needle" in content and command == "needle":
        content, told = content.replace(b"needle", b"turns"), "results of `evaluate turns`"
    file = tmp_path / "mine.json"
    file.write_bytes(content)
    data = ["--data", "nowhere.txt"] if command in ("perplexity", "scorers") else []
    error = refused(capsys, command, "nowhere", *data, "--json", str(file))
    assert error == f"holdfast: --json is {file}, which holds {told}; give another file, or remove that one.\n"
    assert file.read_bytes() == content
    file = tmp_path / "x.txt"
    error = refused(capsys, command, "nowhere", *data, "--json", str(file))
    assert error == f"holdfast: --json is {file}; give a file that ends in .json.\n"


def test_an_empty_file_and_missing_folders_are_no_obstacle(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.json").touch()
    assert run(*perplexity("a")) == ""
    for argv, made in (
        ([*["evaluate", *perplexity("a")], "--json", "new/1/r.JSON"], "new/1/r.JSON"),
        ([*["evaluate", *scorers("a")], "--plot", "new/2/p.png"], "new/2/p.png"),
        (["inspect", "a", "It was", "--output", "new/3/page.html"], "new/3/page.html"),
        (["info", "a", "--json", "new/4/cost.json"], "new/4/cost.json"),
    ):
        assert main(argv) == 0
        assert Path(made).stat().st_size > 0


def test_a_page_is_called_one(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["inspect", "nowhere", "text"], ["report", "nowhere"]):
        capsys.readouterr()
        assert main([*argv, "--output", "page.png"]) == 2
        error = "holdfast: --output is page.png, and a page is written; give a file that ends in .html, .htm."
        assert capsys.readouterr().err.startswith(error)
