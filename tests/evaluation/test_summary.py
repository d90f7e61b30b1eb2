"""The page about evaluations: heat maps stand beside their numbers."""

import json
import re
from pathlib import Path

from holdfast.evaluation.intervals import Share
from holdfast.evaluation.ruler import RulerCell, RulerResult, plot_ruler
from holdfast.evaluation.summary import PartResult, write_summary


def cell(task: str, length: int, *right: int) -> RulerCell:
    by_depth = {50.0 * number: Share(4, correct) for number, correct in enumerate(right)}
    total = Share(4 * len(right), sum(right))
    return RulerCell(task, length, total, total, by_depth, float(length))


def page_of(part: PartResult, folder: Path) -> str:
    page = write_summary([part], folder / "index.html", title="t", machine={}).read_text(encoding="utf-8")
    return re.sub(r'src="data:[^"]*"', "", page)


def test_numbers_of_heat_maps_are_tables(tmp_path: Path) -> None:
    tasks = ("niah_single_1", "niah_multikey_2")
    results = {"<a>": RulerResult(tuple(cell(task, length, 4, 1, 0) for task in tasks for length in (700, 1400)), 0)}
    models = {name: result.to_dict() for name, result in results.items()}
    (tmp_path / "needle.json").write_text(json.dumps({"evaluation": "needle", "models": models}))
    plot_ruler(results, tmp_path / "needle.png")
    files = dict.fromkeys(("needle.json", "needle.png"), "")
    page = page_of(PartResult("RULER", pictures=("needle.png",), files=files), tmp_path)
    assert 'alt="RULER: heat map; the table that follows has its numbers"' in page
    (folded,) = re.findall(r"<img[^>]*>\n<details><summary>.*?</details>", page, re.S)
    captions = re.findall(r"<caption>(.*?):", folded)
    assert captions == ["&lt;a&gt;, niah_single_1", "&lt;a&gt;, niah_multikey_2"]
    assert re.findall(r"<th>(.*?)</th>", folded)[:3] == ["depth", "700 tokens", "1,400 tokens"]
    low, high = Share(4, 1).interval or (0, 0)
    assert re.findall(r"<td>(.*?)</td>", folded)[3:6] == ["50 %", *[f"25.0% ({low:.1%} to {high:.1%}; 1 of 4)"] * 2]


def test_pictures_of_what_tables_show_need_no_more(tmp_path: Path) -> None:
    results = {"a": RulerResult((cell("niah_single_1", 700, 4),), 0)}
    plot_ruler(results, tmp_path / "scorers.png")
    (tmp_path / "scorers.json").write_text(json.dumps({"measure": "perplexity", "models": ["a"]}))
    files = dict.fromkeys(("scorers.json", "scorers.png"), "")
    page = page_of(PartResult("who decides", pictures=("scorers.png",), files=files), tmp_path)
    assert 'alt="who decides"' in page
    assert "<details>" not in page
