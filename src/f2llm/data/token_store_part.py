"""Writing one part of a token store: token ids of the texts that are new in it, and its rows as numbers of texts.

Token ids go to the file as they come, slice by slice; the columns of the rows follow.
"""

import hashlib
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm.data.parts import Part, read_part
from f2llm.data.token_store_format import (
    ALIGNED,
    COLUMNS,
    LISTS,
    NO_LABEL,
    TOKENS,
    PartFacts,
    part_file,
    token_dtype,
)
from f2llm.data.token_store_numbers import HashFile
from f2llm.data.token_store_texts import PartTexts, Prompts, as_numpy, part_texts, slices
from f2llm.errors import F2Error
from f2llm.files import atomic_write, read_object, write_json
from f2llm.tokenizer_file import load_tokenizer

_tokenizer = lru_cache(1)(load_tokenizer)  # a worker writes many parts with one


@dataclass(frozen=True)
class PartWork:
    """A part of rows to be written as a part of a store."""

    number: int
    part: Part
    out: Path
    done: Path
    """Its facts; the part is written where they are."""
    prompts: tuple[Prompts, ...]
    tokenizer: Path
    vocab_size: int
    eos_id: int
    hashes: HashFile
    numbering: Path
    place: int
    """Global place of the part's first text, and so where its numbers begin in the numbering."""
    first: int
    """Number of the first text that is new in this part."""
    languages: tuple[str, ...]


def write_part(work: PartWork) -> dict[str, Any]:
    """Write a part of the store; its size and checksum (`part`), its `labels` and its `tally`."""
    if work.done.exists():
        return read_object(work.done)
    if multiprocessing.parent_process():
        # There is a worker for each core, and threads of all of them would only be in each other's way.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    table = read_part(work.part)
    texts = part_texts(table, work.prompts)
    number_N = np.fromfile(work.numbering, "<u4", work.hashes.count, offset=4 * work.place)
    numbers, place = np.unique(number_N, return_index=True)
    new = place[numbers >= work.first]
    rows = {**_fixed_columns(table, texts, work), **_text_columns(texts, number_N)}

    path = work.out / part_file(work.number)
    with atomic_write(path) as file:
        column_file = _ColumnFile(file)
        lengths = column_file.put_tokens(_encode(texts.distinct.take(pa.array(new)), work), work.vocab_size)
        offsets = 1 + np.concatenate(([0], np.cumsum(lengths)))
        columns = {"offsets": offsets, **rows}
        for name, dtype in list(COLUMNS.items())[1:]:
            column_file.put(columns.get(name, np.empty(0)).astype(dtype))
        counts = {name: len(columns.get(name, ())) for name in COLUMNS} | {TOKENS: int(offsets[-1])}
        part = PartFacts(size=column_file.size, sha256=column_file.digest.hexdigest(), counts=counts)
    facts = {
        "part": part.model_dump(),
        "labels": _labels(table, rows["label"], work.prompts),
        "tally": _tally(texts, rows, new, lengths, work),
    }
    write_json(work.done, facts)
    return facts


class _ColumnFile:
    """A file that columns are appended to, with the checksum of what it holds."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def put(self, column: np.ndarray) -> None:
        self._write(column.tobytes())
        self._write(bytes(-self.size % ALIGNED))

    def put_tokens(self, encoded: Iterator[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> np.ndarray:
        """Append the token ids of all slices as one column; int64, how many each text has."""
        lengths = []
        for ids, length_N in encoded:
            self._write(ids.astype(token_dtype(vocab_size)).tobytes())
            lengths.append(length_N)
        self._write(bytes(-self.size % ALIGNED))
        return np.concatenate(lengths)

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.digest.update(content)
        self.size += len(content)


def _encode(texts: pa.ChunkedArray, work: PartWork) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids of the texts of each slice, one after the other, and how many each has (int64).

    First of all comes an EOS of no text, so that every text follows upon one.
    """
    yield np.asarray([work.eos_id]), np.empty(0, np.int64)
    tokenizer = _tokenizer(work.tokenizer)
    for some in slices(texts):
        encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(some)]
        length_N = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.fromiter(chain.from_iterable(encoded), np.uint32, length_N.sum())
        if not length_N.all() or (ids[np.cumsum(length_N) - 1] != work.eos_id).any():
            raise F2Error(
                f"{work.tokenizer} does not end every text with EOS {work.eos_id}, so vectors would be wrong; "
                "repair its post-processor."
            )
        yield ids, length_N


def _text_columns(texts: PartTexts, number_N: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of numbers of texts, and the offsets of lists."""
    with_none_N = np.append(number_N, np.uint32(NO_LABEL))
    columns = {name: with_none_N[np.minimum(place, len(number_N))] for name, place in texts.place.items()}
    for name in LISTS:
        columns[f"{name}_offsets"] = np.concatenate(([0], np.cumsum(texts.lengths[name])))
    return columns


def _fixed_columns(table: pa.Table, texts: PartTexts, work: PartWork) -> dict[str, np.ndarray]:
    """The columns that are not numbers of texts."""
    high, _, place = work.hashes.columns()
    high_N = np.empty(len(high), "<u8")
    high_N[place] = high
    languages = pa.array(work.languages, pa.string())
    try:
        row_hash = np.frombuffer(bytes.fromhex("".join(table["hash"].to_pylist())), ">u8")
        if len(row_hash) != table.num_rows:
            raise ValueError("they are not 16 digits each")
    except ValueError as error:
        raise F2Error(
            f"{work.part.path}: the hashes of its rows are not hexadecimal ({error}); make the rows again."
        ) from None
    return {
        "query_key": high_N[texts.place["query"]],
        "source": texts.source,
        "query_lang": as_numpy(pc.index_in(table["query_lang"], languages)),
        "positive_lang": as_numpy(pc.index_in(table["positive_lang"], languages)),
        "hash": row_hash,
    }


def _labels(table: pa.Table, label: np.ndarray, prompts: Sequence[Prompts]) -> dict[str, dict[str, int]]:
    """Numbers of the labels of clustering and classification sources."""
    retrieval = pa.array([prompt.source for prompt in prompts if prompt.is_retrieval], pa.string())
    named = pa.table({"source": table["source"], "label": table["label"], "number": label})
    named = named.filter(
        pc.and_(pc.invert(pc.is_in(table["source"], retrieval)), pc.is_valid(table["label"]))
    )
    found: dict[str, dict[str, int]] = {}
    for row in named.group_by(["source", "label"]).aggregate([("number", "min")]).to_pylist():
        found.setdefault(row["source"], {})[row["label"]] = row["number_min"]
    return {source: dict(sorted(labels.items())) for source, labels in sorted(found.items())}


def _tally(
    texts: PartTexts, rows: Mapping[str, np.ndarray], new: np.ndarray, lengths: np.ndarray, work: PartWork
) -> list[list[Any]]:
    """Source, language, texts that rows name, texts that are new in this part, and their tokens."""
    languages = len(work.languages)
    places, kinds = [], []
    for name, place in texts.place.items():
        language = rows["positive_lang" if name.startswith(LISTS) else "query_lang"]
        kind = texts.source.astype(np.int64) * languages + language
        named = place != NO_LABEL
        places.append(place[named])
        kinds.append(kind[texts.row[name][named]])
    kind_R = np.concatenate(kinds)
    named, first = np.unique(np.concatenate(places), return_index=True)
    kind_N = np.zeros(work.hashes.count, np.int64)
    kind_N[named] = kind_R[first]
    length = len(work.prompts) * languages
    counts = [
        np.bincount(kind_R, minlength=length),
        np.bincount(kind_N[new], minlength=length),
        np.bincount(kind_N[new], lengths, minlength=length).astype(np.int64),
    ]
    return [
        [
            work.prompts[kind // languages].source,
            work.languages[kind % languages],
            *(int(c[kind]) for c in counts),
        ]
        for kind in np.flatnonzero(counts[0]).tolist()
    ]
