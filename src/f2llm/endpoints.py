"""What requests to servers of models have in common: keys, and what a status means."""

import os
import time
from email.utils import parsedate_to_datetime

from f2llm.errors import UsageError

BUSY = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # ask again later
NOT_ALLOWED = {401, 402, 403, 404}  # mend something first


def api_key(variable: str | None) -> str | None:
    """The key in an environment variable; UsageError where the variable is named and not there."""
    if variable is None:
        return None
    if not (key := os.environ.get(variable, "").strip()):
        raise UsageError(
            f"the environment variable {variable!r} that holds the API key is not set; export it."
        )
    return key


def in_one_line(text: str, key: str | None) -> str:
    """What a server said, short enough for an error, and without the key that some send back."""
    return " ".join((text.replace(key, "(key)") if key else text).split())[:200]


def seconds_to_wait(retry_after: str | None) -> float | None:
    """Of a Retry-After header: seconds, or a date; None where it has neither."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
