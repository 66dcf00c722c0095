"""A user's own files to canonical rows: JSONL, CSV, TSV or Parquet; and to plain texts, with .txt as well.

files -> records with the place where each stands -> checked columns -> rows. Retrieval wants the columns `query` and
`positive` (a text) or `positives` (a list), and may have `negative` or `negatives`; clustering and classification
want `text` and `label`. In CSV and TSV a list is written as JSON. Other columns are left out.
"""

import csv
import difflib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from f2llm import languages as lang
from f2llm.data.rows import Format, Source, rows_table, write_rows
from f2llm.errors import UsageError
from f2llm.progress import progress
from f2llm.text import clean

if TYPE_CHECKING:
    from f2llm.recipe import FilesStage

# A column that is not ours but this like one of ours is a slip of the pen, and would lose data in silence.
MISSPELT = 0.87


FORMAT_OF: dict[str, Format] = {"query": "retrieval", "label": "clustering"}  # by a column that tells


class Record(NamedTuple):
    """One row of a file, with its place in words for errors: "pairs.jsonl, line 3"."""

    place: str
    values: dict[str, Any]


def import_files(
    files: list[Path], source: Source, *, query_lang: str = lang.UNKNOWN, positive_lang: str = lang.UNKNOWN
) -> pa.Table:
    """Canonical rows of `files`, all of one source, in the order of the files.

    Raises UsageError for what is missing, unreadable, empty or wrong, with file, line, column and what to do.
    """
    read_row = _retrieval if source.format == "retrieval" else _labelled
    columns: dict[str, list[Any]] = defaultdict(list)
    with progress(total=len(files), what=f"read {source.name}", unit="file") as bar:
        for file in files:
            before = len(columns["query"])
            for record in _records(file):
                for column, value in read_row(record).items():
                    columns[column].append(value)
            if len(columns["query"]) == before:
                raise UsageError(f"{file} has no rows; give a file with at least one, or leave it out.")
            bar.advance(1, note=file.name)
    if source.format != "retrieval" and len(set(columns["label"])) < 2:
        raise UsageError(
            f"all rows of {source.name} have the label {columns['label'][0]!r}; {source.format} needs two or more."
        )
    count = len(columns["query"])
    columns["query_lang"] = [lang.tag(query_lang)] * count
    columns["positive_lang"] = [lang.tag(positive_lang)] * count
    return rows_table(source, columns)


def guess_format(file: Path) -> Format:
    """Retrieval if the first row has a query, clustering if it has a label."""
    first = next(_records(file), None)
    if first is None:
        raise UsageError(f"{file} has no rows; give a file with at least one.")
    for column, form in FORMAT_OF.items():
        if column in first.values:
            return form
    raise UsageError(
        f"{first.place} has the columns {', '.join(map(repr, first.values))}, expected 'query' and 'positive', or "
        "'text' and 'label'; rename them."
    )


def files_stage(config: "FilesStage", name: str, out: Path) -> dict[str, Any]:
    """Write the rows of a recipe's own files to `out`, as the source `name`; returns the number of rows."""
    source = Source(
        name=name,
        format=config.format,
        task=config.task,
        symmetric=config.symmetric,
        instruction=config.instruction,
        licence=config.licence,
    )
    table = import_files(
        [Path(file) for file in config.files],
        source,
        query_lang=config.query_lang,
        positive_lang=config.positive_lang,
    )
    return {"rows": {name: write_rows(out, table, [source])[0].rows}}


def _retrieval(record: Record) -> dict[str, Any]:
    _check_columns(record, ("query", "positive", "positives", "negative", "negatives"))
    positives = _texts(record, "positive")
    if not positives:
        raise _wrong(record, "positive", "nothing", "a text in 'positive' or a list of texts in 'positives'")
    return {
        "query": _text(record, "query"),
        "positives": positives,
        "negatives": _texts(record, "negative"),
    }


def _labelled(record: Record) -> dict[str, Any]:
    _check_columns(record, ("text", "label"))
    label = record.values.get("label")
    if isinstance(label, int):
        record.values["label"] = str(label)
    return {"query": _text(record, "text"), "label": _text(record, "label")}


def _check_columns(record: Record, known: tuple[str, ...]) -> None:
    for column in record.values:
        if column not in known and (near := difflib.get_close_matches(column, known, 1, MISSPELT)):
            raise UsageError(
                f"{record.place}: unknown column {column!r}; the nearest known one is {near[0]!r}: rename it."
            )


def _text(record: Record, column: str) -> str:
    return _checked(record, column, record.values.get(column))


def _texts(record: Record, column: str) -> list[str]:
    """The text in `column`, if there is one, and those of the list in its plural."""
    one, many = record.values.get(column), record.values.get(f"{column}s")
    if isinstance(many, str):  # a list in CSV or TSV
        try:
            many = json.loads(many) if many else []
        except json.JSONDecodeError:
            raise _wrong(record, f"{column}s", repr(many), 'a list in JSON, such as ["a", "b"]') from None
    if not isinstance(many, list | None):
        raise _wrong(record, f"{column}s", repr(many), "a list of texts")
    texts = [_checked(record, column, one)] if one not in (None, "") else []
    return texts + [_checked(record, f"{column}s", text) for text in many or ()]


def _checked(record: Record, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _wrong(record, column, "nothing" if value in (None, "") else repr(value), "a text")
    return clean(value)


def _wrong(record: Record, column: str, got: str, expected: str) -> UsageError:
    columns = ", ".join(map(repr, record.values))
    return UsageError(
        f"{record.place}, column {column!r}: expected {expected}, got {got:.60} (the row has {columns}); "
        f"mend the row or leave it out."
    )


def _records(file: Path) -> Iterator[Record]:
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise UsageError(
            f"{file}: files of the kind {file.suffix!r} are not read; give one of {', '.join(READERS)}."
        )
    try:
        yield from reader(file)
    except FileNotFoundError:
        raise UsageError(
            f"{file} is missing; check the path, which is relative to the current folder."
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{file} cannot be read ({error}); check the file.") from None


def _jsonl(file: Path) -> Iterator[Record]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}, line {number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"{place}, column {error.colno}: not valid JSON ({error.msg}); write one JSON object a line."
                ) from None
            if not isinstance(values, dict):
                raise UsageError(
                    f"{place}: expected a JSON object, got {line.strip():.60}; write one object a line."
                )
            yield Record(place, values)


def _csv(file: Path) -> Iterator[Record]:
    return _separated(file, delimiter=",", strict=True)


def _tsv(file: Path) -> Iterator[Record]:
    return _separated(file, delimiter="\t", quoting=csv.QUOTE_NONE)  # in TSV a quotation mark is a letter


def _separated(file: Path, **dialect: Any) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # documents are longer than the 128 KiB that csv takes for a slip
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, **dialect)
        try:
            header = next(reader, [])
            for fields in reader:
                place = f"{file}, line {reader.line_num}"
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise UsageError(
                        f"{place}: expected {len(header)} columns as in the first line, got {len(fields)}; "
                        f"check the separators and quotation marks."
                    )
                yield Record(place, dict(zip(header, fields, strict=True)))
        except csv.Error as error:
            raise UsageError(f"{file}, line {reader.line_num}: {error}; check the quotation marks.") from None


def _parquet(file: Path) -> Iterator[Record]:
    number = 0
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Record(f"{file}, row {number}", values)


def _txt(file: Path) -> Iterator[Record]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            yield Record(f"{file}, line {number}", {"text": line.rstrip("\n")})


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _txt,
}


def iterate_texts(file: Path, column: str = "text") -> Iterator[str]:
    """The texts of a file, one at a time: a column of JSONL, CSV, TSV or Parquet, or the lines of a .txt (`text`).

    Raises UsageError naming the place of a row that has no text in `column`. An empty text is legal.
    """
    for record in _records(file):
        value = record.values.get(column)
        if not isinstance(value, str):
            raise _wrong(record, column, "nothing" if value is None else repr(value), "a text")
        yield value
