"""Help texts at 80 columns, and what is suggested for an argument that is wrong."""

import re

import pytest
import tyro

from holdfast.cli import COMMANDS, evaluate, main
from holdfast.cli.bench import BENCHMARKS
from holdfast.cli.evaluate.scorers import Scorers

EVALUATIONS = [f"evaluate {name}" for name in evaluate.NAMES if name != "lm-eval"]
BENCHES = ("ops", "prefill", "decode", "train", "data", "controller", "plot")
HELP = [*COMMANDS, *EVALUATIONS, *(f"bench {name}" for name in BENCHES), "train needle-lalte", "train books-lalte"]


def shown(capsys: pytest.CaptureFixture[str], command: str) -> str:
    assert main([*command.split(), "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", HELP)
def test_help_fits_80_columns_and_names_what_is_to_be_given(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, command)
    for raw in ("STR", "INT", "FLOAT", "{None}", "(default: )"):
        assert not re.search(rf"(?<![A-Z]){re.escape(raw)}(?![A-Z])", text), raw
    assert [line for line in text.splitlines() if len(line) > 80 and not line.startswith("  ")] == []  # examples


def test_help_names_arguments(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert shown(capsys, "convert").startswith("usage: holdfast convert [-h] [OPTIONS] SOURCE TARGET\n")
    assert shown(capsys, "generate").startswith("usage: holdfast generate [-h] [OPTIONS] MODEL [PROMPT]\n")
    text = shown(capsys, "evaluate recall")
    assert "--tasks {fda,swde,squad} ..." in text
    assert "--json PATH" in text
    assert "and every continuation to FILE.samples.jsonl, where a run" in " ".join(re.sub("[│ ]+", " ", text).split())
    assert "--data.validation-split VALIDATION-SPLIT" in shown(capsys, "train books-lalte").replace("_", "-")


def test_a_setting_that_may_be_none_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Where its value is something else: `None` then takes it away."""
    lines = shown(capsys, "train books-lalte").splitlines()
    assert any(re.search(r" --data.max-tokens N *$", line.rstrip("│|")) for line in lines)
    assert any(re.search(r" --data.validation-tokens N.None *$", line.rstrip("│|")) for line in lines)


def test_a_command_of_several_lists_them_shortly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown(capsys, "evaluate").splitlines()
    assert "  needle      How well needles are found." in lines
    assert len(lines) < 60
    named = [line.split()[0] for line in shown(capsys, "bench").splitlines() if re.match("  [a-z]+ +[A-Z]", line)]
    assert named == list(BENCHES)
    assert len(BENCHES) == len(BENCHMARKS.__args__)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("evalute", "There is no command 'evalute' (did you mean 'evaluate'?)."),
        ("evaluate perplexit", "There is no evaluation 'perplexit' (did you mean 'perplexity'?)."),
        ("bench op", "holdfast bench has no command 'op' (did you mean 'ops'?)."),
        ("bench --steps 3", "Give a command before --steps: `holdfast bench COMMAND`, one of ops, prefill,"),
        ("evaluate perplexity M --lenght 512", "Unrecognized option: --lenght; did you mean --length? (`holdfast"),
        ("evaluate needle M --lenght=512 --beyond", "Unrecognized option: --lenght; did you mean --length? (`holdfast"),
        ("evaluate recall M --length 5", "Unrecognized option: --length (`holdfast evaluate recall --help`"),
        ("evaluate recall M --sed 5 --beyont", "Unrecognized options: --sed, --beyont; did you mean --seed? ("),
        ("train needle-gdn --max-step 3", "Unrecognized option: --max-step; did you mean --training.max-steps?"),
        ("generate M one two", "Unrecognized argument: two (`holdfast generate --help`"),
        ("evaluate perplexity M", "Missing: --data DATA A file ("),
        ("evaluate recall M --data", "--data lacks its value. ("),
        ("evaluate recall M --seed x", "--seed is 'x'; give an integer. ("),
        ("evaluate turns M --turns x", "--turns is 'x'; give an integer. ("),
        ("evaluate perplexity M --data T --batch-size x", "--batch-size is 'x'; give an integer. ("),
        ("evaluate needle M --length 3 x", "--length cannot be '3', 'x'. ("),
        ("evaluate needle M --lenght -5 --foo", "Unrecognized options: --lenght, --foo; did you mean --length? ("),
        (f"evaluate needle M --{'x' * 90}", f"Unrecognized option: --{'x' * 90} ("),
        ("kernels --targets sm_9", "There is no target 'sm_9' (did you mean 'sm_90'?)."),
    ],
)
def test_what_is_wrong_is_named_and_what_was_meant_suggested(
    call: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(call.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"holdfast: {expected}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        ("convert a b --format publishd", "published"),
        ("info needle-gdn --dtype floa32", "float32"),
        ("evaluate recall M --tasks sqad", "squad"),
        ("evaluate all M --parts needel", "needle"),
        ("bench ops --only atention", "attention"),
    ],
)
def test_a_close_choice_is_suggested(call: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(call.split()) == 2
    assert f" Did you mean {meant}? (`holdfast {call.split()[0]}" in capsys.readouterr().err
    assert main([*call.split()[:-1], "zzzzzz"]) == 2
    assert "you mean" not in capsys.readouterr().err


def test_errors_keep_no_marks_of_the_rules_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    """What other users of tyro show is as tyro has it."""
    with pytest.raises(SystemExit):
        tyro.cli(Scorers, args=["--help"])
    assert "--budgets [INT [INT ...]]" in capsys.readouterr().out
