"""Texts as one array of characters, folded so that spelling alone tells them apart.

strings of Arrow -> code points (UTF-32) -> simple case folding, every run of white space one space, none at the ends.
All that compares texts by what is written in them (exact and near duplicates, test texts in training data) starts
here, and goes on with numpy on whole arrays: no string of Python is made for a text.

Shapes: T texts, C characters of all of them.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Codes = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

SPACE = 0x20
CODE_POINTS = 0x110000
# Ideographs, kana and Yi, Hangul, their compatibility forms, and the planes of rarer ideographs.
WIDE = ((0x2E80, 0xA4CF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_LAST_CASED = 0x20000  # no code point from here on has case or is white space


class Texts(NamedTuple):
    """Folded texts one after the other; text t is `codes_C[starts[t] : starts[t + 1]]`, starts [T + 1]."""

    codes_C: Codes
    starts: Offsets

    @property
    def lengths(self) -> Offsets:
        """Characters of each text."""
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def slice(self, first: int, last: int) -> "Texts":
        """Texts `first` to `last`, the last left out."""
        starts = self.starts[first : last + 1]
        return Texts(self.codes_C[starts[0] : starts[-1]], starts - starts[0])

    def followed_by(self, others: "Texts") -> "Texts":
        codes_C = np.concatenate([self.codes_C, others.codes_C])
        return Texts(codes_C, np.concatenate([self.starts, others.starts[1:] + self.starts[-1]]))

    def take(self, texts_N: npt.NDArray[np.int64]) -> "Texts":
        """The texts of these numbers, in their order."""
        begin, end = self.starts[:-1][texts_N], self.starts[1:][texts_N]
        runs = [self.codes_C[b:e] for b, e in zip(begin.tolist(), end.tolist(), strict=True)]
        return Texts(np.concatenate([self.codes_C[:0], *runs]), starts_of(end - begin))

    def owners(self) -> Offsets:
        """The number of the text that each character belongs to [C]."""
        steps = np.zeros(self.starts[-1] + 1, np.int64)
        np.add.at(steps, self.starts[1:-1], 1)
        return np.cumsum(steps[:-1])

    def strings(self) -> list[str]:
        whole = self.codes_C.astype("<u4", copy=False).tobytes().decode("utf-32-le")
        return [whole[first:last] for first, last in zip(self.starts[:-1], self.starts[1:], strict=True)]


def fold(texts: pa.Array | pa.ChunkedArray) -> Texts:
    """The folded texts of a column of strings; a missing one is empty."""
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks() if texts.num_chunks != 1 else texts.chunk(0)
    texts = pc.fill_null(texts.cast(pa.large_string()), "")
    _, offsets, data = texts.buffers()
    used = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    written = bytes(data[used[0] : used[-1]]) if len(texts) and data is not None else b""
    lengths = pc.utf8_length(texts).to_numpy(zero_copy_only=False)
    return _collapse(from_utf8(written, lengths))


def from_utf8(data: bytes, lengths_T: npt.NDArray[np.integer]) -> Texts:
    """Texts that stand one after the other in `data`, with the characters of each; nothing is folded."""
    codes_C = np.frombuffer(data.decode().encode("utf-32-le"), "<u4").astype(np.uint32, copy=False)
    return Texts(codes_C, starts_of(lengths_T))


def starts_of(lengths: npt.NDArray[np.integer | np.bool_]) -> Offsets:
    """Where each of several runs of these lengths starts, and where the last ends."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _collapse(texts: Texts) -> Texts:
    folded = Texts(np.take(fold_table(), texts.codes_C), texts.starts)
    is_space_C = folded.codes_C == SPACE
    drop_C = np.zeros_like(is_space_C)
    drop_C[1:] = is_space_C[1:] & is_space_C[:-1]  # all of a run but its first
    first = folded.starts[:-1][folded.lengths > 0]
    drop_C[first] = is_space_C[first]
    folded = _without(folded, np.flatnonzero(drop_C))
    last = folded.starts[1:][folded.lengths > 0] - 1
    return _without(folded, last[folded.codes_C[last] == SPACE])


def _without(texts: Texts, characters: npt.NDArray[np.int64]) -> Texts:
    """The texts without the characters at these places, which are sorted."""
    if not len(characters):
        return texts
    starts = texts.starts - np.searchsorted(characters, texts.starts)
    return Texts(np.delete(texts.codes_C, characters), starts)


@cache
def fold_table() -> Codes:
    """Code point -> its simple case folding (one character for one); white space of every kind -> a space."""
    table = np.arange(CODE_POINTS, dtype=np.uint32)
    for code in range(_LAST_CASED):
        character = chr(code)
        folded = character.casefold() if len(character.casefold()) == 1 else character.lower()
        if character.isspace():
            table[code] = SPACE
        elif len(folded) == 1:
            table[code] = ord(folded)
    return table


def is_wide(codes_C: Codes) -> npt.NDArray[np.bool_]:
    """Which characters are a syllable or a word each [C]."""
    wide_C = np.zeros(len(codes_C), bool)
    if len(codes_C) and codes_C.max() >= WIDE[0][0]:
        for first, last in WIDE:
            wide_C |= codes_C - np.uint32(first) <= last - first  # below `first` it wraps around
    return wide_C


def mix(values: Hashes) -> Hashes:
    """The finaliser of MurmurHash3 for 64 bits (Appleby): a permutation in which each bit depends on all; in place."""
    for constant in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values ^= values >> np.uint64(33)
        values *= np.uint64(constant)
    values ^= values >> np.uint64(33)
    return values
