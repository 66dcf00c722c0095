"""A teacher's vectors on disk: computed once for each distinct text, whichever run asks first.

A text is known by the hash (16 bytes of BLAKE2b) of what decides its vector: the token ids that the teacher reads, or
its UTF-8 where a server does the reading. So runs, stages and recipes share a cache as long as the teacher is the same,
and the teacher need not be in memory beside the student. Each process appends to segments of its own, a file of vectors
and one of keys; no two ever write to one file. A key is written after its vector is on disk, so a process that is
killed leaves at most vectors without keys behind, which nobody reads. Vectors are float16, or int8 with a scale for
each vector, and mapped into memory; of a text that is stored, 24 bytes are held.

Shape suffixes: N texts asked for, M texts that are added, K keys that are stored, S of a segment, D dims.
"""

import hashlib
import os
import uuid
from collections.abc import Sequence
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
SEGMENT = 1 << 20  # vectors of a segment; the keys of the one that is being written are held twice


class TeacherCache:
    """Vectors of one teacher by the content of texts, for one thread."""

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
        self._added: set[bytes] = set()  # keys of the segment that this process is writing

    def __len__(self) -> int:
        """Texts whose vectors are there."""
        return len(self._keys_K) + len(self._added)

    def missing(self, contents: Sequence[bytes]) -> list[int]:
        """Which of the texts are not there, each content once."""
        keys = _keys(contents)
        rows_N = self._find(keys)
        first = {key: n for n, key in reversed(list(enumerate(keys)))}
        return sorted(n for key, n in first.items() if rows_N[n] < 0 and key not in self._added)

    def add(self, contents: Sequence[bytes], vectors_MD: Vectors) -> None:
        """Keep the vectors of texts that are missing; on disk when this returns."""
        expected = (len(contents), self._record["vector"].shape[0])
        if vectors_MD.shape != expected:
            raise F2Error(
                f"the teacher gave vectors of shape {list(vectors_MD.shape)}, its cache {self._folder} expects "
                f"{list(expected)}; give a cache for this teacher."
            )
        if len(self._added) + len(contents) > SEGMENT:
            self._close()
        keys = _keys(contents)
        self._write(_encode(vectors_MD, self._record, self._folder), b"".join(keys))
        self._added.update(keys)

    def vectors(self, contents: Sequence[bytes]) -> Vectors:
        """float32 [N, D] of texts that are there, as the cache's precision gives them."""
        self._close()
        rows_N = self._find(_keys(contents))
        if (absent := int((rows_N < 0).sum())) > 0:
            raise F2Error(
                f"{self._folder} lacks the vectors of {absent} of {len(contents)} texts, expected those of the whole "
                "run; start the stage again, which computes what is missing."
            )
        out_ND = np.empty((len(contents), self._record["vector"].shape[0]), np.float32)
        segment_N = np.searchsorted(self._starts, rows_N, side="right") - 1
        for segment in np.unique(segment_N).tolist():
            here_N = segment_N == segment
            out_ND[here_N] = _decode(self._segments[segment][rows_N[here_N] - self._starts[segment]])
        return out_ND

    def _find(self, keys: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """Where each key is stored, or -1 [N]."""
        keys_N = np.frombuffer(b"".join(keys), KEY)
        if not len(self._keys_K):
            return np.full(len(keys_N), -1)
        # Numbers for the search, which is slow on records; two keys with the same 64 bits are not to be expected.
        places_N = np.searchsorted(self._keys_K["high"], keys_N["high"]).clip(max=len(self._keys_K) - 1)
        return np.where(self._keys_K[places_N] == keys_N, self._rows_K[places_N], -1)

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
            self._own, self._added = None, set()

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


def _keys(contents: Sequence[bytes]) -> list[bytes]:
    return [hashlib.blake2b(content, digest_size=KEY.itemsize).digest() for content in contents]


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
