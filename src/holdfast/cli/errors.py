"""The one error that the commands themselves raise."""


class UsageError(ValueError):
    """A command was called wrongly; the message says what to give instead. Exit status 2."""
