"""The tables of `holdfast evaluate efficiency` are whole in a terminal of 80 columns, and say what was measured."""

import dataclasses
import io

import pytest
from rich.console import Console
from rich.table import Table

from holdfast.bench.costs import Cost, Held, ModelCosts
from holdfast.bench.efficiency import EfficiencyPlan, _heads
from holdfast.bench.models import SIZES, equal_configs
from holdfast.bench.scorer_share import ScorerShare
from holdfast.bench.timing import Timing
from holdfast.cli import main
from holdfast.cli.common import PLAIN
from holdfast.cli.evaluate.efficiency import _tables

PLAN = EfficiencyPlan(contexts=(1024, 131072), batch_sizes=(1, 16))
HEADS = {
    "GDN": {},
    "GDN + SWA": {"sliding_attention": (8, 8)},
    "laLTE": {"learned_eviction": (8, 8)},
    "laNSA": {"native_sparse_attention": (16, 1)},
    "GDN + full attention": {"full_attention": (8, 8)},
    "full attention": {"full_attention": (8, 8)},
}


def costs(name: str, *, trained: bool = False) -> ModelCosts:
    """With numbers that are as wide as they get."""
    lalte = name == "laLTE"
    held = Held(131_072.0, 1024, 131_072, 516.0 if lalte else None)
    timing = Timing([[123.4e-3] * 3], warmed_up=False)
    share = ScorerShare(0.05, 0.081) if lalte else None
    measured = [
        Cost(context, batch, timing, timing, 987 << 20, None if batch > 1 else 1023 << 20, held, share)
        for context in PLAN.contexts
        for batch in PLAN.batch_sizes
        if (context, batch) != (131072, 16)
    ]
    return ModelCosts(
        mixers=tuple(HEADS[name]) or ("gated_deltanet",),
        heads=HEADS[name],
        trained=trained,
        parameters={"MLP": 45_678_901} | ({"retention scorer": 1_234_567} if lalte else {}),
        weight_bytes=1 << 27,
        flops_per_token={1024: 123_000_000, 131072: 876_000_000},
        scorer_flops_per_token=3_000_000 if lalte else 0,
        costs=tuple(measured),
        missing={(131072, 16): "about 123.4 GiB of memory are needed, 0.0 GiB are left beside the others"},
        resumed=0,
    )


def shown(tables: list[Table], width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width, **PLAIN).print(*tables)
    return file.getvalue()


def test_nothing_is_cut_in_80_columns() -> None:
    results = {name: costs(name) for name in HEADS}
    text = shown(_tables(results, PLAN), 80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for whole in ("131,072", "123 ms", "GDN + full attention", "45,678,901", "1,234,567", "not measured", "0.999 GiB"):
        assert whole in text
    lines = text.splitlines()
    for name in HEADS:  # on one line with its context
        assert any(f"│ 131,072 │ {name} " in line for line in lines)


def test_a_long_name_takes_more_lines_and_cuts_no_number() -> None:
    name = "runs/books-lalte-with-a-name-that-is-much-too-long-for-any-column"
    tables = _tables({name: costs("laLTE", trained=True), "other": costs("laNSA", trained=True)}, PLAN)
    text = shown(tables, 80)
    assert "…" not in text
    assert text.count("131,072") == shown(tables, 200).count("131,072")


@pytest.mark.parametrize("trained", [True, False])
def test_of_untrained_models_the_table_says_that_a_store_holds_its_capacity(trained: bool) -> None:
    text = " ".join(shown(_tables({"laLTE": costs("laLTE", trained=trained)}, PLAN), 80).split())
    assert ("Untrained models that read random tokens" in text) != trained
    assert ("the capacity of its store" in text) != trained


def test_the_help_says_that_untrained_models_read_random_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "efficiency", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "They read random tokens" in text
    assert "the capacity of its store" in text


def test_the_table_of_models_has_their_heads() -> None:
    rows = [line for line in shown(_tables({n: costs(n) for n in HEADS}, PLAN), 80).splitlines() if "random" in line]
    found = {cells[1].strip(): tuple(cells[-3:-1]) for cells in (line.split("│") for line in rows) if len(cells) > 4}
    assert {name: tuple(cell.strip() for cell in cells) for name, cells in found.items()} == {
        "GDN": ("–", "–"),
        "GDN + SWA": ("8", "8"),
        "laLTE": ("8", "8"),
        "laNSA": ("16", "1"),
        "GDN + full attention": ("8", "8"),
        "full attention": ("8", "8"),
    }


def test_heads_are_those_of_the_configuration_and_are_written() -> None:
    assert {name: _heads(config) for name, config in equal_configs(SIZES["43m"]).items()} == HEADS
    found = dataclasses.replace(costs("laNSA"), heads=HEADS["laNSA"]).to_dict()
    assert found["heads"] == {"native_sparse_attention": {"query": 16, "kv": 1}}
