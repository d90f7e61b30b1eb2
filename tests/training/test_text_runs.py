"""Runs on text, streamed, held in memory or prepared: what is trained on, and exact resumption."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import ConcatDataset, Subset
from transformers import TrainerCallback

from holdfast.data.text import PackedText, TextStream, byte_tokenizer, load_text, prepare
from holdfast.training import HybridTrainer, Recipe, RunDirectoryError, read_metrics, run_data, train
from holdfast.training.recipe import OutputSection, TextData, TrainingSection
from holdfast.training.text_blocks import check_evaluation, evaluation_blocks, training_blocks

SENTENCE = "the kelp holds on to the rock and the rock holds on to the sea. "


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for split in ("train", "validation"):
        rows = [{"text": f"{number} {split}: {SENTENCE[number % 7 :]}"} for number in range(40)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_recipe(directory: Path, corpus: Path, workers: int, **data: object) -> Recipe:
    """Six steps with dropout, accumulation, and a checkpoint in the middle."""
    options = {"num_heads": 2, "head_dim": 8}
    eviction = options | {"window": 8, "budget": 4, "sinks": 1, "dropout": 0.2}
    return Recipe(
        name="run",
        model={
            "vocab_size": 300,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "intermediate_size": 32,
            "mixers": ["gated_deltanet", "learned_eviction"],
            "mixer_options": {"gated_deltanet": options, "learned_eviction": eviction},
        },
        training=TrainingSection(
            max_steps=6, batch_size=3, accumulation=2, learning_rate=1e-2, log_every=3, save_every=3, workers=workers
        ),
        data=TextData(str(corpus), **({"length": 24, "in_memory": 0, "shuffle": 16, "lanes": 4} | data)),
        output=OutputSection(directory=str(directory)),
    )


class KilledError(Exception):
    pass


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KilledError


def train_until_killed(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    original = HybridTrainer.__init__

    def with_killer(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Kill())

    with monkeypatch.context() as patch:
        patch.setattr(HybridTrainer, "__init__", with_killer)
        with pytest.raises(KilledError):
            train(recipe)


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(directory / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("isolate", [False, True])
def test_a_killed_run_on_a_stream_resumes_bit_for_bit(corpus, tmp_path, monkeypatch, isolate) -> None:
    whole = train(make_recipe(tmp_path / "whole", corpus, workers=0, isolate=isolate))
    expected = load_file(whole / "model.safetensors")
    for workers, later in ((0, 0), (2, 2), (2, 0)):
        recipe = make_recipe(tmp_path / f"killed-{workers}-{later}", corpus, workers=workers, isolate=isolate)
        train_until_killed(recipe, monkeypatch)
        recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, workers=later))
        resumed = train(recipe, resume=True)
        found = load_file(resumed / "model.safetensors")
        assert all(torch.equal(expected[name], found[name]) for name in expected), (workers, later)
        assert losses(resumed) == losses(whole)


def test_a_checkpoint_without_a_position_is_refused(corpus, tmp_path, monkeypatch) -> None:
    recipe = make_recipe(tmp_path, corpus, workers=0)
    train_until_killed(recipe, monkeypatch)
    position = tmp_path / "run" / "checkpoint-3" / "data_position" / "rank-00000.json"
    state = json.loads(position.read_text())
    assert sum(lane["given"] for lane in state["lanes"].values()) == 3 * 2 * 3
    position.unlink()
    with pytest.raises(ValueError, match="checkpoint-3 holds no position in the data"):
        train(recipe, resume=True)


def test_a_prepared_corpus_is_trained_on_with_its_own_tokenizer(corpus, tmp_path, monkeypatch) -> None:
    for split in ("train", "validation"):
        prepare(load_text(corpus, split=split), tmp_path / "prepared", byte_tokenizer(), split=split, progress=False)
    recipe = make_recipe(tmp_path / "a", tmp_path / "prepared", workers=0, validation_split="validation")
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, eval_every=6))
    whole = train(recipe)
    assert [line["step"] for line in read_metrics(whole / "metrics.jsonl") if "eval_loss" in line] == [6]
    assert (whole / "tokenizer.json").exists()
    killed = dataclasses.replace(recipe, output=OutputSection(str(tmp_path / "b")))
    train_until_killed(killed, monkeypatch)
    resumed = train(killed, resume=True)
    expected, found = (load_file(run / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_run_does_not_go_on_with_other_data(corpus, tmp_path, monkeypatch, prepared) -> None:
    """Neither held in memory nor mapped: a place in the order of other blocks means nothing."""
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    if prepared:
        prepare(load_text(text, split="train"), tmp_path / "prepared", byte_tokenizer(), split="train")
    recipe = make_recipe(tmp_path / "runs", tmp_path / "prepared" if prepared else text, workers=0, in_memory=64)
    train_until_killed(recipe, monkeypatch)
    kept = (text / "train.jsonl").read_text()
    (text / "train.jsonl").write_text(kept.replace("kelp", "hull"))  # as many tokens
    if prepared:
        shutil.rmtree(tmp_path / "prepared")
        prepare(load_text(text, split="train"), tmp_path / "prepared", byte_tokenizer(), split="train")
    with pytest.raises(
        RunDirectoryError, match=r"with other training data \((\d+) blocks, now \1; their checksums differ"
    ):
        train(recipe, resume=True)
    again = make_recipe(tmp_path / "runs", Path(recipe.data.source), workers=0, in_memory=64)
    shutil.rmtree(tmp_path / "runs" / "run" / "checkpoint-3")  # from the first step on, any data will do
    assert train(again, resume=True)
    assert len(losses(tmp_path / "runs" / "run")) == 2


@pytest.mark.parametrize("kind", ["streamed", "in memory", "prepared"])
def test_a_run_does_not_go_on_with_other_data_to_evaluate_on(corpus, tmp_path, monkeypatch, kind) -> None:
    """Unless it makes no evaluations; those after them must be of the first text again."""
    text, source = tmp_path / "text", tmp_path / ("prepared" if kind == "prepared" else "text")
    shutil.copytree(corpus, text)
    first = (text / "validation.jsonl").read_text()

    def make(validation: str) -> None:
        (text / "validation.jsonl").write_text(validation)
        if kind == "prepared":
            shutil.rmtree(source, ignore_errors=True)
            for split in ("train", "validation"):
                prepare(load_text(text, split=split), source, byte_tokenizer(), split=split)

    make(first)
    in_memory = 0 if kind == "streamed" else 64
    recipe = make_recipe(tmp_path / "runs", source, workers=0, in_memory=in_memory, validation_split="validation")
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, eval_every=2))
    train_until_killed(recipe, monkeypatch)
    make(first.replace("kelp", "hull"))
    blind = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, eval_every=0))
    train(blind, resume=True)
    more = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, max_steps=8))
    with pytest.raises(RunDirectoryError, match=r"with other validation data \((\d+) blocks, now \1; their checksums"):
        train(more, resume=True)
    make(first)
    train(more, resume=True)


def test_a_run_that_begins_anew_forgets_what_its_data_were(corpus, tmp_path, monkeypatch) -> None:
    recipe = make_recipe(tmp_path, corpus, workers=0, in_memory=64, validation_split="validation")
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, eval_every=2))
    train_until_killed(recipe, monkeypatch)
    noted = json.loads((tmp_path / "run" / "data.json").read_text())
    assert sorted(noted) == ["training", "validation"]
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    blind = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, eval_every=0))
    train(blind, resume=True)
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == {"training": noted["training"]}


def test_what_earlier_versions_noted_of_data_holds(corpus, tmp_path, monkeypatch) -> None:
    recipe = make_recipe(tmp_path, corpus, workers=0, in_memory=64)
    train_until_killed(recipe, monkeypatch)
    noted = tmp_path / "run" / "data.json"
    noted.write_text(json.dumps(json.loads(noted.read_text())["training"] | {"checksum": 1}))
    with pytest.raises(RunDirectoryError, match="with other training data"):
        train(recipe, resume=True)


def test_text_that_was_streamed_is_not_gone_on_with_in_memory(corpus, tmp_path, monkeypatch) -> None:
    recipe = make_recipe(tmp_path, corpus, workers=0)
    train_until_killed(recipe, monkeypatch)
    with monkeypatch.context() as patch:  # as if the files had shrunk since
        patch.setattr(
            run_data, "training_blocks", lambda data, *args, **options: training_blocks(smaller, *args, **options)
        )
        smaller = dataclasses.replace(recipe.data, in_memory=64)
        with pytest.raises(RunDirectoryError, match="streamed its text, which is now small enough to be held in mem"):
            train(recipe, resume=True)


def test_a_checkpoint_of_another_run_brings_its_tokenizer_and_asks_for_its_settings(corpus, tmp_path) -> None:
    recipe = make_recipe(tmp_path / "a", corpus, workers=0, in_memory=64, tokenizer="train")
    checkpoint = train(recipe) / "checkpoint-3"
    other = dataclasses.replace(recipe, name="other")
    slower = dataclasses.replace(other, training=dataclasses.replace(recipe.training, learning_rate=1e-3))
    with pytest.raises(RunDirectoryError, match=r"was started with training\.learning_rate = 0\.01, not 0\.001"):
        train(slower, resume=str(checkpoint))
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    (text / "train.jsonl").write_text((text / "train.jsonl").read_text().replace("kelp", "hull"))
    changed = dataclasses.replace(other, data=dataclasses.replace(recipe.data, source=str(text)))
    with pytest.raises(RunDirectoryError, match=r"was started with data\.source"):
        train(changed, resume=str(checkpoint))
    found = train(other, resume=str(checkpoint))
    assert (found / "tokenizer.json").read_text() == (checkpoint / "tokenizer.json").read_text()
    assert same_weights(found, tmp_path / "a" / "run")


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(run / "model.safetensors") for run in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_that_must_not_go_on_stays_finished(corpus, tmp_path) -> None:
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    recipe = make_recipe(tmp_path / "runs", text, workers=0, in_memory=64)
    directory = train(recipe)
    (text / "train.jsonl").write_text((text / "train.jsonl").read_text().replace("kelp", "hull"))
    longer = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, max_steps=8))
    with pytest.raises(RunDirectoryError, match="with other training data"):
        train(longer, resume=True)
    assert (directory / "summary.json").exists()


def test_evaluations_without_a_split_are_missed(corpus, tmp_path, caplog) -> None:
    recipe = make_recipe(tmp_path, corpus, workers=0)
    train(dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, eval_every=5)))
    assert "No evaluations are made, whatever training.eval_every" in caplog.text


def test_which_blocks_a_recipe_gets(corpus, tmp_path) -> None:
    tokenizer = byte_tokenizer()
    held = TextData(str(corpus), length=24, validation_split="validation", validation_tokens=48)
    blocks = training_blocks(held, tokenizer, seed=0, workers=0)
    assert isinstance(blocks, PackedText)
    validation = evaluation_blocks(held, tokenizer)
    assert isinstance(validation, PackedText)
    assert 2 <= len(validation) < len(blocks)
    assert evaluation_blocks(dataclasses.replace(held, validation_split=None), tokenizer) is None
    streamed = training_blocks(dataclasses.replace(held, in_memory=0, lanes=8), tokenizer, seed=3, workers=2)
    assert isinstance(streamed, TextStream)
    assert (streamed.settings.lanes, streamed.settings.seed, streamed.workers) == (8, 3, 2)
    for split in ("train", "validation"):
        prepare(load_text(corpus, split=split), tmp_path, tokenizer, split=split, progress=False)
    mapped = dataclasses.replace(held, source=str(tmp_path))
    whole = training_blocks(mapped, tokenizer, seed=0, workers=0)
    assert isinstance(whole, ConcatDataset)
    assert len(whole) == len(blocks)
    assert all(torch.equal(whole[n]["input_ids"], blocks[n]["input_ids"]) for n in range(len(blocks)))
    first = evaluation_blocks(mapped, tokenizer)
    assert isinstance(first, Subset)
    assert len(first) == len(validation) == 2


@pytest.mark.parametrize("name", ["max_tokens", "validation_tokens"])
def test_no_tokens_are_refused(name) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        TextData("corpus", **{name: 0})


def test_nobody_evaluates_on_what_was_trained_on(corpus, tmp_path) -> None:
    recipe = make_recipe(tmp_path, corpus / "train.jsonl", workers=0, validation_split="validation", in_memory=64)
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, eval_every=6))
    way_out = r"train without evaluations \(--data\.validation-split None\)"
    with pytest.raises(ValueError, match=rf"train\.jsonl is one file, so its splits 'train' and 'val.*{way_out}"):
        train(recipe)
    without = dataclasses.replace(recipe.data, validation_split=None)
    assert train(dataclasses.replace(recipe, data=without))
    with pytest.raises(ValueError, match=rf"the splits 'train' and 'train' of .* are one; .*{way_out}"):
        check_evaluation(TextData(str(corpus), validation_split="train"))
    for split in ("train", "validation"):
        prepare(load_text(corpus / "train.jsonl"), tmp_path / "p", byte_tokenizer(), split=split, progress=False)
    with pytest.raises(ValueError, match=rf"p holds the same text as 'train' and as 'validation': .*{way_out}"):
        check_evaluation(TextData(str(tmp_path / "p"), validation_split="validation"))


def test_text_that_is_not_there_is_named_with_the_recipes_option(corpus, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.txt does not exist; .* \(--data\.source of the recipe\)\.$"):
        train(make_recipe(tmp_path, corpus / "absent.txt", workers=0))
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "emma.txt").write_text("It was the best of times. " * 400)
    recipe = make_recipe(tmp_path, tmp_path / "books", workers=0, validation_split="validation")
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, eval_every=6))
    way_out = r"--data\.source of the recipe, or train without evaluations \(--data\.validation-split None\)"
    with pytest.raises(ValueError, match=rf"ask for a split that is there \({way_out}\)\.$"):
        train(recipe)


def test_a_tokenizer_is_not_trained_on_the_whole_hub(monkeypatch, tmp_path) -> None:
    class Hub:
        files, name, fingerprint = 1, "org/data", ""

    monkeypatch.setattr("holdfast.training.text_blocks.load_text", lambda *args, **kwargs: Hub())
    recipe = make_recipe(tmp_path, Path("org/data"), workers=0, tokenizer="train")
    with pytest.raises(ValueError, match=r"all of org/data would be read: train one on a part of it first"):
        train(recipe)
