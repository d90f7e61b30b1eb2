"""Whose a run directory is, what a run replaces in it, and what it gives back."""

import contextlib
import dataclasses
import json
import shutil
from dataclasses import replace

import pytest
from tiny_model import MODEL, make_recipe, metrics_of, train_until_killed

from holdfast.settings import to_toml
from holdfast.training import (
    RunDirectoryError,
    run_directory,
    train,
)
from holdfast.training.recipe import OutputSection, TextData, load_recipe
from holdfast.training.run_directory import check, claim, holds


def test_run_directories_are_guarded(finished, tmp_path):
    _, recipe = finished
    with pytest.raises(RunDirectoryError, match=r"holds a finished run: .* \(--output\.overwrite\)"):
        train(recipe)
    foreign = tmp_path / "run"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    for resume in (False, True):
        with pytest.raises(RunDirectoryError, match="is not empty and holds no run"):
            train(make_recipe(tmp_path), resume=resume)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_whether_a_run_is_finished(finished, tmp_path):
    directory, recipe = finished
    longer, other = (
        dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **changes))
        for changes in ({"max_steps": recipe.training.max_steps + 1}, {"learning_rate": 0.5})
    )
    assert not holds(tmp_path / "nothing", recipe)
    assert holds(directory, recipe)
    with pytest.raises(RunDirectoryError, match="holds a finished run of 8 steps, not 9"):
        holds(directory, longer)
    with pytest.raises(RunDirectoryError, match=r"was started with training\.learning_rate"):
        holds(directory, other)
    with claim(tmp_path / "begun", recipe, resume=False):
        assert not holds(tmp_path / "begun", recipe)


def test_an_unfinished_run_is_resumed_or_overwritten_but_never_by_accident(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, max_steps=4)
    train_until_killed(recipe, 3, monkeypatch)
    with pytest.raises(RunDirectoryError, match="holds an unfinished run: resume it"):
        train(recipe)
    changed = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, learning_rate=1.0))
    with pytest.raises(RunDirectoryError, match=r"was started with training.learning_rate = 0.01, not 1.0"):
        train(changed, resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    overwriting = dataclasses.replace(changed, output=OutputSection(str(tmp_path), overwrite=True))
    train(overwriting)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [2, 3, 4]


def test_a_mistake_in_the_recipe_leaves_no_directory(tmp_path):
    broken = dataclasses.replace(make_recipe(tmp_path), model=MODEL | {"hidden_sizes": 3})
    with pytest.raises(ValueError, match=r"model\.hidden_sizes"):
        train(broken)
    small = dataclasses.replace(make_recipe(tmp_path), model=MODEL | {"vocab_size": 5})
    with pytest.raises(ValueError, match="vocab_size is 5, but the needle task has 17 tokens"):
        train(small)
    train(make_recipe(tmp_path, max_steps=1))  # what the failed attempt left does not stand in the way


def test_what_looks_like_a_prepared_run_is_not_taken_over(tmp_path):
    recipe = make_recipe(tmp_path)
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "tokenizer.json").write_text("mine")
    with pytest.raises(RunDirectoryError, match="is not empty and holds no run"):
        check(directory, recipe, resume=False)
    (directory / "recipe.toml").write_text(to_toml(replace(recipe, training=replace(recipe.training, seed=99))))
    with pytest.raises(RunDirectoryError, match=r"was started with training\.seed = 99"):
        check(directory, recipe, resume=False)
    assert (directory / "tokenizer.json").read_text() == "mine"
    with claim(directory, replace(recipe, output=replace(recipe.output, overwrite=True)), resume=False):
        pass
    assert not (directory / "tokenizer.json").exists()
    check(directory, recipe, resume=False)  # its own recipe, which never trained a step


def test_what_has_become_anothers_meanwhile_is_not_taken(finished, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def late(path):
        shutil.copytree(finished[0], tmp_path / "run", dirs_exist_ok=True)
        yield

    monkeypatch.setattr(run_directory, "locked", late)
    with pytest.raises(RunDirectoryError, match="holds a finished run"):
        train(make_recipe(tmp_path))
    assert sorted(contents_of(tmp_path / "run").values()) == sorted(contents_of(finished[0]).values())


def test_one_process_at_a_time_trains_in_a_directory(tmp_path):
    recipe = make_recipe(tmp_path, max_steps=1)
    refusal = pytest.raises(RunDirectoryError, match="is being trained in by another process")
    with claim(tmp_path / "run", recipe, resume=False), refusal:
        train(recipe)
    train(recipe)


def test_what_is_overwritten_stays_until_its_successor_can_begin(finished, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    overwrite = OutputSection(str(tmp_path), overwrite=True)
    small = replace(make_recipe(tmp_path), model=MODEL | {"vocab_size": 5}, output=overwrite)
    with pytest.raises(ValueError, match="vocab_size is 5, but the needle task has 17 tokens"):
        train(small)
    assert (directory / "model.safetensors").exists()
    events = directory / "runs" / "today" / "events.out.tfevents.1"
    events.parent.mkdir(parents=True)
    events.touch()
    train(replace(make_recipe(tmp_path, max_steps=1), output=overwrite))
    assert json.loads((directory / "summary.json").read_text())["steps"] == 1
    assert not events.exists()
    assert not load_recipe(directory / "recipe.toml").output.overwrite  # who trains by it does not ask for that


def test_what_failed_before_its_first_step_is_in_nobodys_way(tmp_path):
    directory = tmp_path / "run"
    train_until_killed(make_recipe(tmp_path), 1, pytest.MonkeyPatch())
    assert [path.name for path in directory.iterdir()] == []
    train(make_recipe(tmp_path, learning_rate=2e-2))


def contents_of(directory) -> dict:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_fails_before_its_first_step_gives_back_what_it_replaced(finished, tmp_path, resume, monkeypatch):
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    (directory / "thesis.tex").write_text("mine")
    before = contents_of(directory)
    again = make_recipe(tmp_path, max_steps=20, report_to=("nowhere",))
    again = replace(again, output=OutputSection(str(tmp_path), overwrite=not resume))
    refusal = pytest.raises(ValueError, match="nowhere is not supported")
    with refusal:
        train(again, resume=resume)
    assert contents_of(directory) == before
    with monkeypatch.context() as patch, refusal:
        patch.setattr(run_directory, "give_back", lambda *_: None)  # killed before it could
        train(again, resume=resume)
    assert (directory / ".replaced").exists()
    assert train(make_recipe(tmp_path), resume=True) == directory  # which is finished
    assert contents_of(directory) == before


def test_what_was_replaced_is_removed_after_the_first_step(finished, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    again = make_recipe(tmp_path, max_steps=10)
    train(again, resume=str(directory / "checkpoint-6"))
    steps = [line["step"] for line in metrics_of(directory)]
    assert steps == [2, 3, 4, 6, 8, 9, 10]
    train_until_killed(replace(again, output=OutputSection(str(tmp_path), overwrite=True)), 4, monkeypatch)
    assert sorted(path.name for path in directory.iterdir()) == [
        "checkpoint-3",
        "metrics.jsonl",
        "recipe.toml",
    ]


def test_checkpoints_of_a_branch_that_was_left_are_not_resumed_from(finished, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    branch = make_recipe(tmp_path, max_steps=9)
    train_until_killed(branch, 8, monkeypatch, resume=str(directory / "checkpoint-6"))
    assert [path.name for path in directory.glob("checkpoint-*")] == ["checkpoint-6"]  # 8 was of the other branch


def test_a_run_without_its_data_leaves_no_directory(tmp_path):
    recipe = replace(make_recipe(tmp_path), model=MODEL | {"vocab_size": 259}, data=TextData(str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        train(recipe)
    assert not (tmp_path / "run").exists()
