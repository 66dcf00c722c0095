"""Rows that repeat an earlier row: exactly, or but for small edits, across all sources.

A row of retrieval repeats another where both its query and its first positive do; a row with a label where its text
does and the label is the same. Exactly: when folded (`f2llm.data.folded`). Nearly: the Jaccard similarity of the
shingles of each text is above the threshold (`f2llm.data.minhash`). What repeats a row that repeats a row belongs to
the same cluster, and the first row of each cluster is the one to keep: put first what is to be preferred.

parts -> digests, keys and folded texts in files (anywhere, resumable) -> pairs of rows that share a key, band by band
-> those that are near, by exact comparison -> clusters -> for each row the one that it repeats. Only arrays of a few
bytes a row are held in memory, and pairs already in one cluster are not compared again.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from f2llm.data import minhash
from f2llm.data.folded import Hashes, Rows, Texts, fold, from_utf8, mix, starts_of
from f2llm.data.parts import Part, parts, read_part
from f2llm.engine import map_items
from f2llm.errors import F2Error
from f2llm.files import atomic_write, read_json, write_json

REPEATS = "repeats.npy"  # int64 [rows]: the number of the row that a row repeats, or -1
REASONS = "reasons.npy"  # int8 [rows]: index into REASON_NAMES
REASON_NAMES = (None, "exact duplicate", "near duplicate")
MADE_OF = "made_of.json"
SPILLED = "pairs"

SLICE = 1 << 12  # rows signed at a time
GROUP_ROWS = 1 << 20  # rows whose keys are sorted at a time
NEIGHBOURS = 2  # each row is compared with so many before it of the same key, and with the first
PAIRS = 1 << 12  # compared at a time
ROWS_OF_FILE = 1 << 19  # rows whose pairs with later ones are in one file until they are compared
# Bands whose pairs are compared together. What the first bring together is not compared again by the others.
ROUNDS = (slice(0, 2), slice(2, None))


def find_duplicates(folders: Sequence[Path], work: Path, threshold: float = 0.8) -> dict[str, int]:
    """Write REPEATS and REASONS of the rows of `folders`, numbered in order, into the folder `work`.

    Goes on where an earlier call in the same folder was stopped. The result depends on the rows and their order alone.

    Args:
        threshold: of Jaccard similarity, above which texts are near.

    Returns:
        Rows, and how many of them are exact and near duplicates.
    """
    found = [part for folder in folders for part in parts(folder)]
    starts = starts_of(np.array([part.rows for part in found], np.int64))
    if starts[-1] > 1 << 32:
        raise F2Error(f"{starts[-1]} rows are more than 2**32; find duplicates in fewer sources at a time.")
    _claim(work, {"parts": [list(part) for part in found], "threshold": threshold})
    bands = minhash.plan(threshold)
    items = [_Signing(number, part, work, bands) for number, part in enumerate(found)]
    for _ in map_items(_sign, items, what="sign rows"):
        pass
    exact = _exact(work, len(found))
    first = _near(work, starts, bands.bands, threshold, exact)[exact]
    rows = np.arange(len(first))
    reasons = np.where(first == rows, 0, np.where(exact != rows, 1, 2)).astype(np.int8)
    _save(work / REPEATS, np.where(first == rows, -1, first))
    _save(work / REASONS, reasons)
    return {"rows": len(rows), "exact": int((reasons == 1).sum()), "near": int((reasons == 2).sum())}


def duplicate_reasons(work: Path, first: int, rows: int) -> pa.Array:
    """Why each of `rows` rows from number `first` on is to go (REASON_NAMES); null where it stays."""
    reasons = np.load(work / REASONS, mmap_mode="r")[first : first + rows]
    return pa.array(REASON_NAMES, pa.string()).take(pa.array(reasons))


def _claim(work: Path, made_of: dict[str, Any]) -> None:
    if (work / MADE_OF).exists() and read_json(work / MADE_OF) != made_of:
        raise F2Error(f"{work} is of other rows or of another threshold; give an empty folder.")
    write_json(work / MADE_OF, made_of)


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    with atomic_write(path) as file:
        np.save(file, array)


# Of a part of R rows: DIGESTS [2, R]; KEYS [B, R]; the folded texts of each field in UTF-8; and, written last, STARTS
# [FIELDS, 2, R + 1], where in these each begins, in bytes and in characters.
DIGESTS, KEYS, STARTS = "digests.npy", "keys.npy", "starts.npy"
TEXTS = ("queries.txt", "positives.txt")


def _at(work: Path, part: int) -> Path:
    return work / "parts" / f"{part:05}"


@dataclass(frozen=True)
class _Signing:
    number: int
    part: Part
    work: Path
    plan: minhash.Plan


class _Signed(NamedTuple):
    """What is kept of some rows."""

    digests_2R: Hashes
    keys_BR: Hashes
    texts: tuple[list[bytes], list[bytes]]
    lengths_FR: Rows
    """Characters."""


def _sign(item: _Signing) -> None:
    folder = _at(item.work, item.number)
    if (folder / STARTS).exists():
        return
    table = read_part(item.part, ["query", "positives", "label"])
    signed = [_sign_rows(table.slice(at, SLICE), item.plan) for at in range(0, max(len(table), 1), SLICE)]
    _save(folder / DIGESTS, np.concatenate([some.digests_2R for some in signed], axis=1))
    _save(folder / KEYS, np.concatenate([some.keys_BR for some in signed], axis=1))
    lengths_FR = np.concatenate([some.lengths_FR for some in signed], axis=1)
    starts = []
    for field, name in enumerate(TEXTS):
        texts = [text for some in signed for text in some.texts[field]]
        with atomic_write(folder / name) as file:
            file.write(b"".join(texts))
        starts.append([starts_of(np.array([*map(len, texts)], np.int64)), starts_of(lengths_FR[field])])
    _save(folder / STARTS, np.array(starts))


def _sign_rows(table: pa.Table, plan: minhash.Plan) -> _Signed:
    query, positive, label = _columns(table)
    salts_R = _salts(positive, label)
    queries, positives = fold(query), fold(positive)
    # A row with a label has one text, which brings both shares of each key.
    rows = np.arange(len(table))
    second = queries.followed_by(positives).take(rows + len(rows) * positive.is_valid().to_numpy(False))
    keys_BR = minhash.keys([queries, second], plan)
    keys_BR += salts_R
    texts = [text.encode() for text in queries.strings()], [text.encode() for text in positives.strings()]
    lengths_FR = np.stack([queries.lengths, positives.lengths])
    return _Signed(_digests(*texts, salts_R), mix(keys_BR), texts, lengths_FR)


def _columns(rows: pa.Table) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Query, first positive or null, label."""
    query, positives, label = (rows[name].combine_chunks() for name in ("query", "positives", "label"))
    offsets = positives.offsets.to_numpy()
    none = offsets[1:] == offsets[:-1]
    return query, positives.values.take(pa.array(offsets[:-1], mask=none)), label


def _salts(positive: pa.Array, label: pa.Array) -> Hashes:
    """0 for a row with a positive; else a hash of the label, so that rows of different labels never meet [R]."""
    encoded = pc.dictionary_encode(pc.fill_null(label, ""))
    hashes = [_hash(value.encode())[0] for value in encoded.dictionary.to_pylist()]
    salts_R = (
        np.array(hashes, np.uint64)[encoded.indices.to_numpy()] if len(label) else np.empty(0, np.uint64)
    )
    salts_R[pc.is_valid(positive).to_numpy(zero_copy_only=False)] = 0
    return salts_R


def _hash(data: bytes) -> npt.NDArray[np.uint64]:
    """128 bits as two words."""
    return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), "<u8")


def _digests(queries: list[bytes], positives: list[bytes], salts_R: Hashes) -> Hashes:
    """128 bits of all that an exact duplicate shares, as two words [2, R]."""
    # No folded text holds a line break.
    joined = (b"\n".join(row) for row in zip(queries, positives, map(bytes, salts_R[:, None]), strict=True))
    return np.array([_hash(row) for row in joined], np.uint64).reshape(-1, 2).T


def _of_all(work: Path, count: int, name: str, which: int) -> Hashes:
    """Line `which` of the arrays `name` of all parts, one after the other [rows]."""
    lines = [np.load(_at(work, part) / name, mmap_mode="r")[which] for part in range(count)]
    return np.concatenate(lines) if lines else np.empty(0, np.uint64)


def _groups(keys_R: Hashes) -> Iterator[tuple[Rows, Rows]]:
    """Rows so that those of equal keys stand together in their order, and the place where the group of each begins.

    Keys are sorted GROUP_ROWS or so at a time, each in one word with its row's place among them. About 40 bits of the
    key are left in it, so rows of different keys may stand together, rarely.
    """
    splits = max(len(keys_R) - 1, 0) // GROUP_ROWS
    bits = splits.bit_length()
    for split in range(1 << bits):
        rows = np.flatnonzero(keys_R >> np.uint64(64 - bits) == split) if bits else np.arange(len(keys_R))
        low = np.uint64((1 << len(rows).bit_length()) - 1)
        packed = (keys_R[rows] << np.uint64(bits)) & ~low | np.arange(len(rows), dtype=np.uint64)
        packed.sort()
        key = packed & ~low
        begins = np.ones(len(rows), bool)
        begins[1:] = key[1:] != key[:-1]
        begin = np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))
        yield rows[(packed & low).astype(np.int64)], begin


def _exact(work: Path, count: int) -> Rows:
    """For each row the first row with the same digest [rows]."""
    digests = [_of_all(work, count, DIGESTS, word) for word in (0, 1)]
    first = np.arange(len(digests[0]))
    for rows, begin in _groups(digests[0]):
        firsts = rows[begin]
        same = (digests[0][rows] == digests[0][firsts]) & (digests[1][rows] == digests[1][firsts])
        first[rows[same]] = firsts[same]
    return first


def _near(work: Path, starts: Rows, bands: int, threshold: float, exact: Rows) -> Rows:
    """For each row the first of its cluster [rows]; exact duplicates stand alone."""
    first = np.arange(len(exact))
    unique = np.flatnonzero(exact == first)
    compare = partial(_compare, work, starts, threshold)
    for some in ROUNDS:
        keys = (_of_all(work, len(starts) - 1, KEYS, band) for band in range(bands)[some])
        chunks = _spill(
            (pairs for keys_R in keys for pairs in _pairs(keys_R, unique, first)), len(first), work
        )
        near = list(map_items(compare, chunks, what="compare rows", unit="chunk"))
        if near:
            _unite(first, *_rows_of(np.concatenate(near)))
    shutil.rmtree(work / SPILLED, ignore_errors=True)
    return first


class _Chunk(NamedTuple):
    """Some of the pairs in a file."""

    path: Path
    first: int
    length: int


def _spill(found: Iterable[Hashes], rows: int, work: Path) -> list[_Chunk]:
    """Put pairs on disk, each once, in their order: memory holds those whose first rows are neighbours."""
    folder = work / SPILLED
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    begins = np.arange(0, max(rows, 1), ROWS_OF_FILE, dtype=np.uint64) << np.uint64(32)
    paths = [folder / f"{number:05}" for number in range(len(begins))]
    for pairs in found:
        pairs.sort()
        for path, own in zip(paths, np.split(pairs, np.searchsorted(pairs, begins[1:])), strict=True):
            with open(path, "ab") as file:
                own.tofile(file)
    chunks = []
    for path in filter(Path.exists, paths):
        pairs = np.unique(np.fromfile(path, np.uint64))
        pairs.tofile(path)
        starts = range(0, len(pairs), PAIRS)
        chunks += [_Chunk(path, start, min(PAIRS, len(pairs) - start)) for start in starts]
    return chunks


def _pairs(keys_R: Hashes, unique: Rows, first: Rows) -> Iterator[Hashes]:
    """Pairs of the rows `unique` that share a key and are not in one cluster yet: row << 32 | later row."""
    for places, begin in _groups(keys_R[unique]):
        rows = unique[places]
        place = np.arange(len(rows))
        # With those just before it, and with the first of the group where that is farther off.
        for back in range(1, NEIGHBOURS + 2):
            earlier = place - back if back <= NEIGHBOURS else np.where(place - NEIGHBOURS > begin, begin, -1)
            later = np.flatnonzero(earlier >= begin)
            one, other = rows[earlier[later]], rows[later]
            apart = first[one] != first[other]
            yield (one[apart] << 32 | other[apart]).view(np.uint64)


def _rows_of(pairs: Hashes) -> tuple[Rows, Rows]:
    return (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _compare(work: Path, starts: Rows, threshold: float, chunk: _Chunk) -> Hashes:
    """Those of the pairs that are near in every field."""
    path, begin, length = chunk
    pairs = np.fromfile(path, np.uint64, length, offset=begin * np.dtype(np.uint64).itemsize)
    for field in range(len(TEXTS)):
        rows, places = np.unique(np.concatenate(_rows_of(pairs)), return_inverse=True)
        texts = minhash.hashed(_read_texts(work, starts, field, rows))
        one, other = places[: len(pairs)], places[len(pairs) :]
        pairs = pairs[minhash.jaccard(texts.take(one), texts.take(other)) > threshold]
    return pairs


def _read_texts(work: Path, starts: Rows, field: int, rows: Rows) -> Texts:
    """One field of these rows, which are sorted. Read, not mapped: pages of a map would count as this process's."""
    part_of = np.searchsorted(starts, rows, side="right") - 1
    data, lengths = [], []
    for part in np.unique(part_of).tolist():
        texts = rows[part_of == part] - starts[part]
        at = np.load(_at(work, part) / STARTS, mmap_mode="r")[field]
        (begin, begin_C), (end, end_C) = at[:, texts], at[:, texts + 1]
        lengths.append(end_C - begin_C)
        with open(_at(work, part) / TEXTS[field], "rb") as file:
            handle = file.fileno()
            data += [os.pread(handle, e - b, b) for b, e in zip(begin.tolist(), end.tolist(), strict=True)]
    return from_utf8(b"".join(data), np.concatenate(lengths) if lengths else np.empty(0, np.int64))


def _unite(first: Rows, one: Rows, other: Rows) -> None:
    """Join the clusters of rows `one` and `other` in `first` (each row -> the first of its cluster), in place."""
    while True:
        low, high = np.minimum(first[one], first[other]), np.maximum(first[one], first[other])
        if (low == high).all():
            return
        np.minimum.at(first, high, low)
        while not np.array_equal(shorter := first[first], first):
            first[:] = shorter
