"""What the README says of results is what the data files say, and what it links to is there."""

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_the_demo() -> None:
    runs = [json.loads((ROOT / f"benchmarks/results/demo-seed{seed}.json").read_text()) for seed in (0, 1, 2)]
    for name, first in runs[0]["models"].items():
        shares = [f"{run['models'][name]['needle']['beyond']['accuracy']:.1%}".replace("%", " %") for run in runs]
        sizes = [f"{size:,} B" for size in first["cache_bytes"].values()]
        assert f"| {' | '.join([first['title'], *shares, *sizes])} |" in README


def test_data_name_the_code_they_come_from_and_no_place() -> None:
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert re.search(r'"commit": "[0-9a-f]{40}"', text), path
        assert not re.search(r'"(/|~|[A-Z]:\\\\)', text), path


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_page_of_results_is_what_the_data_give() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert (ROOT / "docs/results.md").read_text(encoding="utf-8") == tables.page()
