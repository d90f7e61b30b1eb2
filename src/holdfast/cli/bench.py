"""`holdfast bench ops`, `prefill`, `decode`, `train`, `data`, `controller` and `plot`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.table import Table

from holdfast.bench.settings import (
    BenchSettings,
    ControllerStudySettings,
    DataSettings,
    DecodeSettings,
    ModelSettings,
    OpsSettings,
    PrefillSettings,
    TrainSettings,
)
from holdfast.cli.common import error_console, output_console, quieten_transformers
from holdfast.cli.errors import UsageError
from holdfast.cli.parsing import parse
from holdfast.units import format_bytes, three_digits

if TYPE_CHECKING:
    from holdfast.bench.results import Case, Report, Result

DESCRIPTION = """\
Measure time and memory beside other implementations, on random inputs, in one process. Variants take turns; medians and
ratios are shown. Give --output to keep every sample.

examples:
  holdfast bench ops --output ops
  holdfast bench ops --only attention --tokens 8192 --repeats 9
  holdfast bench decode --contexts 2048 65536 --steps 2000 --output decode --plot decode.png
  holdfast bench prefill --size 0.4b --tokens 4096 32768
  holdfast bench train --mixers gated_deltanet sliding_attention
  holdfast bench data --output benchmarks/results/data.json
  holdfast bench controller --output benchmarks/results/controller.json --plot controller.png
  holdfast bench plot benchmarks/results/ops.json --directory pictures
"""


@dataclass(frozen=True)
class Plot:
    """Draw results that `--output` has written, a picture for each file."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files of results."""
    directory: Path | None = None
    """Where the pictures go; left out: beside the files."""
    format: Literal["png", "svg", "pdf"] = "png"


BENCHMARKS = (
    Annotated[OpsSettings, tyro.conf.subcommand("ops")]
    | Annotated[PrefillSettings, tyro.conf.subcommand("prefill")]
    | Annotated[DecodeSettings, tyro.conf.subcommand("decode")]
    | Annotated[TrainSettings, tyro.conf.subcommand("train")]
    | Annotated[DataSettings, tyro.conf.subcommand("data")]
    | Annotated[ControllerStudySettings, tyro.conf.subcommand("controller")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
)


def run(arguments: Sequence[str]) -> None:
    """Parse and run one of the benchmarks, or draw the results of some."""
    settings = parse(BENCHMARKS, arguments or ["--help"], prog="holdfast bench", description=DESCRIPTION)
    if isinstance(settings, Plot):
        _plot(settings)
    elif isinstance(settings, DataSettings):
        _measure_data(settings)
    elif isinstance(settings, ControllerStudySettings):
        _study(settings)
    else:
        _measure(settings)


def _plot(settings: Plot) -> None:
    from holdfast.bench.plots import plot_report
    from holdfast.bench.results import read_report

    if not settings.files:
        raise UsageError("Give at least one file of results: `holdfast bench plot FILE`.")
    for file in settings.files:
        if not file.is_file():
            raise UsageError(f"There is no file {file}; give one that `holdfast bench` wrote with --output.")
        target = (settings.directory or file.parent) / f"{file.stem}.{settings.format}"
        output_console().print(f"{plot_report(read_report(file), target)}", soft_wrap=True)


def _study(settings: ControllerStudySettings) -> None:
    """Simulate, and show a row for each rule and each kind of heads."""
    _check_plot(settings.plot)

    from holdfast.bench.controller import name_rule, plot_controller_study, study_controller
    from holdfast.files import write_json

    study = study_controller(settings)
    table = Table("u", "rule", "heads", "reached at step", "within 10 %", "typical error", "lowest ÷ b")
    for case in study["cases"]:
        heads = f"τ = {case['time_constant']:g}" if case["pace"] is None else f"pace {case['pace']:g}"
        reached = "never" if case["reached"] is None else f"{case['reached']:,}"
        shares = (f"{case['within']:.0%}", f"{case['error']:.0%}", f"{case['lowest']:.2f}")
        table.add_row(str(case["interval"]), name_rule(case), heads, reached, *shares)
    output_console().print(table)
    if settings.output is not None:
        error_console().print(f"All numbers are in {write_json(settings.output, study)}.", soft_wrap=True)
    if settings.plot is not None:
        error_console().print(f"The picture is {plot_controller_study(study, settings.plot)}.", soft_wrap=True)


def _check_plot(path: Path | None) -> None:
    if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot is {path}; give a file that ends in .png, .svg or .pdf.")


def _measure(settings: BenchSettings) -> None:
    _check(settings)
    quieten_transformers()
    report = _run(settings)
    show(report)
    if (path := settings.output_path) is not None:
        error_console().print(f"All numbers are in {report.write(path)}.", soft_wrap=True)
    if settings.plot is not None:
        from holdfast.bench.plots import plot_report

        error_console().print(f"The picture is {plot_report(report, settings.plot)}.", soft_wrap=True)


def _measure_data(settings: DataSettings) -> None:
    from holdfast.bench.data import run_data
    from holdfast.files import write_json

    quieten_transformers()
    report = run_data(settings)
    table = Table(title="text to blocks", title_justify="left")
    for heading in ("tokenizer", "workers", "first block", "tokens/s", "tokens per CPU second"):
        table.add_column(heading, justify="right")
    for rate in report["rates"]:
        first, speed = format_seconds(rate["first_block_seconds"]), format_rate(rate["tokens_per_second"])
        alone = "" if rate["tokens_per_cpu_second"] is None else format_rate(rate["tokens_per_cpu_second"])
        table.add_row(rate["tokenizer"], str(rate["workers"]), first, speed, alone)
    output_console().print(table)
    if (memory := report["memory"]) is not None:
        resident = memory["resident_bytes"]
        output_console().print(
            f"Resident memory: {format_bytes(memory['before_bytes'])} before, {format_bytes(resident[0])} after "
            f"{memory['blocks'][0]:,} blocks, {format_bytes(resident[-1])} after {memory['blocks'][-1]:,}.",
            soft_wrap=True,
        )
    if settings.output is not None:
        error_console().print(f"All numbers are in {write_json(settings.output, report)}.", soft_wrap=True)


def _check(settings: BenchSettings) -> None:
    """Refuse before anything is measured what would fail afterwards."""
    _check_plot(settings.plot)
    if settings.plot and isinstance(settings, OpsSettings) and not {"attention", "sparse"} & {*settings.only}:
        raise UsageError("--plot draws attention and sparse; name one in --only too, or leave --plot out.")

    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("There is no CUDA device here; give --device cpu.")
    if isinstance(settings, ModelSettings):
        from holdfast.bench.models import SIZES, hybrid_config

        try:
            config = hybrid_config(SIZES[settings.effective().size], settings.mixers)
        except ValueError as error:
            raise UsageError(f"--mixers does not fit: {error}.") from error
        if isinstance(settings, DecodeSettings) and settings.compiled:
            from holdfast.cache import HybridCache

            growing = [
                name
                for name, layer in zip(config.mixers or (), HybridCache(config).layers, strict=True)
                if layer.growing
            ]
            if growing:
                raise UsageError(f"--compiled needs steps that are all alike, and the cache of {growing[0]} grows.")


def _run(settings: BenchSettings) -> Report:
    if isinstance(settings, OpsSettings):
        from holdfast.bench.ops import run_ops

        return run_ops(settings)
    if isinstance(settings, PrefillSettings):
        from holdfast.bench.prefill import run_prefill

        return run_prefill(settings)
    if isinstance(settings, DecodeSettings):
        from holdfast.bench.decode import run_decode

        return run_decode(settings)
    assert isinstance(settings, TrainSettings)
    from holdfast.bench.train import run_train

    return run_train(settings)


def show(report: Report) -> None:
    """Print a report, a table for each kind of case, and what the machine can do."""
    console = output_console()
    for kind in dict.fromkeys(case.kind for case in report.cases):
        console.print(_table(report, kind))
    ceilings, machine = report.ceilings, report.machine
    console.print(
        f"{machine['accelerator'] or machine['processor']}, threads: {machine['threads']}, {ceilings.dtype}. Ceilings "
        f"measured here: copy {ceilings.copy_bytes_per_second / 1e9:,.1f} GB/s, matmul "
        f"{ceilings.matmul_flops_per_second / 1e9:,.1f} GFLOP/s. Spread and brackets: quartiles.",
        soft_wrap=True,
    )
    if any(not result.timing.warmed_up for case in report.cases for result in case.results):
        console.print("* one call only, without a warm-up: it took longer than --limit.")
    steps = report.settings.get("steps")
    if steps and any(len(result.timing.samples) < steps for case in report.cases for result in case.results):
        console.print(f"Some models took fewer steps than {steps:,} before --limit; their number is in the JSON.")


def _table(report: Report, kind: str) -> Table:
    """One row per variant; the parameters of a case stand in the row of its first."""
    cases = [case for case in report.cases if case.kind == kind]
    columns = _columns(report, cases)
    table = Table(title=kind, title_justify="left")
    for heading in cases[0].parameters:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for case in cases:
        table.add_section()
        values = [f"{value:,}" if isinstance(value, int) else str(value) for value in case.parameters.values()]
        for result in case.results:
            shown = values if result is case.results[0] else [""] * len(values)
            table.add_row(*shown, result.name, *(column(case, result) for column in columns.values()))
    return table


def _columns(report: Report, cases: Sequence[Case]) -> dict[str, Callable[[Case, Result], str]]:
    """What the table shows of a result, by heading: only what these cases have."""
    from holdfast.bench.timing import speed_ratio

    def ratio(case: Case, result: Result) -> str:
        longer = speed_ratio(result.timing, case.results[0].timing)
        return f"{longer.median:.2f} ({longer.low:.2f}–{longer.high:.2f})" if result is not case.results[0] else "1"

    results = [result for case in cases for result in case.results]
    columns: dict[str, Callable[[Case, Result], str]] = {
        "median": lambda case, result: format_seconds(result.timing.summary.median),
        "spread": lambda case, result: _spread(result),
    }
    if report.benchmark == "decode":
        columns["p90"] = lambda case, result: format_seconds(result.timing.summary.p90)
        columns["p99"] = lambda case, result: format_seconds(result.timing.summary.p99)
    if results[0].tokens is not None:
        columns["tokens/s"] = lambda case, result: format_rate(result.tokens_per_second or 0)
    if results[0].peak_bytes is not None:
        columns["peak memory"] = lambda case, result: format_bytes(result.peak_bytes or 0)
    if results[0].cache_bytes is not None:
        columns["cache"] = lambda case, result: format_bytes(result.cache_bytes or 0)
    columns["of ceiling"] = lambda case, result: f"{result.share(report.ceilings):.1%}"
    if len(cases[0].results) > 1:
        columns[f"÷ {cases[0].results[0].name}"] = ratio
    return columns


def _spread(result: Result) -> str:
    """The distance between the quartiles, as a share of the median."""
    summary = result.timing.summary
    return f"{(summary.high - summary.low) / summary.median:.0%}" if result.timing.warmed_up else "*"


def format_rate(per_second: float) -> str:
    """A number per second: whole from 1,000 on, else with three digits."""
    return three_digits(per_second) if per_second < 999.5 else f"{per_second:,.0f}"


def format_seconds(seconds: float) -> str:
    """`seconds` with three digits and a unit: 2.50 s, 31.4 ms, 870 µs."""
    for unit, length in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * length:
            return f"{three_digits(seconds / length)} {unit}"
    return f"{three_digits(seconds * 1e6)} µs"
