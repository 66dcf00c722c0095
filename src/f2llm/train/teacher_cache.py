"""A teacher's vectors on disk: computed once for each distinct text, whichever run asks first.

A text is known by its hash (16 bytes of BLAKE2b over its UTF-8), so runs, stages and recipes share a cache as long as
the teacher is the same, and the teacher need not be in memory beside the student. Each process appends to segments of
its own, a file of vectors and one of keys; no two ever write to one file. A key is written after its vector is on
disk, so a process that is killed leaves at most vectors without keys behind, which nobody reads. Vectors are float16,
or int8 with a scale for each vector, and mapped into memory; of a text that is stored, 24 bytes are held.

Shape suffixes: N texts asked for, M texts that are missing, K keys that are stored, D dims.
"""

import hashlib
import os
import uuid
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from f2llm.errors import F2Error
from f2llm.files import read_object, sync_folder, write_json

Precision = Literal["float16", "int8"]
Vectors = npt.NDArray[np.float32]
Records = npt.NDArray[np.void]

VERSION = 1
ABOUT = "cache.json"
KEY = np.dtype([("high", ">u8"), ("low", ">u8")])
SEGMENT = 1 << 16  # vectors of a segment; those of the last one are in memory until it is full


class TeacherCache:
    """Vectors of one teacher by text, for one thread."""

    def __init__(self, folder: Path, teacher: str, width: int, precision: Precision = "float16") -> None:
        """Open a cache, or begin one.

        Args:
            teacher: its identity: what its vectors depend on.
            width: of its vectors.

        Raises:
            F2Error: the folder is the cache of another teacher, width or precision, or damaged.
        """
        self._folder, self._record = folder, _record(width, precision)
        _claim(folder, {"version": VERSION, "teacher": teacher, "width": width, "precision": precision})
        self._keys_K = np.empty(0, KEY)  # sorted
        self._rows_K = np.empty(0, np.int64)
        self._segments: list[Records] = []
        self._starts: list[int] = []  # of segments, in rows
        for keys_file in sorted(folder.glob("*.keys")):
            self._add_segment(keys_file)
        self._own: tuple[IO[bytes], IO[bytes]] | None = None
        self._fresh: dict[bytes, Vectors] = {}  # what this process's open segment holds

    def __len__(self) -> int:
        """Texts whose vectors are there."""
        return len(self._keys_K) + len(self._fresh)

    def vectors(self, texts: Sequence[str], compute: Callable[[list[str]], Vectors]) -> Vectors:
        """float32 [N, D] of the texts, as the cache's precision gives them; what is missing is computed and kept.

        Args:
            compute: float [M, D] of M distinct texts.
        """
        keys = [hashlib.blake2b(text.encode(), digest_size=KEY.itemsize).digest() for text in texts]
        rows_N = self._find(np.frombuffer(b"".join(keys), KEY))
        missing = {
            key: text
            for key, text, row in zip(keys, texts, rows_N.tolist(), strict=True)
            if row < 0 and key not in self._fresh
        }
        fresh = self._fresh | (self._append(missing, compute(list(missing.values()))) if missing else {})
        out_ND = np.empty((len(texts), self._record["vector"].shape[0]), np.float32)
        for place, row in enumerate(rows_N.tolist()):
            out_ND[place] = fresh[keys[place]] if row < 0 else self._stored(row)
        return out_ND

    def _find(self, keys_N: Records) -> npt.NDArray[np.int64]:
        """Where each key is stored, or -1 [N]."""
        if not len(self._keys_K):
            return np.full(len(keys_N), -1)
        # Numbers for the search, which is slow on records; two keys with the same 64 bits are not to be expected.
        places_N = np.searchsorted(self._keys_K["high"], keys_N["high"]).clip(max=len(self._keys_K) - 1)
        return np.where(self._keys_K[places_N] == keys_N, self._rows_K[places_N], -1)

    def _stored(self, row: int) -> Vectors:
        segment = bisect_right(self._starts, row) - 1
        row -= self._starts[segment]
        return _decode(self._segments[segment][row : row + 1])[0]

    def _append(self, missing: dict[bytes, str], vectors_MD: Vectors) -> dict[bytes, Vectors]:
        """Keep the vectors of texts, by their keys; returns them as they will be read again."""
        expected = (len(missing), self._record["vector"].shape[0])
        if vectors_MD.shape != expected:
            raise F2Error(
                f"the teacher gave vectors of shape {list(vectors_MD.shape)}, its cache {self._folder} expects "
                f"{list(expected)}; give a cache for this teacher."
            )
        kept: dict[bytes, Vectors] = {}
        keys = list(missing)
        for at in range(0, len(keys), SEGMENT):
            records = _encode(vectors_MD[at : at + SEGMENT], self._record, self._folder)
            if len(self._fresh) + len(records) > SEGMENT:
                self._close()
            new = dict(zip(keys[at : at + SEGMENT], _decode(records), strict=True))
            self._write(records, b"".join(new))
            self._fresh |= new
            kept |= new
        return kept

    def _write(self, records: Records, keys: bytes) -> None:
        if self._own is None:
            stem = self._folder / uuid.uuid4().hex
            self._own = (stem.with_suffix(".vectors").open("xb"), stem.with_suffix(".keys").open("xb"))
            sync_folder(self._folder)
        for file, data in zip(self._own, (records.tobytes(), keys), strict=True):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _close(self) -> None:
        """Read this process's segment like any other from now on."""
        if self._own:
            for file in self._own:
                file.close()
            self._add_segment(Path(self._own[1].name))
            self._own, self._fresh = None, {}

    def _add_segment(self, keys_file: Path) -> None:
        keys_S = np.frombuffer(keys_file.read_bytes(), np.uint8)
        keys_S = keys_S[: len(keys_S) // KEY.itemsize * KEY.itemsize].view(KEY)
        vectors_file = keys_file.with_suffix(".vectors")
        size = vectors_file.stat().st_size if vectors_file.exists() else 0
        if size < len(keys_S) * self._record.itemsize:
            raise F2Error(
                f"{vectors_file} has {size} bytes, its {len(keys_S)} keys call for "
                f"{len(keys_S) * self._record.itemsize}; remove it and its .keys file: they are computed again."
            )
        if not len(keys_S):
            return
        rows_S = len(self._rows_K) + np.arange(len(keys_S))
        self._starts.append(len(self._rows_K))
        self._segments.append(np.memmap(vectors_file, self._record, "r", shape=(len(keys_S),)))
        keys_K, rows_K = np.concatenate([self._keys_K, keys_S]), np.concatenate([self._rows_K, rows_S])
        order_K = np.argsort(keys_K["high"], kind="stable")
        self._keys_K, self._rows_K = keys_K[order_K], rows_K[order_K]


def _claim(folder: Path, about: dict[str, Any]) -> None:
    if not (folder / ABOUT).exists():
        write_json(folder / ABOUT, about)
    found = read_object(folder / ABOUT)
    for name, expected in about.items():
        if found.get(name) != expected:
            raise F2Error(
                f"{folder} is a cache of {name} {found.get(name)!r}, expected {expected!r}; give another folder."
            )


def _record(width: int, precision: Precision) -> np.dtype[np.void]:
    vector = ("vector", "<f2" if precision == "float16" else "i1", (width,))
    return np.dtype([vector] if precision == "float16" else [vector, ("scale", "<f4")])


def _encode(vectors_MD: Vectors, record: np.dtype[np.void], folder: Path) -> Records:
    records = np.empty(len(vectors_MD), record)
    if record.names == ("vector",):
        with np.errstate(over="ignore"):
            records["vector"] = vectors_MD
        if not np.isfinite(records["vector"]).all():
            raise F2Error(
                f"a number of the teacher does not fit into float16, as which {folder} keeps it; begin a cache of "
                "int8."
            )
        return records
    largest_M = np.abs(vectors_MD).max(axis=1, initial=0)
    records["scale"] = np.where(largest_M > 0, largest_M, 1) / 127
    records["vector"] = np.rint(vectors_MD / records["scale"][:, None])
    return records


def _decode(records: Records) -> Vectors:
    vectors: Vectors = records["vector"].astype(np.float32)
    return vectors if records.dtype.names == ("vector",) else vectors * records["scale"][:, None]
