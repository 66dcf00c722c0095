"""Words of texts in any script, and a hash of every run of words: what two texts share word by word.

folded texts -> words -> hashes of the runs (windows) that start at each of them. Letters, digits and marks in a row are
a word; punctuation, symbols and spaces only part them. Scripts that write no spaces have no words to see: an
ideograph, kana or Hangul syllable stands for itself and counts as half a word, a letter of Thai, Lao, Khmer, Burmese
and their like as a fifth. A run "of 13 words" is therefore 13 words, 26 ideographs or 65 letters of Thai, by its
first.

Shapes: T texts, C characters, W words of all texts.
"""

import unicodedata
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from f2llm.data.folded import CODE_POINTS, Hashes, Offsets, Rows, Texts, is_wide, mix

PARTING, LETTER, WIDE, UNSPACED = range(4)  # kinds of characters
PER_WORD = np.array([1, 1, 2, 5])  # so many of a kind stand for a word
# Thai and Lao, Burmese, Khmer, New Tai Lue and Tai Tham, Khmer and Burmese extensions, Tai Viet.
UNSPACED_SCRIPTS = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x1950, 0x1AAF),
    (0xA9E0, 0xA9FF),
    (0xAA60, 0xAADF),
)
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64


class Words(NamedTuple):
    """The words of texts; those of text t are `starts[t] : starts[t + 1]`, starts [T + 1]."""

    kinds_W: npt.NDArray[np.uint8]
    starts: Offsets
    sums: Hashes
    """Of word hashes times powers of BASE, before each word [W + 1]: any run's hash is a difference of two."""

    def long_enough(self, words: int) -> npt.NDArray[np.bool_]:
        """Which texts have so many words [T]."""
        counts = np.diff(self.starts)
        enough_T = counts > 0
        enough_T[enough_T] = counts[enough_T] >= words * PER_WORD[self.kinds_W[self.starts[:-1][enough_T]]]
        return enough_T

    def hash_runs(self, first: Rows, lengths: Rows) -> Hashes:
        """A hash of each of the runs that start at words `first` and have so many words."""
        hashes = (self.sums[first + lengths] - self.sums[first]) * powers(_INVERSE, len(self.sums))[first]
        hashes += lengths.astype(np.uint64)
        return mix(hashes)

    def windows(self, words: int) -> tuple[Hashes, Rows]:
        """The hash of every run of so many words within one text, and the word at which each starts."""
        ends = np.repeat(self.starts[1:], np.diff(self.starts))
        lengths = words * PER_WORD[self.kinds_W]
        first = np.flatnonzero(np.arange(len(lengths)) + lengths <= ends)
        return self.hash_runs(first, lengths[first]), first

    def text_of(self, words: Rows) -> Rows:
        """The texts that these words belong to."""
        return np.searchsorted(self.starts, words, side="right") - 1


_INVERSE = pow(BASE, -1, 1 << 64)


def split(texts: Texts) -> Words:
    kinds_C = kind_table()[texts.codes_C]
    begins_C = kinds_C != PARTING
    begins_C[1:] &= (kinds_C[1:] != LETTER) | (kinds_C[:-1] != LETTER)
    first = texts.starts[:-1][texts.lengths > 0]
    begins_C[first] = kinds_C[first] != PARTING
    begins_W = np.flatnonzero(begins_C)
    hashes_W = _hash_words(texts, kinds_C, begins_W)
    sums = np.zeros(len(begins_W) + 1, np.uint64)
    np.cumsum(hashes_W * powers(BASE, len(hashes_W))[: len(hashes_W)], out=sums[1:])
    return Words(kinds_C[begins_W], np.searchsorted(begins_W, texts.starts), sums)


def _hash_words(texts: Texts, kinds_C: npt.NDArray[np.uint8], begins_W: Rows) -> Hashes:
    if not len(begins_W):
        return np.empty(0, np.uint64)
    place_C = np.zeros(len(kinds_C), np.int64)
    place_C[begins_W] = begins_W
    np.maximum.accumulate(place_C, out=place_C)
    # What a character adds to its word depends on where in the word it stands.
    hashes_C = mix(
        texts.codes_C.astype(np.uint64)
        | (np.arange(len(kinds_C)) - place_C).astype(np.uint64) << np.uint64(32)
    )
    hashes_C[kinds_C == PARTING] = 0
    return mix(np.add.reduceat(hashes_C, begins_W))


def hash_texts(texts: Texts) -> Hashes:
    """A hash of each whole folded text [T]."""
    place_C = np.ones(len(texts.codes_C), np.int64)  # summed up: the place of a character in its text, from 1
    begin, lengths = texts.starts[:-1][texts.lengths > 0], texts.lengths[texts.lengths > 0]
    place_C[begin[1:]] -= lengths[:-1]
    np.cumsum(place_C, out=place_C)
    hashes_C = mix(texts.codes_C.astype(np.uint64) | place_C.astype(np.uint64) << np.uint64(32))
    hashes_T = texts.lengths.astype(np.uint64)
    if len(begin):
        hashes_T[texts.lengths > 0] += np.add.reduceat(hashes_C, begin)
    return mix(hashes_T)


_powers: dict[int, Hashes] = {}


def powers(base: int, count: int) -> Hashes:
    """base**0, base**1 ... modulo 2**64, at least `count` of them; kept, since every call needs the same."""
    if len(_powers.get(base, ())) < count:
        factors = np.full(1 << max(count - 1, 0).bit_length(), base, np.uint64)
        factors[:1] = 1
        _powers[base] = np.multiply.accumulate(factors)
    return _powers[base]


@cache
def kind_table() -> npt.NDArray[np.uint8]:
    """Code point -> kind of character."""
    table = np.zeros(CODE_POINTS, np.uint8)
    for code in range(0x20000):  # beyond are ideographs and what carries no text
        if unicodedata.category(chr(code))[0] in "LMN":
            table[code] = LETTER
    for first, last in UNSPACED_SCRIPTS:
        table[first : last + 1][table[first : last + 1] == LETTER] = UNSPACED
    wide = is_wide(np.arange(CODE_POINTS, dtype=np.uint32))
    wide[:0x20000] &= table[:0x20000] == LETTER
    table[wide] = WIDE
    return table
