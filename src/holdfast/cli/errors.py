"""The one error that the commands themselves raise, and how any error is told."""

from collections.abc import Iterator
from contextlib import contextmanager

from holdfast.files import UnreadableError


class UsageError(ValueError):
    """A command was called wrongly; the message says what to give instead. Exit status 2."""


@contextmanager
def usage_errors(option: str | None = None) -> Iterator[None]:
    """Settings that do not fit together, and paths that lead nowhere, are errors of usage, with the `option` in front
    that they come from; damaged files are none."""
    try:
        yield
    except UnreadableError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error) if option is None else f"{option}: {error}") from error


def one_line(error: Exception, advice: str = "") -> str:
    """What went wrong, in one line; `advice` follows where it is nothing that was foreseen."""
    text = " ".join(str(error).split())
    # Messages of this library are sentences; of other exceptions the name says more than the bare text.
    expected = isinstance(error, ValueError | RuntimeError | OSError) and text
    return text if expected else f"{type(error).__name__}: {text or 'no message'}{advice}"
