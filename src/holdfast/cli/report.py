"""`holdfast report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from holdfast.cli.common import output_console
from holdfast.cli.errors import UsageError
from holdfast.cli.parsing import parse

DESCRIPTION = """\
Write a page that shows what training runs did, finished or not: losses, speed, and for learned eviction what each head
kept, what its store held, and λ, over time. The page opens in any browser, without network.

examples:
  holdfast report runs/books-lalte
  holdfast report runs/budget-64 runs/budget-256 --output budgets.html
"""


@dataclass(frozen=True)
class ReportSettings:
    """Show what runs did."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    output: Path = Path("report.html")
    """Page to write; one that is there is replaced."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UsageError("Give at least one run directory: `holdfast report RUN`.")


def run(arguments: Sequence[str]) -> None:
    """Parse, read and write the page."""
    settings = parse(ReportSettings, arguments or ["--help"], prog="holdfast report", description=DESCRIPTION)

    from holdfast.training.history import read_history
    from holdfast.training.report import write_report

    try:
        histories = [read_history(directory) for directory in settings.runs]
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    page = write_report(histories, settings.output, progress=True)
    output_console().print(f"Open {page} in a browser.", soft_wrap=True)
