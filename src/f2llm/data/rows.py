"""Canonical rows: what every source of training data becomes, and the folder that holds them.

sources -> rows (one table, SCHEMA) -> rows.parquet + sources.json -> the sampler. A retrieval row has a query and the
texts that answer it; a clustering or classification row is a text (its `query`) and a label, and the sampler draws
its partners.

`rows.parquet` is a file, or where rows are many a folder of files (part-00000.parquet, ...), which most readers of
Parquet take for one table. Stages that work on rows do so part by part (`parts`), so that memory does not grow with
their number: part 7 of what a stage reads becomes part 7 of what it writes, whoever works on it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from f2llm.errors import F2Error
from f2llm.files import read_json, write_json, write_table

Format = Literal["retrieval", "clustering", "classification"]

ROWS_FILE = "rows.parquet"
SOURCES_FILE = "sources.json"

SCHEMA = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("positives", pa.list_(pa.string()), nullable=False),  # empty but for retrieval
        pa.field("negatives", pa.list_(pa.string()), nullable=False),
        pa.field("label", pa.string()),  # the class; in retrieval the thing: equal labels are never negatives
        pa.field("source", pa.string(), nullable=False),
        pa.field("query_lang", pa.string(), nullable=False),
        pa.field("positive_lang", pa.string(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("hash", pa.string(), nullable=False),  # row_hash
    ]
)


class Source(BaseModel):
    """What is true of all rows of one source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    format: Format
    task: str
    """What the rows ask for, in one word: "translation", "kind", "duplicates"..."""
    symmetric: bool
    """Query and document are of one nature, so that either may carry the instruction."""
    instruction: str
    licence: str
    """SPDX identifier, or "unknown"."""
    rows: int = 0
    """Counted when the rows are written."""
    languages: list[str] = []
    """Of the queries, sorted; gathered when the rows are written."""


def row_hash(
    query: str, positives: Iterable[str], negatives: Iterable[str], label: str | None, source: str
) -> str:
    """16 hexadecimal digits that name a row by its content: equal rows of a source have equal hashes."""
    lists = ("\x1e".join(texts) for texts in (positives, negatives))
    content = "\x1f".join([query, *lists, label or "", source])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def rows_table(source: Source, columns: Mapping[str, list[Any]]) -> pa.Table:
    """Canonical rows of one source.

    `columns` has `query`, `query_lang` and, as the format needs, `positives`, `negatives`, `label`,
    `positive_lang`; the rest follows from the source and from the row.
    """
    count = len(columns["query"])
    filled: dict[str, list[Any]] = {
        "positives": [[]] * count,
        "negatives": [[]] * count,
        "label": [None] * count,
        "source": [source.name] * count,
        "positive_lang": columns["query_lang"],
        "licence": [source.licence] * count,
        "task": [source.task] * count,
        **columns,
    }
    hashed = ("query", "positives", "negatives", "label", "source")
    filled["hash"] = [row_hash(*row) for row in zip(*(filled[name] for name in hashed), strict=True)]
    return pa.table(filled, schema=SCHEMA)


def write_rows(folder: Path, table: pa.Table, sources: list[Source]) -> list[Source]:
    """Write rows and their sources to `folder`; returns the sources with their rows and languages counted.

    Raises F2Error, and writes nothing, where there are no rows or a row lacks what its format needs.
    """
    path = folder / ROWS_FILE
    _check(table, sources, path)
    counted = [_count(source, table.filter(pc.equal(table["source"], source.name))) for source in sources]
    write_table(path, table)
    write_json(folder / SOURCES_FILE, [source.model_dump() for source in counted])
    return counted


def _count(source: Source, rows: pa.Table) -> Source:
    languages = sorted(rows["query_lang"].unique().to_pylist())
    return source.model_copy(update={"rows": rows.num_rows, "languages": languages})


def read_rows(folder: Path) -> tuple[pa.Table, list[Source]]:
    """All rows and sources of a folder; one clear F2Error where they are missing, empty or not what they should be."""
    return pa.concat_tables(iterate_rows(folder)), read_sources(folder)


def iterate_rows(folder: Path) -> Iterator[pa.Table]:
    """The rows of a folder, checked, a row group at a time; raises as `read_rows` does, when it comes to it."""
    files = row_files(folder)
    for path in files:  # what is missing is the rows, before it is what is known of them
        with open_rows(path):
            pass
    sources = read_sources(folder)
    count = 0
    for path in files:
        with open_rows(path) as file:
            _check_columns(file.schema_arrow, path)
            before = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                _check_rows(table, sources, path, before)
                before += table.num_rows
                yield table
            count += before
    if count == 0:
        raise _empty(folder / ROWS_FILE)


def row_files(folder: Path) -> list[Path]:
    """The files that hold a folder's rows, in order."""
    path = folder / ROWS_FILE
    return sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]


@contextmanager
def open_rows(path: Path) -> Iterator[pq.ParquetFile]:
    """A file of rows; what is wrong with it, now or while it is read, is one sentence."""
    try:
        with pq.ParquetFile(
            path, pre_buffer=False
        ) as file:  # buffers would be kept until the end of the file
            yield file
    except FileNotFoundError:
        raise F2Error(f"{path} is missing; name a folder that a data stage has made.") from None
    except (pa.ArrowException, OSError) as error:
        raise F2Error(f"{path} is not a readable Parquet file ({error}); make the folder again.") from None


def read_sources(folder: Path) -> list[Source]:
    """The sources of a folder of rows."""
    path = folder / SOURCES_FILE
    try:
        return TypeAdapter(list[Source]).validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise F2Error(
            f"{path} is not a list of sources: {'.'.join(map(str, first['loc']))}: {first['msg']}; "
            f"make the folder again."
        ) from None


def _check(table: pa.Table, sources: list[Source], path: Path) -> None:
    _check_columns(table.schema, path)
    if table.num_rows == 0:
        raise _empty(path)
    _check_rows(table, sources, path)


def _check_columns(schema: pa.Schema, path: Path) -> None:
    for field in SCHEMA:
        got = schema.field(field.name).type if field.name in schema.names else "no such column"
        if got != field.type:
            raise F2Error(
                f"{path}, column {field.name!r}: expected {field.type}, got {got}; make the rows again."
            )


def _empty(path: Path) -> F2Error:
    return F2Error(f"{path} has no rows; give files with at least one row.")


def _check_rows(table: pa.Table, sources: list[Source], path: Path, before: int = 0) -> None:
    """Refuse a row that lacks what its format needs; `before` it and its table stand so many in the file."""

    def refuse(bad: pa.ChunkedArray, what: str) -> None:
        if (row := pc.index(bad, True).as_py()) >= 0:
            query = table["query"][row].as_py()
            raise F2Error(
                f"{path}, row {before + row + 1} {what} (query {query!r:.60}); mend the row or leave it out."
            )

    for name in ("query", "source"):
        refuse(pc.fill_null(pc.equal(table[name], ""), True), f"has no {name}")
    known = pa.array([source.name for source in sources], pa.string())
    refuse(pc.invert(pc.is_in(table["source"], known)), f"is of a source not in {SOURCES_FILE}")
    retrieval = pa.array([source.name for source in sources if source.format == "retrieval"], pa.string())
    is_retrieval = pc.is_in(table["source"], retrieval)
    no_positive = pc.equal(pc.fill_null(pc.list_value_length(table["positives"]), 0), 0)
    refuse(pc.and_(is_retrieval, no_positive), "has no positive")
    no_label = pc.fill_null(pc.equal(table["label"], ""), True)
    refuse(pc.and_(pc.invert(is_retrieval), no_label), "has no label")
