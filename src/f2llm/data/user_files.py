"""A user's own files to canonical rows: the strict way, in which the first slip stops everything and is named.

Retrieval wants the columns `query` and `positive` (a text) or `positives` (a list), and may have `negative` or
`negatives`; clustering and classification want `text` and `label`. In CSV and TSV a list is written as JSON. Other
columns are left out. Files are read by `readers`, and their rows made by `canonical`, as those of the `sources` stage,
which is for files that are larger than memory or not clean.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from f2llm import languages as lang
from f2llm.data.canonical import convert
from f2llm.data.readers import Chunk, read_chunks
from f2llm.data.reading import Reading, misspelt
from f2llm.data.records import Columns
from f2llm.data.rows import Format, Source, rows_table, write_rows
from f2llm.errors import UsageError
from f2llm.progress import progress
from f2llm.recipe_data import FilesStage

FORMAT_OF: dict[str, Format] = {"query": "retrieval", "label": "clustering"}  # by a column that tells
OURS = Columns(lang=None, query_lang=None, positive_lang=None)  # languages are those of the settings


def import_files(
    files: list[Path], source: Source, *, query_lang: str = lang.UNKNOWN, positive_lang: str = lang.UNKNOWN
) -> pa.Table:
    """Canonical rows of `files`, all of one source, in the order of the files.

    Raises UsageError for what is missing, unreadable, empty or wrong, with file, line, column and what to do.
    """
    reading = Reading(source.format, OURS, lang.tag(query_lang), lang.tag(positive_lang))
    columns: dict[str, list[Any]] = defaultdict(list)
    with progress(total=len(files), what=f"read {source.name}", unit="file") as bar:
        for file in files:
            before = len(columns["query"])
            for chunk in read_chunks(file, reading.wanted):
                converted = convert(chunk, reading)
                wrong = [*misspelt(chunk, reading), *converted.faults]
                if wrong:
                    first = min(wrong, key=lambda fault: fault.number)
                    raise UsageError(first.sentence(file, chunk.unit))
                for column, values in converted.columns.items():
                    columns[column] += values
            if len(columns["query"]) == before:
                raise UsageError(f"{file} has no rows; give a file with at least one, or leave it out.")
            bar.advance(1, note=file.name)
    if source.format != "retrieval" and len(set(columns["label"])) < 2:
        raise UsageError(
            f"all rows of {source.name} have the label {columns['label'][0]!r}; {source.format} needs two or more."
        )
    columns.setdefault("positive_lang", [reading.positive_lang] * len(columns["query"]))
    return rows_table(source, columns)


def guess_format(file: Path) -> Format:
    """Retrieval if the first row has a query, clustering if it has a label."""
    chunk = _first(file)
    for column, form in FORMAT_OF.items():
        if column in chunk.names:
            return form
    raise UsageError(
        f"{file}, {chunk.unit} {chunk.numbers[0]} has the columns {', '.join(map(repr, chunk.names))}, expected "
        "'query' and 'positive', or 'text' and 'label'; rename them."
    )


def has_texts_alone(file: Path) -> bool:
    """Whether it is lines of text, or its first row has a text and neither query nor label."""
    names = _first(file).names
    return "text" in names and not FORMAT_OF.keys() & set(names)


def _first(file: Path) -> Chunk:
    """The first row."""
    chunk = next(read_chunks(file, [], rows=1), None)
    if chunk is None:
        raise UsageError(f"{file} has no rows; give a file with at least one.")
    for fault in chunk.faults:
        raise UsageError(fault.sentence(file, chunk.unit))
    return chunk


def files_stage(config: FilesStage, name: str, out: Path) -> dict[str, Any]:
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


def iterate_texts(file: Path, column: str = "text") -> Iterator[str]:
    """The texts of a file, one at a time: a column of JSONL, CSV, TSV or Parquet, or the lines of a .txt (`text`).

    Raises UsageError naming the place of a row that has no text in `column`. An empty text is legal.
    """
    for chunk in read_chunks(file, [column]):
        for fault in chunk.faults:
            raise UsageError(fault.sentence(file, chunk.unit))
        for number, value in zip(chunk.numbers, chunk.columns[column], strict=True):
            if not isinstance(value, str):
                got = "nothing" if value is None else repr(value)
                raise UsageError(
                    f"{file}, {chunk.unit} {number}, column {column!r}: expected a text, got {got:.60} (the row has "
                    f"{', '.join(map(repr, chunk.names))}); mend the row or leave it out."
                )
            yield value
