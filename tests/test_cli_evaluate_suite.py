"""`holdfast evaluate efficiency` and `all`: tables, pictures, the page, refusals, and what is kept."""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast import HybridCache, HybridForCausalLM
from holdfast.bench.models import Holdfast
from holdfast.cli import main
from holdfast.cli.evaluate.common import NOT_COVERED
from holdfast.cli.evaluate.efficiency import Efficiency
from holdfast.cli.evaluate.needle import Needle
from holdfast.cli.evaluate.parts import Part, plan_parts
from holdfast.cli.evaluate.perplexity import Perplexity
from holdfast.cli.evaluate.suite import All, _Measuring
from holdfast.data.needle import NeedleTask
from holdfast.data.recall import load_recall
from holdfast.data.text import byte_tokenizer
from holdfast.settings import to_toml
from holdfast.training.recipe import NeedleData, load_recipe
from refusals import refused

QUICK = ("--contexts", "24", "40", "--steps", "20", "--repeats", "1", "--no-memory")
EVIL = "<b>tokens&"


@pytest.fixture
def models(small_model: Callable[..., HybridForCausalLM], tmp_path: Path) -> Path:
    """`lalte` and one with a name to escape know the needle task; `text` reads bytes."""
    task = NeedleTask(length=24, num_pairs=3, num_keys=40, num_values=8, num_noise=4, window=6)
    recipe = to_toml(dataclasses.replace(load_recipe("needle-gdn"), data=NeedleData(task=task)))
    for name, mixer in (("lalte", "learned_eviction"), (EVIL, "full_attention"), ("text", "learned_eviction")):
        size = 259 if name == "text" else task.vocab_size
        model = small_model("gated_deltanet", mixer, vocab_size=size, max_position_embeddings=300)
        model.save_pretrained(tmp_path / name)
        if name == "text":
            byte_tokenizer().save_pretrained(tmp_path / name)
        else:
            (tmp_path / name / "recipe.toml").write_text(recipe)
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    return tmp_path


def test_efficiency_of_trained_models(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [str(models / "lalte"), str(models / EVIL)]
    needle, out = models / "needle.json", models / "costs.json"
    assert main(["evaluate", "needle", *both, "--samples", "4", "--json", str(needle)]) == 0
    drawn = ["--plot", str(models / "c.png"), "--accuracy", str(needle), "--pareto", str(models / "p.svg")]
    argv = ["evaluate", "efficiency", *both, *QUICK, "--batch-sizes", "1", "2", "--json", str(out)]
    capsys.readouterr()
    assert main([*argv, *drawn]) == 0
    shown = capsys.readouterr().out
    for heading in (
        "prefill tok/s",
        "p99",
        "peak memory",
        "held per head",
        "not measured",
        "operations of one forward token",
    ):
        assert heading in shown
    assert (models / "c.png").stat().st_size > 10_000
    assert (models / "p.svg").stat().st_size > 10_000
    data = json.loads(out.read_text())
    assert (data["evaluation"], data["settings"]["seed"], data["settings"]["dtype"]) == ("efficiency", 0, "float32")
    assert data["machine"]["packages"]["torch"]
    assert list(data["models"]) == ["lalte", EVIL]
    for entry in data["models"].values():
        assert entry["trained"]
        assert [(cost["context"], cost["batch"]) for cost in entry["costs"]] == [(24, 1), (40, 1), (24, 2), (40, 2)]
    assert main(argv) == 0
    assert "going on after 4 measurements" in capsys.readouterr().err
    again = json.loads(out.read_text())["models"]
    assert [again[name]["costs"] for name in again] == [data["models"][name]["costs"] for name in again]
    assert [entry["resumed"] for entry in again.values()] == [4, 4]


def test_efficiency_on_text(models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text is the same measurement, another one is not; what is held is what it makes the scorers keep."""
    read: list[list[int]] = []
    prefill = Holdfast.prefill

    def noting(model: Holdfast, ids: Tensor, chunk: int) -> HybridCache:
        read.append(ids.flatten().tolist())
        return prefill(model, ids, chunk)

    monkeypatch.setattr(Holdfast, "prefill", noting)
    text, out = models / "text.txt", models / "costs.json"
    argv = ["evaluate", "efficiency", str(models / "text"), *QUICK, "--data", str(text), "--json", str(out)]
    assert main(argv) == 0
    said = [byte_tokenizer().decode(ids, skip_special_tokens=True) for ids in read if len(ids) == 40]
    assert said
    assert all(words.startswith("It was the best of times, it was the ") for words in said)
    shown = capsys.readouterr().out
    assert "held per head" in shown
    assert "random" not in shown
    assert json.loads(out.read_text())["settings"]["data"] == "text.txt"
    for words, resumed in (("", 2), ("Another text. " * 9, 0)):
        if words:
            text.write_text(words)
        assert main(argv) == 0
        assert json.loads(out.read_text())["models"]["text"]["resumed"] == resumed
    capsys.readouterr()
    assert main([*argv, "--contexts", "900"]) == 2
    assert "give more text" in capsys.readouterr().err


def test_efficiency_of_untrained_models(tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    argv = ["evaluate", "efficiency", "--size", "tiny", *QUICK, "--contexts", "24", "--json", str(out)]
    assert main(argv) == 0
    found = json.loads(out.read_text())["models"]
    assert list(found) == ["GDN", "GDN + SWA", "laLTE", "laNSA", "GDN + full attention", "full attention"]
    assert not any(entry["trained"] or entry["resumed"] for entry in found.values())
    assert main(argv) == 0
    assert all(entry["resumed"] == 1 for entry in json.loads(out.read_text())["models"].values())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["efficiency", "nowhere"], "There is no model directory nowhere"),
        (["efficiency", "--contexts", "0"], "--contexts is 0"),
        (["efficiency", "--limit", "0"], "--limit is 0"),
        (["efficiency", "--longest", "-1"], "--longest is -1"),
        (["efficiency", "--pareto", "p.png"], "--pareto and --accuracy go together"),
        (["efficiency", "--pareto", "p.png", "--accuracy", "a.json"], "needs trained models"),
        (["efficiency", "--plot", "p.bmp"], "--plot is p.bmp"),
        (["efficiency", "--data", "text.txt"], "--data is text for trained models to read; name them"),
        (["efficiency", "m", "--split", "test"], "--split is of --data"),
        (["efficiency", "m", "--pareto", "p.bmp", "--accuracy", "a.json"], "--pareto is p.bmp"),
        (["all"], "Give at least one model directory"),
        (["all", "nowhere"], "There is no model directory nowhere"),
        (["all", "nowhere", "--samples", "0"], "--samples is 0"),
        (["all", ".", "--data", "book.parquet"], "--data is book.parquet, which does not exist"),
        (["all", ".", "--data", "pyproject.toml"], "pyproject.toml is of an unknown type"),
        (["all", ".", "--squad", "./dev.json"], "--squad is ./dev.json, which"),
        (["all", ".", "--haystack", "essays/"], "--haystack is essays/, which"),
        (["all", "nowhere", "--parts", "nonsense"], "nonsense"),
        (["efficiency", "--json", "."], "--json is ., which is a directory"),
        (["efficiency", "--plot", "pyproject.toml/p.png"], "pyproject.toml is a file and no directory"),
        (["efficiency", "m", "--pareto", "src.png/", "--accuracy", "a.json", "--json", "tests"], "--json is tests"),
        (["needle", "nowhere", "--json", "."], "--json is ., which is a directory"),
        (["perplexity", "nowhere", "--data", "x", "--json", "."], "--json is ., which is a directory"),
        (["recall", "nowhere", "--json", "."], "--json is ., which is a directory"),
        (["scorers", "nowhere", "--json", "."], "--json is ., which is a directory"),
        (["turns", "nowhere", "--json", "."], "--json is ., which is a directory"),
        (["efficiency", "--seed", "-1"], "--seed is -1; give 0 or more"),
        (["all", "nowhere", "--seed", "-3"], "--seed is -3; give 0 or more"),
    ],
)
def test_what_is_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert main(["evaluate", "efficiency", "--json", str(tmp_path / "new" / "costs.json")]) == 2
    assert "nothing can be written in" in capsys.readouterr().err


def test_an_output_that_is_no_directory_is_refused(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "all", str(models / "lalte"), "--output", str(models / "text.txt")]) == 2
    assert "text.txt, where nothing can be written" in capsys.readouterr().err


def test_accuracies_of_other_models_are_refused_before_anything_is_measured(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = models / "needle.json"
    assert main(["evaluate", "needle", str(models / EVIL), "--samples", "4", "--json", str(accuracies)]) == 0
    monkeypatch.setattr("holdfast.bench.efficiency.measure_efficiency", lambda *_, **__: pytest.fail("measured"))
    drawn = ["--accuracy", str(accuracies), "--pareto", str(models / "p.png")]
    assert main(["evaluate", "efficiency", str(models / "lalte"), *QUICK, *drawn]) == 2
    assert f"has accuracies of {EVIL}, not of lalte" in capsys.readouterr().err


def run_all(models: Path, *options: str, status: int = 0) -> str:
    """The page, without what its pictures hold."""
    names = [str(models / name) for name in ("lalte", EVIL, "text")]
    argv = ["evaluate", "all", *names, "--samples", "16", "--contexts", "24", "--output", str(models / "out"), *options]
    assert main(argv) == status
    page = (models / "out" / "index.html").read_text(encoding="utf-8")
    return re.sub(r'src="data:image/png;base64,iVBOR[^"]*"', 'src="picture"', page)


def test_everything_on_one_page(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(monkeypatch)
    page = run_all(models, "--data", str(models / "text.txt"))
    assert page.count('src="picture"') == 7  # needle, turns, perplexity, two of scorers, costs, pareto
    assert not re.search(r'src="(?!picture")|href="(?!#part-\d+")|https?://|<script', page)
    assert set(re.findall(r'href="#(.*?)"', page)) == set(re.findall(r'<h2 id="(.*?)"', page))
    head = page.partition("</table>")[0]
    captions = re.findall(r"<caption>(.*?)</caption>", page)
    assert captions[0] == "overview (95 % intervals where there are any)"
    rows = [re.sub(r"<.*?>", "", row) for row in re.findall(r"<tr><td>(.*?)</td>", head)]
    at = "at 24 tokens"
    costs = [f"cache {at}", f"generated tokens/s {at}", f"read tokens/s {at}"]
    tasks = ["needle task, beyond the window", "8 turns, needle task, asked aside"]
    assert rows == [*tasks, "perplexity, blocks of 300 tokens", *costs]
    assert "generated tokens/s" in capsys.readouterr().out
    assert "<b>" not in page
    assert "&lt;b&gt;tokens&amp;" in page
    assert str(models) not in re.sub(r"<td>.*?</td>|<th>.*?</th>", "", page)
    for text in (
        "accuracy by distance",
        "turns back",
        "perplexity of text.txt by position",
        "slots per head",
        "prefill tok/s",
        "seed 0",
    ):
        assert text in page
    for reason in ("no --haystack was given", "no --squad was given", "has no layer of learned eviction"):
        assert f"not measured: {reason}" in page or f"not measured: the model {reason}" in page
    assert "more than the length of 300" in page  # RULER's question does not fit
    assert "not measured: not even two turns with a fact each fit into the 300 tokens" in page
    assert "length 300, isolate False, beyond False, batch_size 13" in page  # of the blocks of text
    for name in ("torch", "commit", "processor"):
        assert f"<td>{name}</td>" in page
    for name in ("needle-task", "turns-task", "perplexity", "scorers-lalte", "efficiency"):
        assert json.loads((models / "out" / f"{name}.json").read_text())
    turns = json.loads((models / "out" / "turns-task.json").read_text())["models"]
    scripts = [model["script"] for model in turns.values()]
    assert scripts
    assert all(script["asides"] for script in scripts)


def test_what_was_measured_is_kept(
    models: Path, monkeypatch: pytest.MonkeyPatch, small_model: Callable[..., HybridForCausalLM]
) -> None:
    quick(monkeypatch)
    calls = counted(monkeypatch)
    parts = ("--parts", "needle", "efficiency")
    stop(monkeypatch, Efficiency)
    assert main(["evaluate", "all", str(models / "lalte"), "--output", str(models / "out"), *parts]) == 130
    assert calls == ["Needle"]
    assert not (models / "out" / "index.html").exists()
    monkeypatch.undo()
    quick(monkeypatch)
    calls = counted(monkeypatch)
    argv = ["evaluate", "all", str(models / "lalte"), "--output", str(models / "out"), *parts]
    for expected in (["Efficiency"], ["Efficiency"]):
        assert main(argv) == 0
        assert calls == expected
    (models / "out" / "efficiency.png").unlink()
    assert main([*argv, "--seed", "1"]) == 0
    assert calls == ["Efficiency", "Needle", "Efficiency"]
    small_model("gated_deltanet", "learned_eviction", vocab_size=83, seed=5).save_pretrained(models / "lalte")
    assert main([*argv, "--seed", "1"]) == 0
    assert calls[3:] == ["Needle", "Efficiency"]


@pytest.mark.parametrize(("names", "reads"), [(["text"], True), (["text", "lalte"], False)])
def test_costs_are_of_text_where_all_models_read_it(names: list[str], reads: bool, models: Path) -> None:
    directories = [models / name for name in names]
    chosen = All(tuple(map(str, directories)), data=str(models / "text.txt"), split="train", output=models / "out")
    [command] = [part.make() for part in plan_parts(chosen, directories, ()) if part.name == "efficiency"]
    assert (command.data, command.split) == ((chosen.data, "train") if reads else (None, None))


def test_texts_are_known_by_their_contents(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, Perplexity)
    text, copy = models / "text.txt", models / "copied" / "under_another_name.txt"
    copy.parent.mkdir()
    copy.write_bytes(text.read_bytes())
    for data, expected in ((text, 1), (text, 1), (copy, 1)):
        run_all(models, "--parts", "perplexity", "--data", str(data))
        assert len(calls) == expected
    text.write_text(text.read_text().replace("best", "sole"))  # as many bytes
    run_all(models, "--parts", "perplexity", "--data", str(text))
    assert len(calls) == 2


def test_perplexities_stand_beside_that_of_the_first_model(
    models: Path, small_model: Callable[..., HybridForCausalLM], capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks have the shortest length of training; what was measured of a model is kept when another comes."""
    small_model("gated_deltanet", vocab_size=259, max_position_embeddings=64, seed=3).save_pretrained(models / "short")
    byte_tokenizer().save_pretrained(models / "short")
    names = ["short", "text"]
    for count in (1, 2):
        argv = ["evaluate", "all", *(str(models / name) for name in names[:count]), "--output", str(models / "out")]
        assert main([*argv, "--parts", "perplexity", "--data", str(models / "text.txt"), "--samples", "40"]) == 0
    assert f"{models / 'short'}: going on after 5 blocks" in capsys.readouterr().err
    found = json.loads((models / "out" / "perplexity.json").read_text())
    assert found["settings"]["length"] == 64
    difference = found["models"]["text"]["difference"]
    assert difference["to"] == "short"
    page = (models / "out" / "index.html").read_text(encoding="utf-8")
    for note in ("Percents: how much greater the perplexity is than that of short.", NOT_COVERED):
        assert f'<p class="note">{note}</p>' in page
    assert f"\n{100 * math.expm1(difference['value']):+.2f}% (" in page
    assert page.count("<img") == 1
    overview = page.partition("</table>")[0]
    for entry in found["models"].values():
        assert f"<td>{entry['perplexity']:.3f} (" in overview


def test_accuracies_and_pictures_of_other_models_are_not_taken(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    argv = ["evaluate", "all", "--samples", "4", "--contexts", "24", "--output", str(models / "out"), "--parts"]
    first, other = ["needle", "efficiency", "--", str(models / "lalte")], ["needle", "--", str(models / EVIL)]
    assert main([*argv, *first]) == 0
    assert (models / "out" / "pareto.png").is_file()
    accuracies = (models / "out" / "needle-task.json").read_bytes()
    assert main([*argv, *other]) == 0
    (models / "moved").mkdir()
    small = models / "moved" / "lalte"  # another model of the same name, whose accuracies are in no file
    shutil.copytree(models / "text", small)
    (small / "tokenizer.json").unlink()
    (models / "out" / "needle-task.json").write_bytes(accuracies)
    assert main([*argv, "efficiency", "--", str(small)]) == 0
    assert "pareto" not in (models / "out" / "index.html").read_text(encoding="utf-8")
    calls = counted(monkeypatch)
    assert main([*argv, *first]) == 0
    assert calls == ["Needle", "Efficiency"]  # whose files the other models' have replaced


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), torch.OutOfMemoryError("too\nmuch"), KeyError("x")]
)
def test_a_part_that_fails_is_told_and_the_others_go_on(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    quick(monkeypatch)

    def fail(self: Any) -> Any:
        raise error

    monkeypatch.setattr(Needle, "run", fail)
    calls = counted(monkeypatch, Efficiency)
    page = run_all(models, "--parts", "needle", "efficiency", status=1)
    assert calls == ["Efficiency"]
    assert "holdfast: 4 of 10 evaluations failed: needle task; RULER, niah_single_1; " in capsys.readouterr().err
    told = {
        "OSError": "[Errno 5] Input/output error",
        "OutOfMemoryError": "too much",
        "KeyError": "KeyError: &#x27;x&#x27;",
    }
    assert f"not measured: {told[type(error).__name__]}" in page
    assert "prefill tok/s" in page


def test_models_of_one_name_and_two_kinds_have_no_picture_of_both(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same names in every part, though among models of the needle task `lalte` alone would do."""
    quick(monkeypatch)
    shutil.copytree(models / "text", models / "other" / "lalte")
    both = [str(models / "lalte"), str(models / "other" / "lalte")]
    argv = ["evaluate", "all", "--samples", "4", "--contexts", "24", "--output", str(models / "out")]
    assert main([*argv, "--parts", "needle", "efficiency", "--", *both]) == 0
    page = (models / "out" / "index.html").read_text(encoding="utf-8")
    assert "prefill tok/s" in page
    assert not (models / "out" / "pareto.png").exists()
    names = [f"{models.name}/lalte", "other/lalte"]
    for part, shown in (("needle-task", names[:1]), ("efficiency", names)):
        assert list(json.loads((models / "out" / f"{part}.json").read_text())["models"]) == shown


def test_costs_that_are_all_missing_are_a_table(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = run_all(models, "--parts", "efficiency", "--limit", "1e-9")
    assert "more than the 1e-09 s allowed" in page
    assert "operations of one forward token" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "recall"], "nothing was measured of recall; the page says why."),
        (["--parts", "perplexity", "turns"], "nothing was measured of turns, perplexity; the page says why."),
        (["--parts", "needle", "--length", "200"], "nothing was measured of needle; the page says why."),
    ],
)
def test_a_part_that_was_asked_for_and_not_measured_is_a_failure(
    models: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    argv = ["evaluate", "all", str(models / "text"), "--samples", "8", "--output", str(models / "out"), *options]
    assert main(argv) == 1
    assert message in capsys.readouterr().err
    assert "not measured: " in (models / "out" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "message"),
    [("text", "100,000 tokens are more than the 300 that"), ("lalte", "none of the models reads text; leave it out")],
)
def test_a_length_that_no_sample_can_have_is_refused_before_anything_is_measured(
    models: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    argv = ["all", str(models / name), "--output", str(models / "out"), "--length", "100000"]
    assert message in refused(capsys, *argv)
    assert not (models / "out").exists()


@pytest.mark.parametrize("name", ["lalte", "text"])
def test_the_type_of_numbers_reaches_the_scorers(models: Path, name: str) -> None:
    options = ["--parts", "scorers", "--samples", "8", "--dtype", "bfloat16", "--data", str(models / "text.txt")]
    assert main(["evaluate", "all", str(models / name), "--output", str(models / "out"), *options]) == 0
    assert json.loads((models / "out" / f"scorers-{name}.json").read_text())["settings"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(("length", "plan"), [(1024, "turns 2, facts 2"), (1500, "turns 2, facts 4")])
def test_conversations_have_as_many_turns_as_fit(
    models: Path, small_model: Callable[..., HybridForCausalLM], length: int, plan: str
) -> None:
    model = small_model("gated_deltanet", "learned_eviction", vocab_size=259, max_position_embeddings=length)
    model.save_pretrained(models / "text")
    argv = ["evaluate", "all", str(models / "text"), "--samples", "8", "--output", str(models / "out")]
    assert main([*argv, "--parts", "turns"]) == 0
    page = (models / "out" / "index.html").read_text(encoding="utf-8")
    assert plan in page
    assert f"turn_length {(length - 1) // 2}" in page
    assert "lowered_from 8 4 2" in page
    written = json.loads((models / "out" / "turns-text.json").read_text())
    assert written["settings"]["lowered_from"] == {"turns": 8, "facts": 4, "questions": 2}


def test_recall_asks_questions_that_the_seed_draws(models: Path) -> None:
    asked = [{"question": f"{n}?", "answers": [{"text": f"{n}"}]} for n in range(40)]
    squad = models / "squad.json"
    squad.write_text(json.dumps({"data": [{"title": "T", "paragraphs": [{"context": "C", "qas": asked}]}]}))
    options = ["--parts", "recall", "--squad", str(squad), "--samples", "2", "--seed", "3"]
    assert main(["evaluate", "all", str(models / "text"), *options, "--output", str(models / "out")]) == 0
    found = json.loads((models / "out" / "recall.json").read_text())
    assert (found["settings"]["seed"], found["settings"]["samples"]) == (3, 2)
    records = map(json.loads, (models / "out" / "recall.samples.jsonl").read_text().splitlines())
    drawn = load_recall("squad", squad, limit=2, seed=3)
    assert {record["answers"][0] for record in records} == {sample.answers[0] for sample in drawn} != {"0", "1"}


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks are measured in new processes, which takes seconds each."""
    monkeypatch.setattr("holdfast.bench.efficiency.peak_bytes", lambda *_, **__: 1 << 20)


def counted(monkeypatch: pytest.MonkeyPatch, *kinds: type) -> list[str]:
    """Notes which evaluations run; by default needles and efficiency."""
    calls: list[str] = []
    for kind in kinds or (Needle, Efficiency):

        def noted(self: Any, run: Any = kind.run, name: str = kind.__name__) -> Any:
            calls.append(name)
            return run(self)

        monkeypatch.setattr(kind, "run", noted)
    return calls


def stop(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    def interrupt(self: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "run", interrupt)


def test_what_was_measured_of_a_model_that_had_the_name_of_another_is_not_its(models: Path, tmp_path: Path) -> None:
    def determining() -> dict[str, Any]:
        part = Part("needle task", "needle-task", (tmp_path / "a" / "m", tmp_path / "b" / "m"), "")
        return _Measuring(tmp_path)._determining(part, None, {})

    for name, source in (("a", "lalte"), ("b", EVIL)):
        shutil.copytree(models / source, tmp_path / name / "m")
    before = determining()
    assert determining() == before
    for name, other in (("a", "c"), ("b", "a"), ("c", "b")):
        (tmp_path / name).rename(tmp_path / other)
    swapped = determining()["models"]
    assert swapped != before["models"] != swapped[::-1]
