"""Models on the hub where a directory could stand: without a network, by a cache that is made here."""

from __future__ import annotations

import json
import re
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from holdfast.cli import main
from holdfast.cli.common import model_directory
from holdfast.cli.errors import UsageError
from holdfast.cli.evaluate.common import shown_names, told_apart
from holdfast.cli.hub import is_hub_name
from passes import ModelFactory

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(small_model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was asked of the hub, which has one model, someone/small."""
    kept = tmp_path / "hub" / "models--someone--small" / "snapshots" / COMMIT
    small_model("gated_deltanet", "learned_eviction").save_pretrained(kept)
    asked: list[dict[str, Any]] = []

    def download(model: str, **given: Any) -> str:
        asked.append({"model": model, **given})
        if model != "someone/small":
            raise LocalEntryNotFoundError("no connection")
        return str(kept)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_model_is_fetched_without_pickles_and_keeps_its_name(
    hub: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = model_directory("someone/small@v1.0")
    assert directory.name == COMMIT
    assert shown_names([directory]) == {directory: "someone/small"}
    assert [(call["model"], call["revision"]) for call in hub] == [("someone/small", "v1.0")]
    assert "*.safetensors" in hub[0]["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in hub[0]["allow_patterns"])
    assert hub[0]["ignore_patterns"] == ["*/*"]
    assert "taking the model someone/small of the Hugging Face hub" in capsys.readouterr().err
    (directory / "config.json").unlink()
    with pytest.raises(UsageError, match="holds no saved model"):
        model_directory("someone/small")


def test_a_converted_model_keeps_its_tokenizer_and_chat_template(
    hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that `convert` copies is fetched."""
    whole = model_directory("someone/small")
    files = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json"}
    files |= {"added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"}
    for name in files:
        (whole / name).write_text(f'"{name}"')

    def download(model: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        names = [path.name for path in whole.iterdir()]
        kept = tmp_path / "fetched"
        kept.mkdir()
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copyfile(whole / name, kept / name)
        return str(kept)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    target = tmp_path / "converted"
    assert main(["convert", "someone/small", str(target), "--format", "holdfast"]) == 0
    assert {name: (target / name).read_text() for name in files} == {name: f'"{name}"' for name in files}


def test_it_is_evaluated_by_its_name(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    output = tmp_path / "costs.json"
    sizes = ["--contexts", "32", "--steps", "2", "--repeats", "1", "--no-memory"]
    assert main(["evaluate", "efficiency", "someone/small", *sizes, "--json", str(output)]) == 0
    assert list(json.loads(output.read_text())["models"]) == ["someone/small"]


def test_its_costs_are_told_without_its_weights(
    hub: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cost.json"
    assert main(["info", "needle-gdn", "someone/small@v1.0", "--json", str(output)]) == 0
    written = json.loads(output.read_text())
    assert list(written) == ["needle-gdn", "someone/small@v1.0"]
    assert "training" in written["needle-gdn"]
    assert "training" not in written["someone/small@v1.0"]
    assert written["someone/small@v1.0"]["total_parameters"] > 0
    assert [(call["model"], call["revision"], call["allow_patterns"]) for call in hub] == [
        ("someone/small", "v1.0", ["config.json"])
    ]
    assert capsys.readouterr().err.count("taking the model someone/small of the Hugging Face hub") == 1


def test_names_are_the_shortest_ends_that_tell_models_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*given: str) -> list[str]:
        return list(shown_names([Path(name) for name in given]).values())

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert names("runs/s0/lalte", "runs/s1/lalte", "/runs/gdn") == ["s0/lalte", "s1/lalte", "gdn"]
    assert names("lalte", "s1/lalte", "../lalte") == ["lalte", "s1/lalte", "../lalte"]
    assert names(".", "..") == ["here", tmp_path.name]
    hub = "hub/models--owner--lalte/snapshots"
    assert names(f"{hub}/0123456789", "x/lalte") == ["owner/lalte", "lalte"]
    assert names(f"{hub}/0123456789", f"{hub}/9876543210") == ["owner/lalte@01234567", "owner/lalte@98765432"]
    with told_apart([Path("s0/lalte"), Path("s1/lalte")]):
        assert names("s1/lalte") == ["s1/lalte"]
    assert names("s1/lalte") == ["lalte"]


EVALUATIONS = ("needle", "recall", "turns", "perplexity", "scorers", "efficiency", "all")


@pytest.mark.parametrize(
    "command", ["generate", "inspect", "convert", "info", "evaluate", *(f"evaluate {name}" for name in EVALUATIONS)]
)
def test_help_says_that_models_of_the_hub_are_taken(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert re.search(r"models? on the hub \(OWNER/NAME\[@REVISION\]\)", words)


@pytest.mark.parametrize("command", EVALUATIONS)
def test_the_help_of_every_evaluation_calls_models_the_same(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", command, "--help"]) == 0
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage.endswith(" [MODEL ...]" if command == "efficiency" else " MODEL [MODEL ...]")


def test_what_info_does_not_find(hub: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "someone/else"]) == 2
    assert "There is no model directory someone/else, and the hub cannot be reached" in capsys.readouterr().err
    assert len(hub) == 1
    assert main(["info", "absent/recipe.toml"]) == 2
    assert "There is no recipe file absent/recipe.toml" in capsys.readouterr().err
    assert main(["info", "needle-lalt"]) == 2
    assert "There is no recipe 'needle-lalt' (did you mean 'needle-lalte'?)" in capsys.readouterr().err
    assert len(hub) == 1


def test_a_path_that_info_does_not_find_is_no_recipe(
    hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/absent", "./absent", "absent/", "a/b/c", str(tmp_path / "absent")):
        assert main(["info", name]) == 2
        assert f"There is no directory {name}; give that of a model, or a recipe" in capsys.readouterr().err
    for name in ("runs/absent.toml", "absent.toml"):
        assert main(["info", name]) == 2
        assert f"There is no recipe file {name}" in capsys.readouterr().err
    recipe = resources.files("holdfast") / "recipes" / "needle-gdn.toml"
    (tmp_path / "runs" / "mine").write_text(recipe.read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["info", "runs/mine"]) == 0
    assert hub == []


def test_what_the_hub_does_not_give_is_one_clear_line(
    hub: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "someone/else", "Hello"]) == 2
    assert "There is no model directory someone/else, and the hub cannot be reached" in capsys.readouterr().err


def test_a_mistyped_path_is_not_looked_for_on_the_hub(
    hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/absent", "./absent", "absent", "a/b/c", "-x/y", "a/..", "a/b@../c", str(tmp_path / "absent")):
        assert not is_hub_name(name)
        with pytest.raises(UsageError, match="There is no model directory"):
            model_directory(name)
    assert hub == []
    shutil.rmtree(tmp_path / "runs")
    assert is_hub_name("runs/absent")
