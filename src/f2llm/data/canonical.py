"""Records of a source, as its files have them, to the columns of canonical rows; bad ones to faults.

chunk of raw columns -> for each role of the layout (query, positive, label ...) the column that plays it, checked value
by value -> columns as `rows_table` wants them, and one fault for each record that cannot be a row. Nothing is mended
but Unicode, and nothing is left out: the rows and the faults together are what was read.

A language that the table of languages does not have, as Unicode CLDR has fewer than half of all, stays as it is where
it looks like ISO 639-3, for it would be those with little text that were lost. What does not look like a language is a
fault. `und` is the language of which nobody said anything.
"""

import json
import math
import re
from functools import cache
from typing import Any, NamedTuple

from f2llm import languages as lang
from f2llm.data.opening import kind
from f2llm.data.readers import Chunk
from f2llm.data.reading import Reading
from f2llm.data.text_files import SHOWN, Fault
from f2llm.errors import UsageError
from f2llm.text import clean

ISO_639_3 = re.compile(r"[a-z]{3}(_[A-Z][a-z]{3})?")
BELOW = "score below 'at_least'"
MEND = "mend the row or leave it out"


class Converted(NamedTuple):
    """What became of a chunk: good records and bad ones."""

    columns: dict[str, list[Any]]
    """Of the good: as `rows_table` takes them; `id`, `query` and `query_lang` of parallel texts."""
    numbers: list[int]
    """Of the good."""
    faults: list[Fault]
    """Of the bad, by number, those that could not be read included."""


def convert(chunk: Chunk, reading: Reading) -> Converted:
    """Canonical columns of a chunk that was read with the columns `reading.wanted`."""
    check = _Check(chunk, reading)
    columns = CONVERT[reading.layout](check)
    good = [i for i in range(len(chunk.numbers)) if i not in check.bad]
    if check.bad:
        columns = {name: [values[i] for i in good] for name, values in columns.items()}
    faults = sorted([*chunk.faults, *check.faults()], key=lambda fault: fault.number)
    return Converted(columns, [chunk.numbers[i] for i in good], faults)


class _Check:
    """A chunk whose values are being looked at; the first thing wrong with a record is its fault."""

    def __init__(self, chunk: Chunk, reading: Reading) -> None:
        self.chunk, self.reading = chunk, reading
        self.count = len(chunk.numbers)
        self.bad: dict[int, Fault] = {}
        self.langs: list[str] = [reading.query_lang] * self.count

    def faults(self) -> list[Fault]:
        """With what is known of the record itself."""
        return [fault._replace(raw=self._raw(i), lang=self.langs[i]) for i, fault in self.bad.items()]

    def _raw(self, i: int) -> str:
        present = {name: values[i] for name, values in self.chunk.columns.items() if values[i] is not None}
        return (
            json.dumps(present, ensure_ascii=False, default=_shown)[:SHOWN].encode(errors="replace").decode()
        )

    def refuse(self, i: int, reason: str, column: str, expected: str, value: Any) -> None:
        """Note that record `i` has `value` where something else is expected."""
        if i in self.bad:
            return
        got = "nothing" if value in (None, "") else repr(value)
        problem = f"expected {expected}, got {got:.60}"
        if column not in self.chunk.names:
            problem += f" (the file has {', '.join(map(repr, self.chunk.names)) or 'no columns'})"
        self.bad[i] = Fault(self.chunk.numbers[i], reason, problem, MEND, column)

    def values(self, column: str) -> list[Any]:
        return self.chunk.columns.get(column) or [None] * self.count

    def text(self, i: int, role: str, column: str, value: Any) -> str:
        """The value if it is a text; else empty, and the record is bad."""
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError:
                self.refuse(i, "not UTF-8", column, "a text in UTF-8", value)
                return ""
        if isinstance(value, str) and value and not value.isspace():
            return clean(value)
        lacks = value is None or isinstance(value, str)
        self.refuse(i, f"{role}: {'no text' if lacks else 'not a text'}", column, "a text", value)
        return ""

    def texts(self, role: str) -> list[str]:
        (column,) = self.reading.candidates(role)
        return [self.text(i, role, column, value) for i, value in enumerate(self.values(column))]

    def lists(self, role: str) -> list[list[str]]:
        """Texts and lists of texts of all columns that play `role`, as one list a record."""
        found: list[list[str]] = [[] for _ in range(self.count)]
        in_cells = kind(self.chunk.file) in (".csv", ".tsv")
        for column in self.reading.candidates(role):
            plural = (
                column in ("positives", "negatives") and role not in self.reading.columns.model_fields_set
            )
            for i, value in enumerate(self.values(column)):
                if value is None or value == "":
                    continue
                if isinstance(value, str) and (plural or (in_cells and value.startswith("["))):
                    value = self._parsed(i, role, column, value, plural)
                if isinstance(value, list):
                    found[i] += [self.text(i, role, column, text) for text in value]
                elif plural:
                    self.refuse(i, f"{role}: not a list", column, "a list of texts", value)
                else:
                    found[i].append(self.text(i, role, column, value))
        return found

    def _parsed(self, i: int, role: str, column: str, value: str, must: bool) -> Any:
        """The list that is written as JSON in `value`; what is none stays a text unless it `must` be one."""
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            if not must:
                return value
            self.refuse(i, f"{role}: not a list", column, 'a list in JSON such as ["a", "b"]', value)
            return []

    def languages(self, roles: tuple[str, ...], otherwise: list[str]) -> list[str]:
        """Of the columns of these roles the first that tells a record's language."""
        result = otherwise
        for role in reversed(roles):
            for column in self.reading.candidates(role):
                if any(values := self.values(column)):
                    pairs = zip(values, result, strict=True)
                    result = [
                        self._language(i, column, value) if value else default
                        for i, (value, default) in enumerate(pairs)
                    ]
        return result

    def of_positives(self) -> list[str]:
        """Languages of the positives, where no column of theirs tells them."""
        given = self.reading.positive_lang
        return [given] * self.count if given else self.langs

    def _language(self, i: int, column: str, value: Any) -> str:
        if isinstance(value, str) and (known := tag(value)):
            return known
        self.refuse(i, "unknown language", column, "a language such as 'deu', 'de' or 'zho_Hant'", value)
        return lang.UNKNOWN


@cache
def tag(value: str) -> str | None:
    try:
        return lang.tag(value)
    except UsageError:
        return value if ISO_639_3.fullmatch(value) else None


def _shown(value: Any) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def _retrieval(check: _Check) -> dict[str, list[Any]]:
    check.langs = check.languages(("query_lang", "lang"), check.langs)
    query = check.texts("query")
    positives = check.lists("positive")
    for i, texts in enumerate(positives):
        if not texts:
            names = check.reading.candidates("positive")
            check.refuse(
                i, "positive: no text", names[0], f"a text or a list of texts in {' or '.join(names)}", None
            )
    return {
        "query": query,
        "positives": positives,
        "negatives": check.lists("negatives"),
        "query_lang": check.langs,
        "positive_lang": check.languages(("positive_lang",), check.of_positives()),
    }


def _labelled(check: _Check) -> dict[str, list[Any]]:
    check.langs = check.languages(("lang",), check.langs)
    (column,) = check.reading.candidates("label")
    labels = [_code(value) for value in check.values(column)]
    names = check.reading.label_names
    return {
        "query": check.texts("text"),
        "label": [
            check.text(i, "label", column, names.get(label, label) if isinstance(label, str) else label)
            for i, label in enumerate(labels)
        ],
        "query_lang": check.langs,
    }


def _code(value: Any) -> Any:
    """Numbers name labels and ids as well as words do."""
    return str(value) if isinstance(value, int) else value


def _parallel(check: _Check) -> dict[str, list[Any]]:
    check.langs = check.languages(("lang",), check.langs)
    (column,) = check.reading.candidates("id")
    ids = [check.text(i, "id", column, _code(value)) for i, value in enumerate(check.values(column))]
    return {"id": ids, "query": check.texts("text"), "query_lang": check.langs}


def _sts(check: _Check) -> dict[str, list[Any]]:
    check.langs = check.languages(("lang",), check.langs)
    query, positive = check.texts("sentence1"), check.texts("sentence2")
    (column,) = check.reading.candidates("score")
    at_least = -math.inf if check.reading.at_least is None else check.reading.at_least
    for i, value in enumerate(check.values(column)):
        score = _number(value)
        if math.isnan(score):
            check.refuse(i, "score: not a number", column, "a number", value)
        elif score < at_least:
            check.refuse(i, BELOW, column, f"{at_least:g} or more", value)
    return {
        "query": query,
        "positives": [[text] for text in positive],
        "query_lang": check.langs,
        "positive_lang": check.of_positives(),
    }


def _number(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


CONVERT = {
    "retrieval": _retrieval,
    "clustering": _labelled,
    "classification": _labelled,
    "parallel": _parallel,
    "sts": _sts,
}
