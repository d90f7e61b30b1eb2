"""`holdfast evaluate needle`, `recall` and `turns`: what they write, where they go on, and how they refuse."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast import HybridForCausalLM
from holdfast.cli import main
from holdfast.cli.evaluate.common import read_haystack
from holdfast.data.text import byte_tokenizer
from holdfast.evaluation.conversation import Conversation
from holdfast.settings import to_toml
from holdfast.training.recipe import NeedleData, load_recipe
from refusals import refused

Answer = Callable[[Conversation, int, Any], list[list[int]]]
NEEDLE = ("--length", "500", "--depths", "0", "100", "--samples", "2", "--new-tokens", "8", "--batch-size", "3")


@pytest.fixture(scope="module")
def models(small_model: Callable[..., HybridForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text` reads bytes and was told of 1,000, `tokens` reads the needle task's, `foreign` lacks letters."""
    folder = tmp_path_factory.mktemp("models")
    for name, vocab_size in (("text", 259), ("tokens", 83), ("foreign", 104)):
        model = small_model("gated_deltanet", "learned_eviction", vocab_size=vocab_size, max_position_embeddings=1000)
        model.save_pretrained(folder / name)
        if name != "tokens":
            byte_tokenizer().save_pretrained(folder / name)
    small_model("gated_deltanet", vocab_size=259).save_pretrained(folder / "plain")
    recipe = dataclasses.replace(load_recipe("needle-gdn"), data=NeedleData())
    (folder / "tokens" / "recipe.toml").write_text(to_toml(recipe))
    return folder


@pytest.fixture
def squad(tmp_path: Path) -> Path:
    questions = [
        {"question": f"What is {n}?", "id": str(n), "answers": [{"text": f"{n}", "answer_start": 0}]} for n in range(7)
    ]
    article = {"title": "Numbers", "paragraphs": [{"context": "0 1 2 3 4 5 6", "qas": questions}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [article]}))
    return path


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Lets so many more calls of `Conversation.answer` through, then interrupts; notes how many rows each had."""
    answer: Answer = Conversation.answer

    def arrange(calls: int) -> list[int]:
        rows: list[int] = []

        def interrupted(talk: Conversation, max_new_tokens: int, stop: Any = ()) -> list[list[int]]:
            if len(rows) == calls:
                raise KeyboardInterrupt
            rows.append(len(talk.tokens_said))
            return answer(talk, max_new_tokens, stop)

        monkeypatch.setattr(Conversation, "answer", interrupted)
        return rows

    return arrange


def commands(models: Path, squad: Path) -> dict[str, list[str]]:
    """A call of each, with what it answers in how many batches."""
    return {
        "needle": ["needle", str(models / "text"), *NEEDLE],
        "recall": ["recall", str(models / "text"), "--tasks", "squad", "--data", str(squad), "--batch-size", "3"],
        "turns": ["turns", str(models / "tokens"), "--samples", "5", "--batch-size", "2", "--turn-length", "14"],
    }


@pytest.mark.parametrize(
    ("name", "let_through", "kept", "missing"),
    [("needle", 1, 3, [1]), ("recall", 2, 6, [1]), ("turns", 16 * 2, 4, [1] * 16)],
)
def test_an_interrupted_run_goes_on_to_the_same_numbers(
    models: Path,
    squad: Path,
    stopped: Callable[[int], list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    let_through: int,
    kept: int,
    missing: list[int],
) -> None:
    argv = ["evaluate", *commands(models, squad)[name]]
    stopped(10**6)
    assert main([*argv, "--json", str(tmp_path / "whole.json")]) == 0
    stopped(let_through)
    assert main([*argv, "--json", str(tmp_path / "cut.json")]) == 130
    assert not (tmp_path / "cut.json").exists()
    assert len((tmp_path / "cut.samples.jsonl").read_text().splitlines()) == kept
    rows = stopped(10**6)
    capsys.readouterr()
    assert main([*argv, "--json", str(tmp_path / "cut.json")]) == 0
    assert f"going on after {kept} answers" in capsys.readouterr().err
    assert rows == missing
    whole, cut = (json.loads((tmp_path / f"{file}.json").read_text()) for file in ("whole", "cut"))
    assert without_resumed(cut) == without_resumed(whole)
    assert whole["evaluation"] == name
    assert whole["machine"]["packages"]["torch"]
    assert "commit" in whole["machine"]
    assert "seed" in whole["settings"]
    assert whole["settings"]["dtype"] == "float32"
    assert list(whole["models"]) == ["tokens" if name == "turns" else "text"]


def test_answers_of_another_commit_are_not_gone_on_from(
    models: Path, squad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["evaluate", *commands(models, squad)["recall"], "--json", str(tmp_path / "found.json")]
    for commit, resumed in (("1" * 40, 0), ("2" * 40, 0), ("1" * 40, 1)):
        monkeypatch.setattr("holdfast.machine._commit", lambda commit=commit: commit)
        assert main(argv) == 0
        assert capsys.readouterr().err.count("going on after") == resumed
        assert json.loads((tmp_path / "found.json").read_text())["machine"]["commit"] == commit


def test_recall_draws_by_the_seed(models: Path, squad: Path, tmp_path: Path) -> None:
    argv = ["evaluate", *commands(models, squad)["recall"], "--samples", "3"]

    def run(seed: int, name: str) -> dict[str, Any]:
        assert main([*argv, "--seed", str(seed), "--json", str(tmp_path / f"{name}.json")]) == 0
        return json.loads((tmp_path / f"{name}.json").read_text())

    def answers(name: str) -> set[str]:
        lines = (tmp_path / f"{name}.samples.jsonl").read_text().splitlines()
        return {answer for line in lines for answer in json.loads(line)["answers"]}

    first, second, alone = run(0, "both"), run(1, "both"), run(1, "alone")
    assert (first["settings"]["seed"], second["settings"]["seed"]) == (0, 1)
    assert without_resumed(second) == without_resumed(alone)  # the log of the first says nothing of the second
    assert len(answers("alone")) == 3
    assert len(answers("both")) > 3
    assert first["models"]["text"]["squad"]["contains"]["effective"] < 3  # questions of one passage


def test_recall_says_what_to_give_where_the_hub_cannot_be_reached(
    models: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.data.hub.hub_is_reachable", lambda: False)
    assert main(["evaluate", "recall", str(models / "text"), "--tasks", "fda"]) == 2
    error = capfd.readouterr().err
    assert "Couldn't reach 'hazyresearch/based-fda'" in error
    assert error.endswith("; or give a file of the task: --tasks fda --data FILE\n")
    assert error.count("\n") == 1


def test_prompts_that_are_too_long_can_be_left_out(
    models: Path, squad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = json.loads(squad.read_text())
    paragraphs = published["data"][0]["paragraphs"]
    paragraphs.append({**paragraphs[0], "context": "7 " * 600})
    squad.write_text(json.dumps(published))
    argv = ["recall", str(models / "text"), "--tasks", "squad", "--data", str(squad), "--new-tokens", "4"]
    assert "7 of 14 prompts of squad" in refused(capsys, *argv)
    assert "give one of them" in refused(capsys, *argv, "--beyond", "--skip-long")
    file = tmp_path / "r.json"
    assert main(["evaluate", *argv, "--skip-long", "--json", str(file)]) == 0
    assert "7 of 14 prompts of squad with answers of 4 tokens" in capsys.readouterr().err
    assert json.loads(file.read_text())["models"]["text"]["squad"]["contains"]["count"] == 7


def without_resumed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_resumed(entry) for name, entry in value.items() if name != "resumed"}
    return [without_resumed(entry) for entry in value] if isinstance(value, list) else value


def test_tables_and_pictures(models: Path, squad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = commands(models, squad)
    picture = tmp_path / "picture.png"
    assert main(["evaluate", *argv["needle"], "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "500 tokens" in shown
    assert "niah_single_1" in shown
    assert picture.stat().st_size > 5000
    assert main(["evaluate", *argv["turns"], "--asides", "--plot", str(tmp_path / "turns.svg")]) == 0
    shown = capsys.readouterr().out
    assert "turns back" in shown
    assert "tokens" in shown
    assert (tmp_path / "turns.svg").stat().st_size > 5000
    assert main(["evaluate", *argv["recall"]]) == 0
    assert "squad, 7 samples" in capsys.readouterr().out


def test_text_turns_and_essays(models: Path, tmp_path: Path) -> None:
    (tmp_path / "essays").mkdir()
    for number in range(3):
        (tmp_path / "essays" / f"{number}.txt").write_text(f"Essay {number}. It is short. " * 9)
    haystack = ["--haystack", str(tmp_path / "essays")]
    turns = ["--turns", "2", "--facts", "1", "--questions", "1", "--samples", "2"]
    file = tmp_path / "results.json"
    assert main(["evaluate", "turns", str(models / "text"), *turns, *haystack, "--json", str(file)]) == 0
    found = json.loads(file.read_text())["models"]["text"]
    assert 900 < found["tokens_said"] <= 1000  # by default what the model was trained on
    assert found["script"]["kind"] == "text"
    file = tmp_path / "needle.json"
    argv = ["evaluate", "needle", str(models / "text"), *NEEDLE, "--tasks", "all", *haystack, "--beyond"]
    assert main([*argv, "--length", "1200", "--depths", "50", "--samples", "1", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["settings"]["essays"]["words"] == 3 * 9 * 5
    cells = written["models"]["text"]["cells"]
    assert len(cells) == 8
    assert all(cell["prompt_tokens"] <= 1200 - 8 for cell in cells)


@pytest.mark.parametrize(("told", "found"), [(512, None), (1000, (2, 2, 1)), (3000, (4, 4, 2))])
def test_by_default_conversations_have_as_many_turns_as_fit(
    small_model: Callable[..., HybridForCausalLM],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    told: int,
    found: tuple[int, int, int] | None,
) -> None:
    folder, file = tmp_path / "m", tmp_path / "r.json"
    small_model(vocab_size=259, max_position_embeddings=told).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    argv = ["turns", str(folder), "--samples", "1", "--json", str(file)]
    if found is None:
        assert "not even two turns with a fact each fit into the 512 tokens" in refused(capsys, *argv)
        return
    assert main(["evaluate", *argv]) == 0
    written = json.loads(file.read_text())
    script = written["models"]["m"]["script"]
    turns, facts, questions = found
    assert written["settings"]["lowered_from"] == {"turns": 8, "facts": 4, "questions": 2}
    assert (
        f"8 turns of 4 facts and 2 questions do not fit these models, trained on {told:,} tokens: "
        f"{turns} turns of {facts} facts and {questions} questions instead.\n"
    ) in capsys.readouterr().err
    assert (script["turns"], script["facts"], script["questions"]) == found
    assert script["turn_length"] == (told - 1) // found[0]


def test_turns_that_fit_are_not_lowered(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["evaluate", "turns", str(models / "tokens"), "--samples", "1", "--json", str(tmp_path / "r.json")]
    for options in ([], ["--turns", "2", "--facts", "1", "--questions", "1"]):
        assert main([*argv, *options]) == 0
        assert json.loads((tmp_path / "r.json").read_text())["settings"]["lowered_from"] is None
    assert "do not fit" not in capsys.readouterr().err


def test_needles_lie_by_default_in_what_every_model_was_trained_on(
    models: Path, small_model: Callable[..., HybridForCausalLM], tmp_path: Path
) -> None:
    small_model(vocab_size=259, max_position_embeddings=700).save_pretrained(tmp_path / "short")
    byte_tokenizer().save_pretrained(tmp_path / "short")
    argv = ["needle", str(models / "text"), str(tmp_path / "short"), "--depths", "0", "--samples", "1"]
    assert main(["evaluate", *argv, "--new-tokens", "8", "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["lengths"] == [700]


def test_models_of_one_name_are_told_apart(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokens").symlink_to(models / "tokens")
    pair = [str(models / "tokens"), str(tmp_path / "tokens")]
    options = ["--samples", "1", "--turns", "2", "--json", str(tmp_path / "r.json")]
    assert main(["evaluate", "turns", *pair, *options]) == 0
    names = [f"{models.name}/tokens", f"{tmp_path.name}/tokens"]
    assert list(json.loads((tmp_path / "r.json").read_text())["models"]) == names


def test_models_are_called_as_they_were_given(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for link in ("a", "b"):
        (tmp_path / link).symlink_to(models / "tokens")
    file = tmp_path / "r.json"
    assert main(["evaluate", "needle", "a", "./b/", "--samples", "2", "--json", str(file)]) == 0
    assert list(json.loads(file.read_text())["models"]) == ["a", "b"]
    shown = capsys.readouterr().out
    assert "tokens" not in shown.partition("distance")[2]


def test_what_cannot_be_done_is_refused_in_one_line(
    models: Path, squad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, tokens, foreign = (str(models / name) for name in ("text", "tokens", "foreign"))
    argv = commands(models, squad)
    cases = {
        "There is no model directory absent": ["turns", "absent"],
        "Give at least one model directory: `holdfast evaluate recall": ["recall"],
        "evaluate them in two calls": ["needle", text, tokens],
        "reads text; leave --pairs out": [*argv["needle"], "--pairs", "3"],
        "gets the needle task; leave --new-tokens out": ["needle", tokens, "--new-tokens", "3"],
        "The needle task has one --length": ["needle", tokens, "--length", "64", "128"],
        "2,000 tokens are more than the 1,000 that": ["needle", tokens, "--length", "2000"],
        "1,001 tokens are more than the 1,000 that": ["needle", text, "--length", "600", "1001"],
        "3,201 tokens are more": ["turns", tokens, "--turns", "8", "--turn-length", "400"],
        "7 of 7 prompts of squad with answers of 999 tokens are longer than the 1,000": [
            *argv["recall"],
            "--new-tokens",
            "999",
        ],
        f"'h' is token 104 of the tokenizer, and {foreign} knows": ["needle", foreign, "--length", "600"],
        "'h' is token 104 of the tokenizer, ": ["turns", foreign],
        "'h' is token 104 of the tokenizer": ["recall", foreign, "--tasks", "squad", "--data", str(squad)],
        "has no tokenizer.json, so it cannot read text": ["recall", tokens, "--tasks", "squad", "--data", str(squad)],
        "nowhere.json does not exist": ["recall", text, "--tasks", "squad", "--data", str(tmp_path / "nowhere.json")],
        "--data holds one task; say which with --tasks": ["recall", text, "--data", str(tmp_path / "rows.jsonl")],
        "squad.json, SQuAD's questions; leave --tasks out": ["recall", text, "--data", str(squad), "--tasks", "fda"],
        "squad.json, SQuAD's questions; leave --tasks": [
            "recall",
            text,
            "--data",
            str(squad),
            "--tasks",
            "fda",
            "squad",
        ],
        "reads text": ["needle", text, "--pairs", "3"],
        "gets the needle task; leave --tasks out": ["needle", tokens, "--tasks", "niah_single_1"],
        f"{text} is given twice": ["lm-eval", text, text, "--tasks", "any"],
        "SQuAD's questions, and no text to be read on: `holdfast evaluate recall MODEL --data": [
            *("perplexity", text, "--data", str(squad))
        ],
        "--data: rows.json": ["recall", text, "--tasks", "fda", "--data", "rows.json"],
        f"{models / 'plain'} has no layer that evicts, so no scorer decides anything: its layers are gated_deltanet; "
        "give a model with learned_eviction": ["scorers", str(models / "plain"), "--budgets", "16"],
        "nowhere.txt does not exist": [*argv["needle"], "--haystack", str(tmp_path / "nowhere.txt")],
        "niah_single_3 hides needles in essays": [*argv["needle"], "--tasks", "niah_single_3"],
        "there is no task 'niah_9'": [*argv["needle"], "--tasks", "niah_9"],
        "give a file that ends in .png, .svg, .pdf": [*argv["turns"], "--plot", "picture.jpg"],
        "which some of the models cannot read": ["turns", text, tokens, "--haystack", str(squad)],
        "40 keys, the task has 32": ["turns", tokens, "--facts", "5", "--turn-length", "20"],
        "no more questions than facts": ["turns", tokens, "--questions", "5"],
    }
    for message, command in cases.items():
        assert message in refused(capsys, *command)


@pytest.mark.parametrize(
    ("kind", "options", "advice"),
    [
        ("tokens", ["--turns", "90"], " With 4 facts and 2 questions in a turn at most --turns 8 fit."),
        (
            "tokens",
            ["--turns", "8", "--turn-length", "400"],
            " With 4 facts and 2 questions in a turn at most --turns 2",
        ),
        ("text", ["--turns", "30"], " questions in a turn at most --turns "),
        ("text", ["--turns", "8", "--facts", "40", "--questions", "40"], " Lower --facts or --questions, or leave "),
    ],
)
def test_turns_that_do_not_fit_are_refused_with_what_fits(
    kind: str, options: list[str], advice: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["turns", str(models / kind), "--samples", "1"]
    error = refused(capsys, *argv, *options)
    assert advice in error
    if found := re.search(r"at most (--turns) (\d+) fit", error):
        fitting = [*options[:1], found[2], *options[2:]]
        assert main(["evaluate", *argv, *fitting]) == 0
        assert advice in refused(capsys, *argv, *options[:1], str(int(found[2]) + 1), *options[2:])


def test_squads_own_file_needs_no_task(models: Path, squad: Path, tmp_path: Path) -> None:
    argv = ["recall", str(models / "text"), "--data", str(squad), "--samples", "2", "--json", str(tmp_path / "r.json")]
    assert main(["evaluate", *argv]) == 0
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["settings"]["tasks"] == ["squad"]
    assert list(written["models"]["text"]) == ["squad"]


def test_only_a_text_with_a_token_that_the_model_does_not_know_is_refused(
    small_model: Callable[..., HybridForCausalLM], squad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever else the tokenizer has."""
    known, foreign, questions = tmp_path / "known", tmp_path / "cheese.txt", tmp_path / "cheese.json"
    small_model(vocab_size=128, max_position_embeddings=1000).save_pretrained(known)
    byte_tokenizer().save_pretrained(known)
    foreign.write_text("Alter Käse. " * 200, encoding="utf-8")
    questions.write_text(squad.read_text().replace("What is 3?", "Käse?"), encoding="utf-8")
    turns = ["turns", str(known), "--samples", "1", "--turns", "2", "--facts", "1", "--questions", "1"]
    recall = ["recall", str(known), "--new-tokens", "2", "--tasks", "squad", "--data"]
    needle = ["needle", str(known), *NEEDLE, "--tasks", "niah_single_1"]
    for command in (turns, [*recall, str(squad)], needle):
        assert main(["evaluate", *command]) == 0
    for command in (
        [*turns, "--haystack", str(foreign)],
        [*recall, str(questions)],
        ["needle", str(known), *NEEDLE, "--tasks", "niah_single_2", "--haystack", str(foreign)],
    ):
        error = refused(capsys, *command)
        assert f"is token 195 of the tokenizer, and {known} knows tokens up to 127" in error
    whole, json = tmp_path / "whole", tmp_path / "r.json"  # a model that comes first is not asked in vain
    small_model(vocab_size=259, max_position_embeddings=1000).save_pretrained(whole)
    byte_tokenizer().save_pretrained(whole)
    for command in ([*turns, "--haystack", str(foreign)], [*recall, str(questions)]):
        assert "is token 195" in refused(capsys, command[0], str(whole), *command[1:], "--json", str(json))
    assert not list(tmp_path.glob("r.*"))


def test_a_model_that_an_option_has_taken_is_named(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(models / "text")
    for options in (["needle", "--length", "600"], ["all", "--parts", "needle"]):
        assert f"; if {text} is a model, models come before the options, or after --, " in refused(
            capsys, *options, text
        )
    assert "is a model" not in refused(capsys, "needle", text, "--length", "many")
    assert "models come before the options, or after --" in refused(capsys, "needle", "--tasks", "all", text)


def test_an_evaluation_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no evaluation 'nedle' (did you mean 'needle'?).\n" in refused(capsys, "nedle", "runs/x")
    names = "all, efficiency, lm-eval, needle, perplexity, recall, scorers, turns"
    assert f"There is no evaluation 'runs/x' (known: {names}).\n" in refused(capsys, "runs/x", "needle")


def test_another_file_is_not_taken_for_a_log(models: Path, squad: Path, tmp_path: Path) -> None:
    (tmp_path / "r.samples.jsonl").write_text('{"text": "precious"}\n')
    argv = ["evaluate", *commands(models, squad)["recall"], "--json", str(tmp_path / "r.json")]
    assert main(argv) != 0
    assert (tmp_path / "r.samples.jsonl").read_text() == '{"text": "precious"}\n'


@pytest.mark.parametrize(
    ("command", "options", "error"),
    [
        ("needle", ["--plot", "foo.xyz"], "--plot is foo.xyz; give a file that ends in .png"),
        ("scorers", ["--plot", "foo.xyz"], "--plot is foo.xyz; give a file that ends in .png"),
        ("turns", ["--plot", "foo.xyz"], "--plot is foo.xyz; give a file that ends in .png"),
        ("needle", ["--samples", "0"], "--samples is 0; give at least 1."),
        ("needle", ["--length", "64", "-1"], "--length is -1; give at least 1."),
        ("scorers", ["--samples", "0"], "--samples is 0; give at least 1."),
        ("perplexity", ["--data", "x", "--bins", "0"], "--bins is 0; give at least 1."),
        ("perplexity", ["--data", "x", "--batch-size", "0"], "--batch-size is 0; give at least 1."),
        ("perplexity", ["--data", "x", "--samples", "0"], "--samples is 0; give at least 1."),
        ("recall", ["--samples", "0"], "--samples is 0; give at least 1."),
        ("turns", ["--samples", "0"], "--samples is 0; give at least 1."),
    ],
)  # fmt: skip
def test_options_are_checked_before_a_model_is_read(
    command: str, options: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error in refused(capsys, command, "nowhere", *options)


def test_a_model_without_a_needle_recipe_is_not_given_a_task_of_another(
    small_model: Callable[..., HybridForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_model("gated_deltanet").save_pretrained(tmp_path / "m")
    assert "has no recipe.toml, which says what needle task" in refused(capsys, "needle", str(tmp_path / "m"))
    (tmp_path / "m" / "recipe.toml").write_text(to_toml(load_recipe("books-lalte")))
    assert "was trained on text, as its recipe.toml says" in refused(capsys, "turns", str(tmp_path / "m"))


def test_a_directory_of_haystacks_is_all_its_texts(tmp_path: Path) -> None:
    """Also where file names tell splits, of which a haystack has none."""
    names = ("train.txt", "validation.txt", "deep/dev-notes.txt", "essay.txt")
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("word " * 10**number)
    (tmp_path / "picture.png").write_bytes(b"no text")
    essays = read_haystack([str(tmp_path)])
    assert essays is not None
    assert essays.words == 1111
    assert read_haystack([str(tmp_path / "validation.txt")]).words == 10  # type: ignore[union-attr]
