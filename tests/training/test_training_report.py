"""The page about training runs: what it says, that it says it for unfinished runs too, and that it is safe to open."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.cli import main
from holdfast.settings import to_toml
from holdfast.training import load_recipe
from holdfast.training.history import RunHistory, read_history
from holdfast.training.report import draw_heads, draw_losses, draw_speed, write_report

LAYERS, HEADS, BUDGET = 1, 2, 40  # of needle-lalte


def line(step: int, **more: Any) -> dict[str, Any]:
    kept = [[20.0 + step, 38.0]]
    head = {"kept": kept, "stored": [[min(k, BUDGET) for k in kept[0]]], "lambda": [[0.0, 1e-3 * step]]}
    means = {"kept_mean": sum(kept[0]) / 2, "stored_mean": sum(head["stored"][0]) / 2}
    speed = {"tokens_per_second": 1000.0 + step, "utilisation": 0.25}
    return {"step": step, "seconds": 0.1 * step, "loss": 3.0 / step, **means, **speed, **head, **more}


def make_run(path: Path, lines: list[dict[str, Any]], *, finished: bool = False, recipe: bool = True) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    if recipe:
        (path / "recipe.toml").write_text(to_toml(load_recipe("needle-lalte")))
    if finished:
        (path / "summary.json").write_text("{}")
    return path


def page_of(runs: list[RunHistory], tmp_path: Path) -> str:
    return write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    return re.sub(r"<[^>]*>|\s+", " ", re.sub(r'src="data:[^"]*"', "", page))


def test_a_finished_run(tmp_path: Path) -> None:
    lines = [line(step) for step in range(1, 21)]
    lines.append({"step": 20, "seconds": 3.0, "eval_loss": 0.5})
    history = read_history(make_run(tmp_path / "run", lines, finished=True))
    assert (history.budget, history.layers, history.planned_steps, history.finished) == (BUDGET, [1], 1300, True)
    page = page_of([history], tmp_path)
    text = text_of(page)
    assert "20 of 1,300 " in text
    assert "unfinished" not in text
    # Means over the last two of twenty records: kept 39.5 and 38, both within 10 % of 40.
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert cells[2:10] == ["0.1539", "0.5000", "1,020", "25.0%", "38.8", "38.8", "40", "2 of 2"]
    assert cells[-8:] == ["layer 1, head 0", "39.5", "39.5", "0", "layer 1, head 1", "38.0", "38.0", "0.019"]
    assert len(re.findall(r'<img src="data:image/png;base64,iVBOR', page)) == 3


def test_the_numbers_of_heat_maps_are_tables(tmp_path: Path) -> None:
    history = read_history(make_run(tmp_path / "run", [line(step) for step in range(1, 41)]))
    (folded,) = re.findall(r"<details>.*?</details>", page_of([history], tmp_path), re.S)
    assert re.findall(r"<caption>(.*?)</caption>", folded) == [
        "kept ÷ budget (40)",
        "stored ÷ budget (40)",
        "λ (0 left out of means)",
    ]
    assert re.findall(r"<th>(.*?)</th>", folded)[:3] == ["head", "to step 5", "to step 10"]
    kept, stored, penalty = re.findall(r"<table>.*?</table>", folded, re.S)
    # Five records each: kept 21 to 25 of 40 at first, 56 to 60 at last; the other head always 38.
    cells = re.findall(r"<td>(.*?)</td>", kept)
    assert [cells[at] for at in (0, 1, 8, 10)] == ["layer 1, head 0", "0.575", "1.45", "0.95"]
    assert re.findall(r"<td>(.*?)</td>", stored)[8] == "1"
    assert [re.findall(r"<td>(.*?)</td>", penalty)[at] for at in (1, 10, 17)] == ["0", "0.003", "0.038"]


def test_an_unfinished_run_whose_last_line_was_cut(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [line(1), line(2, loss=None)])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    history = read_history(run)
    assert history.last_step == 2
    assert np.isnan(history.series("loss")[1][1])
    assert "2 of 1,300 (unfinished)" in " ".join(text_of(page_of([history], tmp_path)).split())


@pytest.mark.parametrize("count", [1, 2, 700])
def test_heat_maps_hold_what_was_logged(tmp_path: Path, count: int) -> None:
    history = read_history(make_run(tmp_path / "run", [line(5 * step) for step in range(1, count + 1)]))
    figure = draw_heads(history)
    maps = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in maps] == [
        "kept ÷ budget (40)",
        "stored ÷ budget (40)",
        "λ (grey: 0)",
    ]
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["layer 1, head 0", "layer 1, head 1"]
    kept, stored, penalty = (axes.collections[0].get_array() for axes in maps)
    assert kept.shape == stored.shape == penalty.shape == (HEADS, min(count, 240))
    assert kept[0, 0] == pytest.approx((20 + 5 * (1 if count < 240 else 2)) / 40)  # the mean of three records
    np.testing.assert_allclose(kept[1], 38 / 40)
    assert kept.max() <= 8  # off the scale
    assert stored.max() <= 1
    assert np.ma.getmaskarray(penalty)[0].all()  # λ = 0
    np.testing.assert_array_equal(np.ma.getmaskarray(penalty)[1], False)
    assert maps[0].get_xlim() == pytest.approx((0, 5 * count))
    page_of([history], tmp_path)


def test_runs_of_before_and_of_other_models(tmp_path: Path) -> None:
    """No stored pairs, no speed, no recipe, no heads, λ the same everywhere: shown as far as they go."""
    old = {name: value for name, value in line(4).items() if not name.startswith(("stored", "tokens", "util"))}
    old["lambda"] = [[1e-9, 1e-9]]
    first = read_history(make_run(tmp_path / "old", [old], recipe=False))
    second = read_history(make_run(tmp_path / "plain", [{"step": 1, "seconds": 0.0, "loss": 2.0}], recipe=False))
    assert (first.budget, first.planned_steps, first.layers) == (None, None, [])
    text = " ".join(text_of(page_of([first, second], tmp_path)).split())
    assert "not recorded" in text
    assert "plain: what each head" not in text
    assert "layer 0, head 1 38.0 not recorded 1e-09" in text
    assert [axes.get_title(loc="left") for axes in draw_heads(first).axes[:2]] == ["kept", "λ (grey: 0)"]
    lifted = read_history(make_run(tmp_path / "lifted", [line(4) | {"lambda": [[-1e-3, 1e-2]]}], recipe=False))
    assert draw_heads(lifted).axes[1].get_title(loc="left").startswith("λ (grey: 0; below 0")
    page_of([lifted], tmp_path)
    drawn = draw_losses([first, second]).axes[0]
    assert [text.get_text() for text in drawn.get_legend().get_texts()] == [first.name, second.name]
    assert len(draw_speed([first, second]).axes) == 1


def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>&{{body}}"
    run = make_run(tmp_path / "a", [line(1)])
    history = read_history(run)
    hostile = RunHistory(name, history.records, False, None, BUDGET, [1])
    page = page_of([hostile], tmp_path)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;{{body}}" in page
    assert not re.search(r"(https?:)?//", re.sub(r'src="data:[^"]*"', "", page))
    assert set(re.findall(r'src="(data:image/png;base64,)?', page)) == {"data:image/png;base64,"}
    assert "default-src 'none'" in page


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "one", [line(1), line(2)])
    make_run(tmp_path / "two", [line(3)], finished=True)
    assert main(["report", "one", "two"]) == 0
    assert "Open report.html" in capsys.readouterr().out
    assert (tmp_path / "report.html").stat().st_size > 10_000
    (tmp_path / "empty").mkdir()
    damaged = make_run(tmp_path / "damaged", [line(1)])
    (damaged / "metrics.jsonl").write_text('{"step": 1,\n{"step": 2}\n')
    for arguments, status, message in (
        (["none"], 2, "There is no run directory none"),
        (["empty"], 2, "empty has no losses in metrics.jsonl"),
        (["one", "none"], 2, "There is no run directory none"),
        (["one", "empty"], 0, "left out: empty has no losses in metrics.jsonl"),
        (["damaged"], 1, "metrics.jsonl, line 1: not JSON"),
    ):
        assert main(["report", *arguments]) == status
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="no run to report on"):
        write_report([], tmp_path / "page.html")


def test_a_page_that_cannot_be_written_is_refused_before_runs_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page").mkdir()
    assert main(["report", str(tmp_path / "nowhere"), "--output", str(tmp_path / "page")]) == 2
    assert "page, which is a directory; give a file." in " ".join(capsys.readouterr().err.split())
