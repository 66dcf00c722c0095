"""How the records of a source are to be read: which column plays which role, and whether a file has them."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from f2llm import languages as lang
from f2llm.data.opening import kind
from f2llm.data.readers import Chunk
from f2llm.data.records import Columns, Layout, SourceRecord
from f2llm.data.text_files import Fault
from f2llm.errors import UsageError

# A column that is not ours but this like one of ours is a slip of the pen, and would lose data in silence.
MISSPELT = 0.87
ROLES: dict[Layout, tuple[str, ...]] = {
    "retrieval": ("query", "positive", "negatives", "query_lang", "positive_lang", "lang"),
    "clustering": ("text", "label", "lang"),
    "classification": ("text", "label", "lang"),
    "parallel": ("id", "text", "lang"),
    "sts": ("sentence1", "sentence2", "score", "lang"),
}
OPTIONAL = {"negatives", "query_lang", "positive_lang", "lang"}
BOTH = {"positive": ("positive", "positives"), "negatives": ("negative", "negatives")}


@dataclass(frozen=True)
class Reading:
    """How the records of a source are to be read."""

    layout: Layout
    columns: Columns = field(default_factory=Columns)
    query_lang: str = lang.UNKNOWN
    positive_lang: str | None = None
    """That of the query, if left out."""
    label_names: Mapping[str, str] = field(default_factory=dict)
    at_least: float | None = None

    @classmethod
    def of(cls, record: SourceRecord) -> "Reading":
        """What a record says, if that is enough."""
        if not isinstance(record.columns, Columns):
            raise UsageError(
                f"the columns of {record.name} are unknown; look at its files and write 'columns' into its record."
            )
        layout = record.layout or record.format
        if layout == "sts" and record.at_least is None:
            raise UsageError(
                f"{record.name} has scored pairs and no 'at_least'; write into its record the lowest score that makes "
                "a positive, such as 4 of 5."
            )
        only = record.languages[0] if len(record.languages) == 1 else lang.UNKNOWN
        return cls(
            layout,
            record.columns,
            record.query_lang or only,
            record.positive_lang,
            record.label_names,
            record.at_least,
        )

    def candidates(self, role: str) -> tuple[str, ...]:
        """The columns that may play a role; where nobody named one, singular and plural."""
        name = getattr(self.columns, role)
        if role in BOTH and role not in self.columns.model_fields_set:
            return BOTH[role]
        return (name,) if name else ()

    @property
    def wanted(self) -> list[str]:
        """All columns that matter."""
        return [name for role in ROLES[self.layout] for name in self.candidates(role)]


def check_header(chunk: Chunk, reading: Reading) -> None:
    """Refuse a table that lacks a column altogether: then it is not rows that are wrong."""
    if kind(chunk.file) not in (".parquet", ".csv", ".tsv"):
        return
    for role in ROLES[reading.layout]:
        named = reading.candidates(role)
        needed = role not in OPTIONAL or role in reading.columns.model_fields_set
        if needed and named and not any({n, n.split(".")[0]} & chunk.names.keys() for n in named):
            near = difflib.get_close_matches(named[0], chunk.names, 1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise UsageError(
                f"{chunk.file} has no column {' or '.join(map(repr, named))}, only "
                f"{', '.join(map(repr, chunk.names))}{hint}: rename it, or say under 'columns' of the source's record "
                f"which column is the {role}."
            )


def misspelt(chunk: Chunk, reading: Reading) -> list[Fault]:
    """Columns that are not ours but nearly so."""
    known = reading.wanted
    return [
        Fault(
            number,
            "misspelt column",
            f"unknown column {name!r}",
            f"the nearest known one is {near[0]!r}: rename it",
        )
        for name, number in chunk.names.items()
        if name not in known and (near := difflib.get_close_matches(name, known, 1, MISSPELT))
    ]
