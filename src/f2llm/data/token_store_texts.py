"""The texts of a part of rows: each once, in order of appearance, and which of them the columns of the rows name.

A row names texts as they stand and, where its source has a prompt, behind it: `query_asked` for every such source, and
`positives_asked`, `negatives_asked` and, in the formats whose documents are labels, `label_asked` for symmetric ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm.data.rows import Source
from f2llm.data.token_store_format import ASKED, LISTS, NO_LABEL
from f2llm.errors import F2Error
from f2llm.text import clean

SLICE = 2048  # texts that are Python strings at once


@dataclass(frozen=True)
class Prompts:
    """What stands in front of the texts of a source where they carry the prompt, by what they are."""

    source: str
    is_retrieval: bool
    query: str
    document: str
    label: str

    @staticmethod
    def of(source: Source, prefix: str) -> "Prompts":
        document = prefix if source.symmetric else ""
        retrieval = source.format == "retrieval"
        return Prompts(source.name, retrieval, prefix, document, "" if retrieval else document)


@dataclass(frozen=True)
class PartTexts:
    """The texts of a part: each once, and which of them each column of the rows names."""

    source: np.ndarray  # int64, of each row: which of the prompts' sources
    distinct: pa.ChunkedArray  # in order of appearance, row by row; large strings
    place: dict[
        str, np.ndarray
    ]  # uint32; columns `query`, `query_asked`, `label` ... with NO_LABEL for no label
    row: dict[str, np.ndarray]  # int64, parallel: in which row a text is named
    lengths: dict[str, np.ndarray]  # int64, of the lists of each row


def part_texts(table: pa.Table, prompts: Sequence[Prompts]) -> PartTexts:
    names = pa.array([prompt.source for prompt in prompts], pa.string())
    source = pc.index_in(table["source"], names)
    if source.null_count:
        unknown = table["source"].filter(pc.is_null(source))[0]
        raise F2Error(f"a row is of the source {unknown}, which is not in sources.json; make the rows again.")
    each = np.arange(table.num_rows)
    columns = {"query": table["query"], "label": table["label"]}
    row = {"query": each, "label": each}
    lengths = {}
    for name in LISTS:
        lengths[name] = as_numpy(pc.fill_null(pc.list_value_length(table[name]), 0)).astype(np.int64)
        columns[name] = pc.list_flatten(table[name])
        row[name] = np.repeat(each, lengths[name])
    nothing = pa.scalar("", pa.large_string())  # between a prefix and a text
    for asked, name in ASKED.items():
        kind = name if name in ("query", "label") else "document"
        prefix = [getattr(prompt, kind) for prompt in prompts]
        if any(prefix[number] for number in pc.unique(source).to_pylist()):
            carried = pa.array(prefix, pa.large_string()).take(source.take(pa.array(row[name])))
            columns[asked] = pc.binary_join_element_wise(
                carried, columns[name].cast(pa.large_string()), nothing
            )
            row[asked] = row[name]
    return PartTexts(as_numpy(source).astype(np.int64), *_distinct(columns, row), row, lengths)


def _distinct(
    columns: Mapping[str, pa.ChunkedArray], row: Mapping[str, np.ndarray]
) -> tuple[pa.ChunkedArray, dict[str, np.ndarray]]:
    """Each text of the columns once, and the places of all among these.

    Texts of a row stand together, because they are read together.
    """
    chunks = [chunk.cast(pa.large_string()) for column in columns.values() for chunk in column.chunks]
    whole = pa.chunked_array(chunks, pa.large_string()).combine_chunks()
    order = np.argsort(np.concatenate([row[name] for name in columns]), kind="stable")
    encoded = whole.take(pa.array(order)).dictionary_encode()
    place = np.empty(len(whole), dtype="<u4")
    place[order] = as_numpy(encoded.indices.cast(pa.uint32()).fill_null(NO_LABEL))
    ends = np.cumsum([len(column) for column in columns.values()])[:-1]
    cleaned = [pa.array(map(clean, texts), pa.large_string()) for texts in slices(encoded.dictionary)]
    return pa.chunked_array(cleaned, pa.large_string()), dict(
        zip(columns, np.split(place, ends), strict=True)
    )


def as_numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    array: np.ndarray = column.to_numpy() if isinstance(column, pa.ChunkedArray) else column.to_numpy(False)
    return array


def slices(texts: pa.Array | pa.ChunkedArray) -> Iterator[list[str]]:
    for start in range(0, len(texts), SLICE):
        yield texts.slice(start, SLICE).to_pylist()
