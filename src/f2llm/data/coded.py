"""The texts of a part as numbers, so that what is asked of a text is asked once and rows are compared by numbers.

rows -> their different texts, and for each query, positive and negative the number of its text -> rows again. A passage
that a hundred questions share is one text.

Shapes: R rows, U different texts, P positives and N negatives of all rows.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class Lists(NamedTuple):
    """A list of texts for each row."""

    texts: Numbers
    """Number of each text, row after row [P]."""
    rows: Numbers
    """The row of each [P]."""

    def where(self, keep_P: Flags) -> "Lists":
        return Lists(self.texts[keep_P], self.rows[keep_P])

    def counts(self, rows: int) -> Numbers:
        """Texts of each row [R]."""
        return np.bincount(self.rows, minlength=rows)


class Coded(NamedTuple):
    """Rows by the numbers of their texts."""

    texts: pa.LargeStringArray
    """[U]; missing ones have become empty."""
    query_R: Numbers
    positives: Lists
    negatives: Lists


def encode(rows: pa.Table) -> Coded:
    query = _column(rows, "query", pa.large_string())
    lists = [_column(rows, name, pa.large_list(pa.large_string())) for name in ("positives", "negatives")]
    flat = [query, *(column.flatten() for column in lists)]
    texts, codes = _numbered(pc.fill_null(pa.concat_arrays(flat), ""))
    query_R, positive_P, negative_N = np.split(codes, np.cumsum([len(part) for part in flat])[:-1])
    parents = [pc.list_parent_indices(column).to_numpy() for column in lists]
    return Coded(texts, query_R, Lists(positive_P, parents[0]), Lists(negative_N, parents[1]))


def replaced(coded: Coded, texts: pa.LargeStringArray) -> Coded:
    """The rows with other texts [U] in place of theirs; equal ones get one number again."""
    different, codes = _numbered(texts)
    positives, negatives = (Lists(codes[lists.texts], lists.rows) for lists in coded[2:])
    return Coded(different, codes[coded.query_R], positives, negatives)


def query_column(coded: Coded) -> pa.Array:
    return _take(coded.texts, coded.query_R)


def list_column(coded: Coded, lists: Lists) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lists.counts(len(coded.query_R)))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), _take(coded.texts, lists.texts))


def _column(rows: pa.Table, name: str, as_type: pa.DataType) -> pa.Array:
    chunked = rows[name].cast(as_type)
    return pa.concat_arrays(chunked.chunks) if chunked.num_chunks else pa.array([], as_type)


def _numbered(texts: pa.LargeStringArray) -> tuple[pa.LargeStringArray, Numbers]:
    encoded = pc.dictionary_encode(texts)
    return encoded.dictionary, encoded.indices.to_numpy().astype(np.int64)


def _take(texts: pa.LargeStringArray, numbers: Numbers) -> pa.StringArray:
    return texts.take(pa.array(numbers)).cast(pa.string())
