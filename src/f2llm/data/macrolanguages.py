"""Macrolanguages and the languages in them, for sources that name one and the same language in two ways.

ISO 639-3 has 60 or so macrolanguages, codes such as `zho` that stand for several languages. Most texts tagged with one
are in the same of its languages, Mandarin (`cmn`) there; where that is not so, as with `que`, none is meant. The facts
are in macrolanguages.tsv beside this file: the macrolanguage; the language meant, which is Unicode CLDR's choice or,
for Pashto, that of the corpora; and its other languages, as ISO 639-3 lists them. The many varieties of Zapotec and
Zhuang, of which no corpus names more than one, are left out.
"""

from functools import cache
from importlib import resources
from typing import Literal, NamedTuple

Form = Literal["individual", "macrolanguage"]


class Macrolanguage(NamedTuple):
    """One row of macrolanguages.tsv."""

    code: str
    meant: str | None
    others: tuple[str, ...]

    @property
    def members(self) -> tuple[str, ...]:
        """All languages in it that the table knows."""
        return (*([self.meant] if self.meant else []), *self.others)


@cache
def table() -> dict[str, Macrolanguage]:
    """All macrolanguages, by their code and by the code of each of their languages."""
    text = resources.files("f2llm.data").joinpath("macrolanguages.tsv").read_text(encoding="utf-8")
    found: dict[str, Macrolanguage] = {}
    for line in text.splitlines()[1:]:
        code, meant, others = line.split("\t")
        row = Macrolanguage(code, meant or None, tuple(others.split()))
        found |= dict.fromkeys((code, *row.members), row)
    return found


def family(code: str) -> str:
    """The macrolanguage that a language is in, or the language itself where it is in none."""
    return table()[code].code if code in table() else code


def in_form(tag: str, form: Form) -> str:
    """A tag in which a macrolanguage and the language meant by it have one name; others stay as they are.

    "individual": `zho_Hant` -> `cmn_Hant`; "macrolanguage": `cmn_Hant` -> `zho_Hant`, but `yue` -> `yue`.
    """
    code, separator, script = tag.partition("_")
    row = table().get(code)
    if row is None or row.meant is None or code in row.others:
        return tag
    return (row.meant if form == "individual" else row.code) + separator + script
