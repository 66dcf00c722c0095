"""The two errors that a user may see; the command line turns each into one sentence and an exit code."""


class F2Error(Exception):
    """Something failed (exit code 1). The message is one sentence: what, where, got, expected, what to do."""


class UsageError(F2Error):
    """Something was asked for wrongly (exit code 2): a bad argument, recipe, file or text."""
