"""What the consoles of the command line show is what was written: brackets in names and messages are no markup."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from holdfast import HybridForCausalLM
from holdfast.cli import main
from holdfast.cli.common import error_console, output_console
from holdfast.cli.evaluate.needle import Needle
from holdfast.data import progress
from holdfast.data.text import byte_tokenizer

TEXTS = ("lalte[b16]", "[enforce fail at alloc_cpu.cpp:117] err == 0", "runs/[/old]", "a:x:b", "[bold]no")


@pytest.mark.parametrize("make", [output_console, error_console])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_cells_and_rules_are_shown_as_they_are(
    make: Callable[[], Console], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    table = Table(title=f"title {text}")
    table.add_column(f"heading {text}")
    table.add_row(f"cell {text}")
    console = make()
    console.print(f"line {text}", table)
    console.rule(f"rule {text}")
    captured = capsys.readouterr()
    for place in ("line", "title", "heading", "cell", "rule"):
        assert f"{place} {text}" in captured.out + captured.err


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_bars_and_lines_of_progress_name_what_they_are_about(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, text: str
) -> None:
    shown = io.StringIO()

    def console(**options: object) -> Console:
        return Console(file=shown, force_terminal=terminal, width=100, **(options | {"stderr": False}))  # type: ignore[arg-type]

    monkeypatch.setattr(progress, "Console", console)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    assert list(progress.track([1, 2], text)) == [1, 2]
    assert text in shown.getvalue()


@pytest.fixture
def model(small_model: Callable[..., HybridForCausalLM], tmp_path: Path) -> Path:
    folder = tmp_path / "lalte[b16]"
    small_model(vocab_size=259, max_position_embeddings=600).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_keeps_its_whole_name_in_a_table(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--length", "400", "--samples", "1", "--depths", "50", "--new-tokens", "2"]
    assert main(["evaluate", "needle", str(model), *options]) == 0
    assert "lalte[b16]" in capsys.readouterr().out


def test_a_message_with_brackets_ends_no_evaluation(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Needle) -> None:
        raise RuntimeError("no room for [/x] [enforce fail at 117]")

    monkeypatch.setattr(Needle, "run", fail)
    output = model.parent / "out"
    main(["evaluate", "all", str(model), "--parts", "needle", "--output", str(output)])
    assert "Not measured: no room for [/x] [enforce fail at 117]" in capsys.readouterr().err
    assert "no room for [/x] [enforce fail at 117]" in (output / "index.html").read_text(encoding="utf-8")
