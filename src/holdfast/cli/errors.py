"""The one error that the commands themselves raise, and how any error is told."""


class UsageError(ValueError):
    """A command was called wrongly; the message says what to give instead. Exit status 2."""


def one_line(error: Exception, advice: str = "") -> str:
    """What went wrong, in one line; `advice` follows where it is nothing that was foreseen."""
    text = " ".join(str(error).split())
    # Messages of this library are sentences; of other exceptions the name says more than the bare text.
    expected = isinstance(error, ValueError | RuntimeError | OSError) and text
    return text if expected else f"{type(error).__name__}: {text or 'no message'}{advice}"
