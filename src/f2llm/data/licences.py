"""Which licences allow commercial use, by their SPDX identifiers in licences.tsv beside this file.

Attribution and share-alike are no obstacle and are not asked about. Licences against derivative works count as not
allowing it, since whether a trained model is one is open. What the table does not have, `unknown` among it, is unknown
and never allowed.
"""

import re
from functools import cache
from importlib import resources
from typing import Final

NOT_COMMERCIAL: Final = "licence not for commercial use"
NOT_KNOWN: Final = "licence not known"


@cache
def table() -> dict[str, bool]:
    """Whether each known licence allows commercial use, by its identifier in lower case."""
    text = resources.files("f2llm.data").joinpath("licences.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines()[1:]]
    return {licence.lower(): commercial == "yes" for licence, commercial in rows}


@cache
def obstacle(licence: str) -> str | None:
    """Why rows of a licence are not for commercial use, or None.

    Of a choice (`MIT OR GPL-3.0-only`) one is enough; of several together (`AND`) each must allow it, and an exception
    (`WITH`) only adds to what is allowed. Parentheses are not read: such an expression is unknown.
    """
    choices = [_all_of(choice) for choice in re.split(r"\s+OR\s+", licence.strip())]
    return None if None in choices else min(choices, key=lambda why: why != NOT_COMMERCIAL)


def _all_of(expression: str) -> str | None:
    allowed = [
        table().get(re.sub(r"\s+WITH\s+\S+$", "", part).lower())
        for part in re.split(r"\s+AND\s+", expression)
    ]
    if False in allowed:
        return NOT_COMMERCIAL
    return NOT_KNOWN if None in allowed else None
