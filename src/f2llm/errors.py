"""The two errors that a user may see; the command line turns each into one sentence and an exit code."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class F2Error(Exception):
    """Something failed (exit code 1). The message is one sentence: what, where, got, expected, what to do."""


class UsageError(F2Error):
    """Something was asked for wrongly (exit code 2): a bad argument, recipe, file or text."""


@contextmanager
def plain_errors(who: str, folder: Path) -> Iterator[None]:
    """Say what the system refused in one sentence; mistakes in the program pass as they are."""
    try:
        yield
    except (F2Error, BrokenPipeError):
        raise
    except Exception as error:
        # Libraries written in other languages know the error only as text.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            raise F2Error(
                f"{who} stopped: the disk that holds {folder} is full; free some space and run the same command "
                "again, which goes on from what is finished."
            ) from error
        if isinstance(error, OSError):
            what = f"{error.strerror}: {error.filename}" if error.filename else str(error)
            raise F2Error(f"{who} stopped ({what}); mend that and run the same command again.") from error
        raise
