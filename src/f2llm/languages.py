"""Names of languages: ISO 639-3 with an optional ISO 15924 script (`deu`, `zho_Hant`), and the one map to them.

The facts are in languages.tsv beside this file: a language's ISO 639-3 code, the other codes it goes by (ISO 639-1,
bibliographic, retired), the script it is usually written in, its English name, and who says so. That is Unicode CLDR
where it names the language. The other languages are those of open corpora, named as in ISO 639-3 (two groups of
languages, which corpora take for one, as in ISO 639-5), with CLDR's likely script, else that of their texts.
tests/test_languages.py makes the file again and compares.
"""

import difflib
import re
from functools import cache
from importlib import resources
from typing import NamedTuple

from f2llm.errors import UsageError

MIXED = "mul"  # several languages at once
UNKNOWN = "und"

# BCP 47: language, script, region, then variants and extensions; `_` may stand for `-`.
_BCP47 = re.compile(
    r"(?P<language>[a-z]{2,3})"
    r"(?:[-_](?P<script>[a-z]{4}))?"
    r"(?:[-_](?:[a-z]{2}|[0-9]{3}))?"
    r"(?:[-_](?:[a-z0-9]{5,8}|[0-9][a-z0-9]{3}))*"
    r"(?:[-_][a-z0-9](?:[-_][a-z0-9]{2,8})+)*",
    re.IGNORECASE,
)


class Language(NamedTuple):
    """One row of languages.tsv."""

    code: str
    """ISO 639-3."""
    others: tuple[str, ...]
    """Other codes for it: ISO 639-1 first if there is one, then bibliographic and retired codes."""
    script: str
    """ISO 15924 code of its usual script; `Zyyy` where there is none."""
    name: str
    """English name."""


@cache
def table() -> dict[str, Language]:
    """All known languages, by each of their codes."""
    text = resources.files("f2llm").joinpath("languages.tsv").read_text(encoding="utf-8")
    rows: dict[str, Language] = {}
    for line in text.splitlines()[1:]:
        code, others, script, name, _ = line.split("\t")
        language = Language(code, tuple(others.split()), script, name)
        rows |= dict.fromkeys((code, *language.others), language)
    return rows


def tag(bcp47: str) -> str:
    """The ISO 639-3 name of a BCP 47 language: `de` -> `deu`, `zh-Hant-TW` -> `zho_Hant`.

    A script is kept where given; region, variants and extensions are dropped; a name of ours passes unchanged.
    Raises UsageError, with the nearest known code, for a language that is not known.
    """
    parts = _BCP47.fullmatch(bcp47)
    if parts is None:
        raise UsageError(
            f"{bcp47!r} is not a language tag; give a language with an optional script, "
            f"such as 'deu', 'de' or 'zho_Hant'."
        )
    code = _find(parts["language"], bcp47).code
    return f"{code}_{parts['script'].title()}" if parts["script"] else code


def english_name(tag: str) -> str:
    """`deu` -> `German`, `zho_Hant` -> `Chinese (Hant)`."""
    code, _, script = tag.partition("_")
    name = _find(code, tag).name
    return f"{name} ({script})" if script else name


def script(tag: str) -> str:
    """ISO 15924 code of the script that `tag` is written in: its own, or the language's usual one."""
    code, _, script = tag.partition("_")
    return script or _find(code, tag).script


def _find(code: str, given: str) -> Language:
    try:
        return table()[code.lower()]
    except KeyError:
        near = difflib.get_close_matches(code.lower(), table(), n=1, cutoff=0)[0]
        raise UsageError(
            f"unknown language {given!r}: the nearest known code is {near!r} ({table()[near].name}); "
            f"give an ISO 639-3 or BCP 47 code."
        ) from None
