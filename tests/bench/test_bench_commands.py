"""Every subcommand from beginning to end at tiny sizes: tables, JSON, pictures, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.bench.plots import plot_report
from holdfast.bench.results import FORMAT, Case, Report, read_report
from holdfast.cli import main
from holdfast.cli.bench import format_seconds

PEERS = {"prefill": ["Llama", "OLMo-Hybrid"], "decode": ["Llama", "OLMo-Hybrid"], "train": ["Llama", "OLMo-Hybrid"]}
RESULT_FIELDS = {
    "name",
    "seconds",
    "times_as_long_as_first",
    "tokens",
    "tokens_per_second",
    "flops",
    "moved_bytes",
    "share_of_ceiling",
    "peak_bytes",
    "cache_bytes",
    "warmed_up",
    "notes",
    "turns",
}


def run_bench(benchmark: str, folder: Path, *options: str) -> dict[str, Any]:
    output, plot = folder / "numbers.json", folder / "picture.png"
    assert main(["bench", benchmark, "--quick", "--output", str(output), "--plot", str(plot), *options]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 8_000
    check_schema(data := json.loads(output.read_text()), benchmark)
    return data


def check_schema(data: dict[str, Any], benchmark: str) -> None:
    assert set(data) == {"format", "benchmark", "settings", "machine", "ceilings", "cases"}
    assert (data["format"], data["benchmark"]) == (FORMAT, benchmark)
    assert data["machine"]["packages"]["torch"]
    assert data["settings"]["quick"] is True
    assert not {"output", "plot"} & set(data["settings"])  # paths of this machine
    assert data["ceilings"]["copy_bytes_per_second"] > 1e8
    assert data["ceilings"]["matmul_flops_per_second"] > 1e8
    for case in data["cases"]:
        assert set(case) == {"kind", "parameters", "results"}
        first = case["results"][0]
        assert first["name"].startswith("holdfast")
        assert first["times_as_long_as_first"]["median"] == 1
        for result in case["results"]:
            assert set(result) == RESULT_FIELDS
            samples = [seconds for turn in result["turns"] for seconds in turn]
            assert result["seconds"]["count"] == len(samples) > 0
            assert 0 < min(samples) <= result["seconds"]["median"] <= result["seconds"]["p99"] <= max(samples)
            assert result["share_of_ceiling"] > 0
            assert result["moved_bytes"] > 0


def test_ops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run_bench("ops", tmp_path)
    kinds = [case["kind"] for case in data["cases"]]
    both = ["attention"] * 4 + ["native sparse attention"] * 4
    assert kinds == [*both, *["decoding step"] * 2, *["scorer"] * 5, "eviction", *["gated delta rule"] * 2]
    names = [[result["name"] for result in case["results"]] for case in data["cases"]]
    few = ["holdfast, nothing evicted", "SDPA, causal", "SDPA, causal, by time"]  # up to 256 tokens
    assert names[0] == ["holdfast, budget", "holdfast, uncapped", *few]
    assert names[4] == ["holdfast, sparse", "SDPA, causal"]
    assert names[8] == ["holdfast", "PyTorch"]
    assert names[10] == ["holdfast", "grouped convolutions"]
    assert names[-1] == ["holdfast", "transformers"]
    forward, both = (case["results"][2] for case in data["cases"][:2])
    assert forward["flops"] == 4 * 16 * 2 * 128 * 129 / 2
    assert both["flops"] == 3.5 * forward["flops"]
    shown = capsys.readouterr().out
    assert "÷ holdfast, budget" in shown
    assert "÷ holdfast, sparse" in shown
    assert "matmul" in shown


def test_ops_of_one_kind_are_drawn_too(tmp_path: Path) -> None:
    data = run_bench("ops", tmp_path, "--only", "sparse")
    assert {case["kind"] for case in data["cases"]} == {"native sparse attention"}


def test_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run_bench("decode", tmp_path)
    assert [case["parameters"] for case in data["cases"]] == [{"context": 48, "batch": 2}, {"context": 96, "batch": 2}]
    short, long = ({result["name"]: result for result in case["results"]} for case in data["cases"])
    assert list(short) == ["holdfast", *PEERS["decode"]]
    assert [len(turn) for turn in short["holdfast"]["turns"]] == [20, 20]
    assert short["holdfast"]["cache_bytes"] == long["holdfast"]["cache_bytes"]
    assert long["Llama"]["cache_bytes"] == 2 * short["Llama"]["cache_bytes"]
    assert "random numbers" in short["Llama"]["notes"]["cache_filled_by"]
    assert "p99" in capsys.readouterr().out


def test_decode_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the code that is generated, which takes a minute: the graph is run as it was traced."""
    trace, asked = torch.compile, []

    def compiled(model: torch.nn.Module, **options: object) -> object:
        asked.append(options)
        return trace(model, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", compiled)
    data = run_bench("decode", tmp_path, "--no-peers", "--compiled")
    assert asked == [{"mode": "reduce-overhead", "fullgraph": True}]
    for case in data["cases"]:
        assert [result["name"] for result in case["results"]] == ["holdfast", "holdfast, compiled"]
        assert case["results"][0]["cache_bytes"] == case["results"][1]["cache_bytes"]


def test_steps_that_grow_are_not_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--quick", "--compiled", "--mixers", "gated_deltanet", "full_attention"]) == 2
    assert (
        "--compiled needs steps that are all alike, and the cache of full_attention grows." in capsys.readouterr().err
    )


def test_prefill(tmp_path: Path) -> None:
    data = run_bench("prefill", tmp_path, "--mixers", "sliding_attention", "gated_deltanet")
    assert [case["parameters"]["tokens"] for case in data["cases"]] == [48, 96]
    for case in data["cases"]:
        assert [result["name"] for result in case["results"]] == ["holdfast", *PEERS["prefill"]]
        tokens = case["parameters"]["tokens"]
        assert [result["notes"]["chunk"] for result in case["results"]] == [32, tokens, tokens]
        ours = case["results"][0]
        assert ours["tokens_per_second"] == pytest.approx(tokens / ours["seconds"]["median"])


def test_train_and_no_peers(tmp_path: Path) -> None:
    data = run_bench("train", tmp_path)
    (case,) = data["cases"]
    assert [result["name"] for result in case["results"]] == ["holdfast", *PEERS["train"]]
    assert case["results"][0]["tokens"] == 2 * 96
    assert 8 < case["results"][0]["notes"]["kept_per_head"] <= 24
    (alone,) = run_bench("train", tmp_path, "--no-peers")["cases"]
    assert [result["name"] for result in alone["results"]] == ["holdfast"]


def test_plots_come_from_the_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_bench("train", tmp_path, "--no-peers")
    file = tmp_path / "numbers.json"
    report = read_report(file)
    assert report.to_dict() == json.loads(file.read_text())
    capsys.readouterr()
    assert main(["bench", "plot", str(file), "--directory", str(tmp_path / "images"), "--format", "svg"]) == 0
    picture = tmp_path / "images" / "numbers.svg"
    assert capsys.readouterr().out.strip() == str(picture)
    assert "<svg" in picture.read_text()
    sparse = Case("native sparse attention", {"tokens": 64, "pass": "forward + backward"}, report.cases[0].results)
    plot_report(Report("ops", report.settings, report.machine, report.ceilings, (sparse,)), tmp_path / "sparse.svg")
    assert "native sparse attention, forward" in (tmp_path / "sparse.svg").read_text()
    empty = Report("ops", report.settings, report.machine, report.ceilings, ())
    with pytest.raises(ValueError, match="only attention can be drawn"):
        plot_report(empty, tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--tokens", "0"], "tokens must be at least 1, got 0"),
        (["ops", "--heads", "6", "--kv-heads", "4"], "heads (6) must be a multiple of kv_heads (4)"),
        (["ops", "--group-size", "3"], "heads (8) must be a multiple of group_size (3)"),
        (["ops", "--only", "delta", "--plot", "x.png"], "--plot draws attention"),
        (["decode", "--mixers", "absent"], "no mixer is named absent; there are gated_deltanet"),
        (["train", "--mixers", *["gated_deltanet"] * 5], "mixers has 5 entries, which do not divide 12 layers"),
        (["decode", "--plot", "x.txt"], "--plot is x.txt; give a file that ends in .png"),
        (["train", "--size", "huge"], "'huge'"),
        (["plot"], "Give at least one file of results"),
        (["plot", "absent.json"], "There is no file absent.json"),
        (["measure"], "holdfast bench has no command 'measure'"),
        (["train", "--mixers"], "mixers"),
    ],
)
def test_wrong_calls_are_refused_in_one_line_before_anything_is_measured(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 0}', '{"format": 1, "cases": 3}'])
def test_files_of_something_else_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    assert main(["bench", "plot", str(file)]) == 1
    error = capsys.readouterr().err
    assert "other.json" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


def test_seconds_are_readable() -> None:
    shown = [format_seconds(value) for value in (137.2, 2.5, 0.9999, 0.0314, 0.00087, 1.5e-6)]
    assert shown == ["137 s", "2.50 s", "1.00 s", "31.4 ms", "870 µs", "1.50 µs"]
