"""Texts to measure a model on: a few of a corpus, without reading the corpus.

folders of rows, own files -> row groups in random order, until ENOUGH of text is read -> distinct queries, of which
some are drawn. A corpus below ENOUGH is read whole, and then the draw depends on its texts alone, not on their order.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm.data.parts import parts, read_part
from f2llm.data.readers import read_chunks
from f2llm.data.rows import SCHEMA, Source
from f2llm.data.user_files import import_files, iterate_texts
from f2llm.errors import F2Error, UsageError
from f2llm.rng import generator

ENOUGH = 1 << 28  # bytes
TEXTS_AT_ONCE = 4096  # of a file
QUERY = pa.schema([SCHEMA.field("query")])
ANSWERED = pa.schema([SCHEMA.field(name) for name in ("query", "positives", "label")])


class Row(NamedTuple):
    """A text, and of an answered one what is right for it."""

    query: str
    positives: Sequence[str] = ()
    label: str | None = None
    """Rows of equal labels are right for one another."""


def draw_rows(corpus: Sequence[Path], count: int, seed: int, *, answered: bool = False) -> list[Row]:
    """`count` rows (all, if there are fewer) with different queries, in random order.

    Args:
        corpus: folders of canonical rows; files of a column `text` or `query`, or of lines.
        answered: only rows with a positive; of files, those that `import_files` takes for retrieval.

    Raises:
        UsageError: no such row is there.
        F2Error: a folder has no rows, or they cannot be read.
    """
    table = _read(corpus, seed, ANSWERED if answered else QUERY)
    if answered:
        table = table.filter(pc.greater(pc.list_value_length(table["positives"]), 0))
    if not table.num_rows:
        what = "row with a positive" if answered else "text"
        raise UsageError(f"{', '.join(map(str, corpus))} has no {what} to measure the model on; give others.")
    encoded = table["query"].combine_chunks().dictionary_encode()
    first = np.unique(encoded.indices.to_numpy(), return_index=True)[1]  # rows in which a query is new
    sorted_ = pc.sort_indices(encoded.dictionary).to_numpy()  # bytes of UTF-8 sort as characters do
    drawn = generator(seed, "calibration").permutation(len(first))[:count]
    return [Row(**row) for row in table.take(pa.array(first[sorted_[drawn]])).to_pylist()]


def _read(corpus: Sequence[Path], seed: int, schema: pa.Schema) -> pa.Table:
    taken, size = [schema.empty_table()], 0
    for table in _tables(corpus, seed, schema):
        taken.append(table)
        size += table.nbytes
        if size >= ENOUGH:
            break
    return pa.concat_tables(taken)


def _tables(corpus: Sequence[Path], seed: int, schema: pa.Schema) -> Iterator[pa.Table]:
    found = [part for path in corpus if path.is_dir() for part in parts(path)]
    for file in corpus:
        if not file.is_dir():
            yield from _of_file(file, schema)
    for i in generator(seed, "row groups").permutation(len(found)):
        rows = read_part(found[i], schema.names)
        if rows.schema.names != schema.names:
            raise F2Error(
                f"{found[i].path} has no columns {', '.join(schema.names)}; make the folder of rows again."
            )
        yield rows.cast(schema)


def _of_file(file: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    if schema is ANSWERED:
        source = Source(
            name="files", format="retrieval", task="", symmetric=False, instruction="", licence="unknown"
        )
        yield import_files([file], source).select(schema.names)
        return
    opening = next(read_chunks(file, [], rows=1), None)
    texts = iterate_texts(file, "query" if opening and "query" in opening.names else "text")
    while some := list(islice(texts, TEXTS_AT_ONCE)):
        yield pa.table({"query": some}, schema=schema)
