"""`holdfast demo`."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.cli.common import error_console, output_console, quieten_transformers
from holdfast.cli.errors import UsageError
from holdfast.cli.parsing import parse
from holdfast.demo.settings import DemoSettings

DESCRIPTION = """\
Train five small models on this machine (Gated DeltaNet alone, with a sliding window, with learned eviction, with native
sparse attention, with full attention), and compare how well they recall what they read, and what their memory costs.

examples:
  holdfast demo
  holdfast demo --short --output runs/quick
  holdfast demo --keep
"""


def run(arguments: Sequence[str]) -> None:
    """Parse and run the demo."""
    settings = parse(DemoSettings, arguments, prog="holdfast demo", description=DESCRIPTION)

    from holdfast.demo.runner import DemoFolderError, run_demo

    quieten_transformers()
    try:
        run_demo(settings, output_console(), error_console())
    except DemoFolderError as error:
        raise UsageError(str(error)) from error
