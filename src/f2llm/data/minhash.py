"""MinHash: which of many texts are nearly the same, without comparing each with each.

folded texts -> shingles (short runs of characters), hashed -> the least of them under each of K permutations -> keys:
texts that share a key of any band are candidates -> exact Jaccard similarity of their sets of shingles decides.

Broder (1997), On the resemblance and containment of documents; Leskovec, Rajaraman and Ullman (2020), Mining of
Massive Datasets, 3.4, for the bands. A permutation is a multiplication by an odd number modulo 2**32, so that one
block of shingles that stays in the cache meets all K of them at memory speed.

Shapes: T texts, C shingles of all of them (one at each character), K permutations, B bands.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from f2llm.data.folded import Codes, Hashes, Offsets, Texts, is_wide, mix
from f2llm.rng import generator

SHINGLE = 5  # characters of an alphabet
WIDE_SHINGLE = 2  # characters that are a syllable or a word each
MISSED = 0.02  # share of pairs exactly at the threshold that no band brings together; above it, fewer
MOST_ROWS = 6
MOST_BANDS = 16
BLOCK = 1 << 16  # shingles at a time: they and their products fit into a core's cache
EMPTY = np.uint32(0xFFFFFFFF)  # the least shingle of a text without any


class Plan(NamedTuple):
    """Two texts of similarity s share a key with probability 1 - (1 - s**rows)**bands."""

    bands: int
    rows: int


def plan(threshold: float) -> Plan:
    """The bands that miss few pairs at `threshold`, with as many rows (so few false candidates) as can be had."""
    for rows in range(MOST_ROWS, 2, -2):
        bands = math.ceil(math.log(MISSED) / math.log1p(-(threshold**rows)))
        if bands <= MOST_BANDS:
            return Plan(bands, rows)
    return Plan(math.ceil(math.log(MISSED) / math.log1p(-(threshold**2))), 2)


def shingles(texts: Texts) -> Codes:
    """A 32-bit hash of the shingle at each character [C].

    It has the 5 characters from there on, or 2 where the first is an ideograph, kana or Hangul syllable, which says
    as much as several letters: so an edit in a sentence weighs about the same in every script. Past the end of its
    text a shingle is filled up with zeros, so a text of any length has as many as characters.
    """
    codes_C = texts.codes_C
    lengths_T, ends = texts.lengths, texts.starts[1:]
    wide = np.flatnonzero(is_wide(codes_C))
    hashes_C = codes_C.copy()
    shifted_C = np.empty_like(codes_C)
    past_end = np.empty(0, np.int64)
    for shift in range(1, SHINGLE):
        shifted_C[:-shift] = codes_C[shift:]
        past_end = np.concatenate([past_end, (ends - shift)[lengths_T >= shift]])
        shifted_C[past_end] = 0
        if shift >= WIDE_SHINGLE:
            shifted_C[wide] = 0
        hashes_C *= np.uint32(0x9E3779B1)
        hashes_C += shifted_C
    for constant, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):  # MurmurHash3's finaliser for 32 bits
        hashes_C ^= hashes_C >> np.uint32(shift)
        hashes_C *= np.uint32(constant)
    hashes_C ^= hashes_C >> np.uint32(16)
    return hashes_C


def keys(fields: Sequence[Texts], plan: Plan) -> Hashes:
    """The band keys of T things with one or more texts each: fields of T texts -> [B, T].

    Each field brings its share of a band's rows, so that things meet where all their texts are near: a thousand
    questions about one passage are not candidates for one another.
    """
    count = plan.rows // len(fields)
    keys_BT = np.zeros((plan.bands, len(fields[0])), np.uint64)
    for number, texts in enumerate(fields):
        multipliers_K = _multipliers(number, plan.bands * count)
        for first, last in blocks(texts.starts, BLOCK):
            minima_KT = _minima(texts.slice(first, last), multipliers_K)
            for band in range(plan.bands):
                key_T = keys_BT[band, first:last]
                for minimum_T in minima_KT[band * count : (band + 1) * count]:
                    key_T += minimum_T
                    mix(key_T)
    return keys_BT


@cache
def _multipliers(field: int, count: int) -> Codes:
    return generator(0, "minhash", field).integers(1 << 31, size=count, dtype=np.uint32) * np.uint32(
        2
    ) + np.uint32(1)


def _minima(texts: Texts, multipliers_K: Codes) -> Codes:
    """The least shingle of each text under each permutation [K, T]."""
    hashes_C = shingles(texts)
    has_any = texts.lengths > 0
    starts = texts.starts[:-1][has_any]
    minima_KT = np.full((len(multipliers_K), len(texts)), EMPTY)
    product_C = np.empty_like(hashes_C)
    if len(starts):
        for minimum_T, multiplier in zip(minima_KT, multipliers_K, strict=True):
            np.multiply(hashes_C, multiplier, out=product_C)
            minimum_T[has_any] = np.minimum.reduceat(product_C, starts)
    return minima_KT


def blocks(starts: Offsets, characters: int) -> Iterator[tuple[int, int]]:
    """Runs of texts (first, one after the last) of at most so many characters; a longer text is a run of its own."""
    first = 0
    while first < len(starts) - 1:
        last = int(np.searchsorted(starts, starts[first] + characters, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def jaccard(left: Texts, right: Texts) -> npt.NDArray[np.float64]:
    """Of text t on the left and text t on the right: shingles in both / shingles in either [T]; 1 if both are empty.

    Both come with their shingles (`hashed`) in place of their characters.
    """
    cuts = blocks(left.starts + right.starts, BLOCK // 2)
    parts = [_jaccard(left.slice(*cut), right.slice(*cut)) for cut in cuts]
    return np.concatenate(parts) if parts else np.empty(0)


def hashed(texts: Texts) -> Texts:
    return Texts(shingles(texts), texts.starts)


def _jaccard(left: Texts, right: Texts) -> npt.NDArray[np.float64]:
    # One sort puts equal shingles of a pair side by side.
    marks_C = np.concatenate([_marks(left, side=0), _marks(right, side=1)])
    marks_C.sort()
    # A shingle in both is where the side alone changes, for its copies on one side are one and the same mark.
    steps_C = marks_C.copy()
    steps_C[1:] ^= marks_C[:-1]
    steps_C[:1] = 2  # the very first mark begins a shingle like any that differs from the one before it
    starts = left.starts + right.starts
    has_any = np.diff(starts) > 0
    similarity_T = np.ones(len(left))
    if has_any.any():
        both, either = (
            np.add.reduceat(counted_C.view(np.int8), starts[:-1][has_any], dtype=np.int32)
            for counted_C in (steps_C == 1, steps_C > 1)
        )
        similarity_T[has_any] = both / either
    return similarity_T


def _marks(texts: Texts, side: int) -> Hashes:
    """Pair | shingle | side, in one word for each shingle [C]."""
    marks_C = texts.codes_C.astype(np.uint64)
    marks_C <<= np.uint64(1)
    marks_C |= np.uint64(side)
    marks_C |= texts.owners().view(np.uint64) << np.uint64(33)
    return marks_C
