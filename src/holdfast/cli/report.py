"""`holdfast report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from holdfast.cli.common import output_console, refuse_twice
from holdfast.cli.errors import UsageError
from holdfast.cli.evaluate.common import check_page
from holdfast.cli.parsing import parse

if TYPE_CHECKING:
    from holdfast.training.history import RunHistory

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
        check_page(self.output)


def run(arguments: Sequence[str]) -> None:
    """Parse, read and write the page."""
    settings = parse(ReportSettings, arguments or ["--help"], prog="holdfast report", description=DESCRIPTION)

    from holdfast.training.report import write_report

    refuse_twice(settings.runs, settings.runs)
    histories = _histories(settings.runs)
    page = write_report(histories, settings.output, progress=True)
    output_console().print(f"Open {page} in a browser.", soft_wrap=True)


def _histories(runs: Sequence[Path]) -> list[RunHistory]:
    """Of those that have logged something; the others are named, unless there are no others."""
    from holdfast.training.history import NothingLoggedError, read_history

    histories, empty = [], []
    for directory in runs:
        try:
            histories.append(read_history(directory))
        except NothingLoggedError as error:
            empty.append(str(error))
        except FileNotFoundError as error:
            raise UsageError(str(error)) from error
    if not histories:
        raise UsageError(" ".join(empty))
    for message in empty:
        print(f"holdfast: left out: {message}", file=sys.stderr)
    return histories
