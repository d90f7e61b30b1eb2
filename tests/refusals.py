"""What the command line says of evaluations that it refuses."""

import pytest

from holdfast.cli import main


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run an evaluation that must be refused as wrongly called; its one line of error."""
    capsys.readouterr()
    assert main(["evaluate", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error
