"""Files to chunks of records: Parquet, JSONL, JSON arrays, CSV, TSV and plain text, a bounded part at a time.

file -> records, each with its number -> chunks of at most ROWS records and about BYTES of text, column by column. A
record that cannot be read at all (broken JSON, too few fields, not UTF-8) is a fault with its number; what the columns
should hold is not known here. Chunks depend on the file alone, so that work on them can be done again from any of them.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from f2llm.data.opening import kind, open_stream, readable
from f2llm.data.text_files import ALL, READERS, Fault, Record
from f2llm.errors import UsageError
from f2llm.files import CHUNK_BYTES, ROWS_IN_A_GROUP

ROWS = ROWS_IN_A_GROUP
BYTES = 1 << 26  # of text
KINDS = (".jsonl", ".csv", ".tsv", ".parquet", ".json", ".ndjson", ".txt")


@dataclass(frozen=True)
class Chunk:
    """Some successive records of a file."""

    file: Path
    unit: str
    """What is counted in this file: line, row or item."""
    numbers: Sequence[int]
    """Of the records, from 1."""
    columns: dict[str, list[Any]]
    """Values, or None where a record lacks the column."""
    names: dict[str, int]
    """All columns that the file has here, and the number of the first record that has each."""
    faults: Sequence[Fault] = ()
    """Records that could not be read; they are not among `numbers`."""
    size: int = 0
    """Of all this, in bytes, about."""

    @property
    def read(self) -> int:
        return len(self.numbers) + len(self.faults)


def read_chunks(
    file: Path, wanted: Sequence[str] | None = None, *, rows: int = ROWS, only: Container[int] = ALL
) -> Iterator[Chunk]:
    """The records of `file`, in order.

    Args:
        wanted: columns; all if left out. `a.b` is b within the structure a where there is no such column.
        rows: most records of a chunk.
        only: which records, counted from 0; broken ones count, blank lines do not.

    Raises:
        UsageError: the file is missing, damaged, or of a kind that is not read.
    """
    with readable(file):
        if (ending := kind(file)) == ".parquet":
            yield from _parquet(file, wanted, rows, only)
        elif ending not in READERS:
            raise UsageError(
                f"{file}: files of the kind {ending!r} are not read; give one of {', '.join(KINDS)}."
            )
        else:
            read, unit = READERS[ending]
            with open_stream(file) as stream:
                yield from _gather(file, unit, read(stream, only, file), wanted, rows)


def count_records(file: Path) -> int:
    """How many records `read_chunks` would give, broken ones included."""
    with readable(file):
        if kind(file) == ".parquet":
            return int(pq.read_metadata(file).num_rows)
        if kind(file) == ".jsonl":
            with open_stream(file) as stream:
                return sum(1 for line in stream if line.strip())
    return sum(chunk.read for chunk in read_chunks(file, []))


def pick(record: dict[str, Any], column: str) -> Any:
    """The value of a column, which `a.b` looks for within `a`; None where there is none."""
    if column in record or "." not in column:
        return record.get(column)
    value: Any = record
    for name in column.split("."):
        if isinstance(value, list):  # a list of structures: what each has under the name
            value = [item.get(name) if isinstance(item, dict) else None for item in value]
        else:
            value = value.get(name) if isinstance(value, dict) else None
    return value


def _gather(
    file: Path, unit: str, records: Iterable[Record], wanted: Sequence[str] | None, rows: int
) -> Iterator[Chunk]:
    held: list[Record] = []
    size = 0
    for record in records:
        held.append(record)
        size += record.size
        if len(held) >= rows or size >= BYTES:
            yield _chunk(file, unit, held, wanted)
            held, size = [], 0
    if held:
        yield _chunk(file, unit, held, wanted)


def _chunk(file: Path, unit: str, held: list[Record], wanted: Sequence[str] | None) -> Chunk:
    good = [(record.number, record.values) for record in held if isinstance(record.values, dict)]
    names: dict[str, int] = {}
    last: Any = None
    for number, values in good:
        if (keys := values.keys()) != last:
            last = keys
            for name in keys:
                names.setdefault(name, number)
    columns = {
        name: [pick(values, name) for _, values in good] for name in (names if wanted is None else wanted)
    }
    faults = [record.values for record in held if isinstance(record.values, Fault)]
    size = sum(record.size for record in held)
    return Chunk(file, unit, [number for number, _ in good], columns, names, faults, size)


# --- Parquet


def _parquet(file: Path, wanted: Sequence[str] | None, rows: int, only: Container[int]) -> Iterator[Chunk]:
    # What is buffered before it is read would be kept until the end of the file.
    with pq.ParquetFile(file, buffer_size=CHUNK_BYTES, pre_buffer=False) as parquet:
        names = parquet.schema_arrow.names
        tops = names if wanted is None else {name if name in names else name.split(".")[0] for name in wanted}
        columns = [name for name in names if name in tops]
        before = 0
        for batch in parquet.iter_batches(_batch_size(parquet, columns, rows), columns=columns or names[:1]):
            chosen = [i for i in range(batch.num_rows) if before + i in only] if only is not ALL else None
            numbers: Sequence[int] = range(before + 1, before + 1 + batch.num_rows)
            before += batch.num_rows
            if chosen is not None:
                batch, numbers = batch.take(pa.array(chosen, pa.int64())), [numbers[i] for i in chosen]
            # Where texts repeat, what the file says of its size is too little.
            step = max(1, batch.num_rows * BYTES // max(batch.nbytes, BYTES))
            for start in range(0, batch.num_rows, step):
                part = batch.slice(start, step)
                values = {name: _values(part.column(name)) for name in columns}
                taken = {
                    name: _taken(values, name, part.num_rows)
                    for name in (columns if wanted is None else wanted)
                }
                found = dict.fromkeys(names, 1)
                yield Chunk(file, "row", numbers[start : start + step], taken, found, size=part.nbytes)


def _batch_size(parquet: pq.ParquetFile, columns: list[str], rows: int) -> int:
    """Rows that take about BYTES when they are unpacked, `rows` at most."""
    size = 0
    for group in range(parquet.metadata.num_row_groups):
        facts = parquet.metadata.row_group(group)
        found = (facts.column(i) for i in range(facts.num_columns))
        size += sum(c.total_uncompressed_size for c in found if c.path_in_schema.split(".")[0] in columns)
    return int(max(1, min(rows, BYTES * parquet.metadata.num_rows // max(size, 1))))


def _values(column: pa.Array) -> list[Any]:
    """Values of Python; a column of texts in which one is not UTF-8 comes as bytes."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        return list(column.cast(pa.list_(pa.binary()) if is_list else pa.binary()).to_pylist())


def _taken(values: dict[str, list[Any]], name: str, rows: int) -> list[Any]:
    """A column, or one within structures; None where there is none."""
    if name in values:
        return values[name]
    top = values.get(name.split(".")[0], [None] * rows)
    return [pick({name.split(".")[0]: value}, name) for value in top]
