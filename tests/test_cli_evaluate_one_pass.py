"""`holdfast evaluate perplexity`, `scorers` and the needle task: where they go on, and what they refuse."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from holdfast import HybridForCausalLM
from holdfast.cli import main
from holdfast.cli.evaluate import scorers as scorers_command
from holdfast.data.needle import NeedleTask
from holdfast.data.text import PackedText, byte_tokenizer, load_text, prepare
from holdfast.data.token_bytes import TokenBytes
from holdfast.evaluation.perplexity import evaluate_perplexity
from holdfast.modeling import HybridModel
from holdfast.settings import to_toml
from holdfast.training.recipe import NeedleData, load_recipe
from refusals import refused

TASK = NeedleTask(length=24, num_pairs=3, num_keys=8, num_values=8, num_noise=4, window=6)
TOLD = 64
BUDGETS = ("--budgets", "5", "9")


@pytest.fixture(scope="module")
def models(small_model: Callable[..., HybridForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text` reads bytes, `foreign` knows no end of a document, `tokens` knows the needle task, all of up to 64 tokens;
    and `narrow` lacks tokens of its task."""
    folder = tmp_path_factory.mktemp("models")
    recipe = to_toml(dataclasses.replace(load_recipe("needle-gdn"), data=NeedleData(task=TASK)))
    sizes = {"text": 259, "foreign": 258, "tokens": TASK.vocab_size, "narrow": TASK.vocab_size - 1}
    for name, vocab_size in sizes.items():
        small_model(vocab_size=vocab_size, max_position_embeddings=TOLD).save_pretrained(folder / name)
        if name in ("text", "foreign"):
            byte_tokenizer().save_pretrained(folder / name)
        else:
            (folder / name / "recipe.toml").write_text(recipe)
    documents = [
        {"text": f"Chapter {n}. " + "It was the best of times, it was the worst of times. " * n} for n in (1, 2)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents * 4))
    (folder / "other.txt").write_text("All happy families are alike; every unhappy family is unhappy. " * 20)
    return folder


def command(models: Path, name: str) -> list[str]:
    text = ["--data", str(models / "text.jsonl"), "--length", "48", "--samples", "9"]
    return {
        "perplexity": ["perplexity", str(models / "text"), *text, "--batch-size", "4"],
        "perplexity by document": ["perplexity", str(models / "text"), *text, "--batch-size", "4", "--isolate"],
        "needle": ["needle", str(models / "tokens"), "--samples", "9", "--batch-size", "4"],
        "scorers": ["scorers", str(models / "tokens"), "--samples", "9", *BUDGETS],
        "scorers of text": ["scorers", str(models / "text"), *text, *BUDGETS],
    }[name]


@contextmanager
def counted(most: int = 10**6) -> Iterator[list[torch.Size]]:
    """The shapes of what models were called with; interrupts after so many calls."""
    calls: list[torch.Size] = []
    forward = HybridModel.forward

    def watched(model: HybridModel, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(calls) == most:
            raise KeyboardInterrupt
        calls.append(input_ids.shape)
        return forward(model, input_ids, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HybridModel, "forward", watched)
        yield calls


def written(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("name", "let_through", "kept", "missing", "what"),
    [
        ("perplexity", 1, 4, 2, "blocks"),
        ("perplexity by document", 2, 8, 1, "blocks"),
        ("needle", 2, 8, 1, "samples"),
        ("scorers", 5, 5, 9, "measurements"),
        ("scorers of text", 2 * 5 + 1, 5, 2 * 9, "measurements"),  # two batches each, the sixth was cut off
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_numbers(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    name: str, let_through: int, kept: int, missing: int, what: str,
) -> None:  # fmt: skip
    argv = ["evaluate", *command(models, name)]
    assert main([*argv, "--json", str(tmp_path / "whole.json")]) == 0
    cut = [*argv, "--json", str(tmp_path / "cut.json")]
    with counted(let_through):
        assert main(cut) == 130
    assert not (tmp_path / "cut.json").exists()
    log = tmp_path / "cut.samples.jsonl"
    assert len(log.read_text().splitlines()) == kept
    log.write_text(log.read_text() + '{"run": "cut o')  # as a killed run leaves it
    capsys.readouterr()
    with counted() as calls:
        assert main(cut) == 0
    assert len(calls) == missing
    assert f"going on after {kept} {what}" in capsys.readouterr().err
    assert written(tmp_path / "cut.json") == written(tmp_path / "whole.json")
    with counted() as calls:
        assert main(cut) == 0
    assert calls == []


@pytest.mark.parametrize(
    ("name", "changed", "calls"),
    [
        ("perplexity", ["--isolate"], 3),
        ("perplexity", ["--bins", "3"], 3),
        ("perplexity", ["--dtype", "bfloat16"], 3),
        ("perplexity", ["--length", "47"], 3),
        ("perplexity", ["--data", "other.txt"], 3),
        ("perplexity", ["--samples", "12"], 1),
        ("perplexity", ["--batch-size", "2"], 0),
        ("needle", ["--seed", "1"], 3),
        ("needle", ["--dtype", "bfloat16"], 3),
        ("needle", ["--pairs", "2"], 3),
        ("needle", ["--length", "25"], 3),
        ("needle", ["--samples", "12"], 1),
        ("needle", ["--window", "9"], 0),
        ("scorers", ["--seed", "1"], 14),
        ("scorers", ["--samples", "8"], 14),
        ("scorers", ["--dtype", "bfloat16"], 14),
        ("scorers", ["--budgets", "5", "7"], 7),
        ("scorers of text", ["--samples", "8"], 14),
        ("scorers of text", ["--data", "other.txt"], 28),
    ],
)
def test_what_was_measured_with_other_settings_is_not_taken(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, changed: list[str], calls: int
) -> None:
    monkeypatch.chdir(models)
    argv = ["evaluate", *command(models, name), "--json", str(tmp_path / "out.json")]
    assert main(argv) == 0
    with counted() as made:
        assert main([*argv, *changed]) == 0
    assert len(made) == calls


@pytest.mark.parametrize("name", ["perplexity", "needle", "scorers"])
def test_another_model_and_another_file_are_not_taken(
    models: Path, tmp_path: Path, small_model: Callable[..., HybridForCausalLM], name: str
) -> None:
    argv = command(models, name)
    out = ["--json", str(tmp_path / "out.json")]
    assert main(["evaluate", *argv, *out]) == 0
    other = tmp_path / "other"
    size = 259 if name == "perplexity" else TASK.vocab_size
    small_model(vocab_size=size, max_position_embeddings=TOLD, seed=1).save_pretrained(other)
    byte_tokenizer().save_pretrained(other) if name == "perplexity" else None
    if name != "perplexity":
        (other / "recipe.toml").write_text((models / "tokens" / "recipe.toml").read_text())
    with counted() as calls:
        assert main(["evaluate", argv[0], str(other), *argv[2:], *out]) == 0
    assert len(calls) == (14 if name == "scorers" else 3)
    (tmp_path / "out.samples.jsonl").write_text('{"text": "precious"}\n')
    assert main(["evaluate", *argv, *out]) != 0
    assert (tmp_path / "out.samples.jsonl").read_text() == '{"text": "precious"}\n'


def test_what_does_not_fit_the_model_is_refused_in_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--data", str(models / "text.jsonl")]
    names = {name: str(models / name) for name in ("text", "foreign", "tokens", "narrow")}
    longer = ["--length", "65"]
    page = str(tmp_path / "page.html")
    cases: dict[str, list[list[str]]] = {
        f"'<|eos|>' is token 258 of the tokenizer, and {names['foreign']} knows tokens up to 257": [
            ["perplexity", names["foreign"], *text],
            ["perplexity", names["text"], names["foreign"], *text],
            ["scorers", names["foreign"], *text, *BUDGETS],
        ],
        "has no tokenizer.json, so it cannot read text": [
            ["perplexity", names["tokens"], *text],
            ["scorers", names["tokens"], *text, *BUDGETS],
        ],
        "65 tokens are more than the 64 that": [
            ["perplexity", names["text"], *text, *longer],
            ["scorers", names["text"], *text, *BUDGETS, *longer],
        ],
        "has 23 token ids, and the model knows 22": [
            ["needle", names["narrow"]],
            ["scorers", names["narrow"], *BUDGETS],
        ],
    }
    for message, commands in cases.items():
        for argv in commands:
            assert message in refused(capsys, *argv)
    for argv, message in (
        (["foreign", "It was<|eos|>"], "'<|eos|>' is token 258 of the tokenizer"),
        (["narrow", "--needle"], "has 23 token ids"),
    ):
        capsys.readouterr()
        assert main(["inspect", str(models / argv[0]), *argv[1:], "--output", page]) == 2
        assert message in capsys.readouterr().err
    few = ["--length", "32", "--samples", "1"]  # of the first document, which is longer
    assert main(["evaluate", "perplexity", names["foreign"], *text, *few]) == 0


def test_options_that_would_do_nothing_are_refused_in_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["scorers", str(models / "tokens"), *BUDGETS]
    for option, value in (("--length", "24"), ("--split", "train"), ("--column", "a")):
        assert f"without --data the samples of the needle task are read; leave {option} out" in refused(
            capsys, *task, option, value
        )
    prepared = tmp_path / "prepared"
    prepare(load_text(models / "text.jsonl"), prepared, byte_tokenizer(), split="validation")
    argv = ["perplexity", str(models / "text"), "--data", str(prepared)]
    for option in ("--column", "--config"):
        assert f"prepared text, that is tokens; leave {option} out" in refused(capsys, *argv, option, "other")
    page = str(tmp_path / "page.html")
    assert main(["inspect", str(models / "text"), "It was", "--seed", "0", "--output", page]) == 2
    assert "leave --seed out" in capsys.readouterr().err


def test_by_default_as_many_blocks_are_read_at_once_as_hold_16384_tokens(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def watched(*args: Any, batch_size: int, **options: Any) -> Any:
        taken.append(batch_size)
        return evaluate_perplexity(*args, batch_size=batch_size, **options)

    monkeypatch.setattr("holdfast.evaluation.perplexity.evaluate_perplexity", watched)
    argv = ["evaluate", "perplexity", str(models / "text"), "--data", str(models / "text.jsonl"), "--samples", "1"]
    assert main([*argv, "--length", "48"]) == 0
    assert main([*argv, "--length", "48", "--batch-size", "2"]) == 0
    assert taken == [16_384 // 48, 2]
    (models / "long.txt").write_text("It was the best of times. " * 1000)
    argv = ["evaluate", "perplexity", str(models / "text"), "--data", str(models / "long.txt"), "--samples", "1"]
    assert main([*argv, "--length", "20000", "--beyond"]) == 0
    assert taken[2:] == [1]


def test_beyond_the_length_of_training(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "perplexity.json"
    text = ["--data", str(models / "text.jsonl"), "--samples", "2", "--json"]
    assert main(["evaluate", "perplexity", str(models / "text"), *text, str(out)]) == 0
    assert written(out)["settings"]["length"] == TOLD  # by default what the model was told of
    assert main(["evaluate", "perplexity", str(models / "text"), *text, str(out), "--length", "100", "--beyond"]) == 0
    assert written(out)["models"]["text"]["bins"][-1]["stop"] == 100
    out = tmp_path / "scorers.json"
    argv = ["evaluate", "scorers", str(models / "text"), *text, str(out), *BUDGETS, "--scorers", "recency"]
    assert main(argv) == 0
    assert written(out)["settings"]["length"] == TOLD
    assert main([*argv, "--length", "100", "--beyond"]) == 0
    assert written(out)["settings"]["length"] == 100
    for name in ("perplexity", "scorers"):
        capsys.readouterr()
        assert main(["evaluate", name, "--help"]) == 0
        assert "--beyond" in capsys.readouterr().out
    recipe = models / "tokens" / "recipe.toml"
    long = tmp_path / "tokens"
    HybridForCausalLM.from_pretrained(models / "tokens").save_pretrained(long)
    (long / "recipe.toml").write_text(recipe.read_text().replace("length = 24", "length = 65"))
    assert "65 tokens are more than the 64" in refused(capsys, "scorers", str(long), *BUDGETS)
    assert main(["evaluate", "scorers", str(long), *BUDGETS, "--scorers", "recency", "--samples", "4", "--beyond"]) == 0


def test_perplexity_by_document(models: Path, tmp_path: Path) -> None:
    argv = [*command(models, "perplexity by document"), "--json", str(tmp_path / "out.json")]
    assert main(["evaluate", *argv]) == 0
    found = written(tmp_path / "out.json")
    assert found["settings"]["isolate"]
    texts = load_text(models / "text.jsonl", split="validation")
    blocks = PackedText.from_texts(texts, byte_tokenizer(), 48, isolate=True, progress=False)
    model = HybridForCausalLM.from_pretrained(models / "text").eval()
    sizes = TokenBytes.of(byte_tokenizer())
    expected = evaluate_perplexity(model, blocks, max_blocks=9, batch_size=4, token_bytes=sizes, progress=False)
    assert found["models"]["text"] == expected.to_dict() | {"difference": None}
    assert expected.tokens < 9 * 47  # documents start inside


def test_the_rest_of_a_long_document_counts_as_a_document_of_its_own(models: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("It was the best of times. " * 8)  # four blocks of 48, one document
    out = tmp_path / "out.json"
    argv = ["perplexity", str(models / "text"), "--data", str(tmp_path / "one.txt"), "--length", "48", "--isolate"]
    assert main(["evaluate", *argv, "--bins", "48", "--json", str(out)]) == 0
    bins = written(out)["models"]["text"]["bins"]
    assert [part["tokens"] for part in bins] == [0] + [4] * 47  # each block begins at position 0


def test_the_bar_has_a_total(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    totals: list[int | None] = []

    def watched(items: Any, description: str, *, total: int | None = None, progress: bool = True) -> Any:
        totals.append(total)
        return items

    monkeypatch.setattr("holdfast.evaluation.perplexity.track", watched)
    assert main(["evaluate", *command(models, "perplexity")]) == 0
    assert totals == [3]


def test_text_need_not_be_english(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    letters = {word: number for number, word in enumerate(["[UNK]", "[EOS]", "A", "C", "G", "T"])}
    backend = Tokenizer(WordLevel(letters, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]")
    folder = tmp_path / "genes"
    HybridForCausalLM.from_pretrained(models / "text").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "genes.txt").write_text("G A T T A C A " * 50)
    assert main(["evaluate", "perplexity", str(folder), "--data", str(tmp_path / "genes.txt")]) == 0
    assert "cannot write 'The key is 7.'" in refused(capsys, "needle", str(folder), "--length", "60")


def test_a_model_is_built_once_to_be_checked(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []
    build = scorers_command._without_weights
    monkeypatch.setattr(scorers_command, "_without_weights", lambda path: built.append(path) or build(path))
    assert main(["evaluate", *command(models, "scorers")]) == 0
    assert built == [models / "tokens"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "trained (CNN, R = 13)"),
        ({"conv_size": (1, 1, 1), "conv_dilation": (1, 1, 1)}, "trained (MLP)"),
        ({"conv_dilation": (1, 1, 1), "scorer_causal": True}, "trained (CNN, R = 7, causal)"),
    ],
)
def test_the_trained_scorer_bears_its_name(
    small_model: Callable[..., HybridForCausalLM],
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    name: str,
) -> None:
    folder = tmp_path / "m"
    small_model(vocab_size=TASK.vocab_size, options={"learned_eviction": options}).save_pretrained(folder)
    (folder / "recipe.toml").write_text((models / "tokens" / "recipe.toml").read_text())
    argv = [str(folder), "--budgets", "5", "--scorers", "trained", "random", "--samples", "4"]
    assert main(["evaluate", "scorers", *argv, "--json", str(tmp_path / "out.json")]) == 0
    assert f"│ {name} " in capsys.readouterr().out
    found = written(tmp_path / "out.json")["models"]["m"]
    assert [cell["scorer"] for cell in found["cells"]] == ["trained", "random"]
    assert f"trained ({found['trained']})" == name


NEEDLES = ("--tasks", "niah_single_1", "niah_multikey_2", "--samples", "2", "--length", "1200", "--beyond")


def test_scorers_are_asked_for_needles_in_one_pass(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "needles.json"
    argv = ["evaluate", "scorers", str(models / "text"), *NEEDLES, "--budgets", "5", "--scorers", "trained", "random"]
    assert main([*argv, "--json", str(output)]) == 0
    data = json.loads(output.read_text())
    settings, cells = data["settings"], data["models"]["text"]["cells"]
    assert settings["measure"] == "needles found in one pass"
    assert (settings["length"], settings["tasks"]) == (1200, ["niah_multikey_2", "niah_single_1"])
    assert [(cell["scorer"], cell["task"]) for cell in cells] == [
        (scorer, task) for scorer in ("trained", "random") for task in ("niah_multikey_2", "niah_single_1")
    ]
    for cell in cells:
        assert (cell["count"], cell["correct"]) == (2, 0)
        assert cell["interval"][1] > 0.3  # two samples of a model that knows nothing say little


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "niah_single_9"], "There is no task 'niah_single_9' (did you mean 'niah_single_"),
        (["--tasks", "niah_multiquery", "--length", "3000", "--beyond"], "hides needles in essays"),
        (["--tasks", "niah_single_1"], "more than the length of 64; give a greater one"),
        (["--tasks", "niah_single_1", "--split", "train"], "no text is read; leave --split out"),
        (["--tasks", "niah_single_1", "--data", "x"], "--tasks and --data are two measures; give one of them."),
        (["--haystack", "x"], "--haystack is for --tasks"),
    ],
)
def test_needles_that_cannot_be_asked_for_are_refused(
    models: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in refused(capsys, "scorers", str(models / "text"), *options)
    essays = ["--haystack", str(models / "other.txt"), "--tasks", "niah_multivalue", "--length", "3000", "--beyond"]
    told = refused(capsys, "scorers", str(models / "text"), *essays, "--samples", "1")
    assert "asks for 4 values; one pass can ask for one only" in told
