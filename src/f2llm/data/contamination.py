"""Which texts hold, or nearly hold, a test text: four ways to see it, all by hashes that are looked up.

exact          the folded texts are equal
containment    all words of one stand in a row in the other
n-gram         a run of so many words stands in both
near duplicate the Jaccard similarity of their shingles is above a threshold

test texts -> shards of tables on disk, each of bounded size and made once; texts to judge -> their hashes -> looked up
in one shard after the other. The tables are mapped, so that workers share them and memory does not grow with the
tests. A hit by containment or as a near duplicate is confirmed on the words or shingles themselves.

A text takes part only if it is long enough for the method (see `Limits`): "yes" stands in many texts that have
nothing to do with a test.

Shapes: T texts to judge, W their words, S test texts of a shard, N things looked up, M matches.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from f2llm.data import minhash, words
from f2llm.data.folded import Hashes, Rows, Texts, fold, mix, starts_of
from f2llm.data.held_out import Batch
from f2llm.data.words import Words
from f2llm.files import atomic_write, read_json, write_json
from f2llm.recipe_corpus import CONTAMINATIONS, Limits

METHODS = CONTAMINATIONS
SHARD_CHARACTERS = 1 << 24
MATCHES = 1 << 20  # of hashes, held at a time
SHARD_FILE = "shard.json"  # written last: the test set of each text, and their lengths


class Table(NamedTuple):
    """Hashes -> numbers; equal hashes may stand for several."""

    keys: Hashes  # sorted
    values: Rows
    sieve: npt.NDArray[np.bool_]  # by the first bits of a hash: whether any key has them

    @classmethod
    def of(cls, keys: Hashes, values: Rows) -> "Table":
        order = np.lexsort((values, keys))
        bits = max((len(keys) * 8).bit_length(), 1)
        sieve = np.zeros(1 << bits, bool)
        sieve[(keys >> np.uint64(64 - bits)).astype(np.int64)] = True
        return cls(keys[order], values[order], sieve)

    def find(self, hashes: Hashes) -> Iterator[tuple[Rows, Rows]]:
        """All matches, the place in `hashes` and the value [M, M], in the order of these, about MATCHES at a time."""
        shift = np.uint64(64 - (len(self.sieve).bit_length() - 1))
        places = np.flatnonzero(self.sieve[(hashes >> shift).astype(np.int64)])
        left = np.searchsorted(self.keys, hashes[places], side="left")
        counts = np.searchsorted(self.keys, hashes[places], side="right") - left
        for first, last in minhash.blocks(starts_of(counts), MATCHES):
            some = counts[first:last]
            within = np.arange(some.sum()) - np.repeat(np.cumsum(some) - some, some)
            yield np.repeat(places[first:last], some), self.values[np.repeat(left[first:last], some) + within]


@dataclass(frozen=True)
class Marks:
    """The hashes of texts, each kind made when it is first asked for: what tables are made of and what is looked up.

    Each is hashes and, of each, the text that it is of, or the word at which it starts.
    """

    texts: Texts
    limits: Limits

    @cached_property
    def words(self) -> Words:
        return words.split(self.texts)

    @cached_property
    def whole(self) -> tuple[Hashes, Rows]:
        """Of whole texts that are long enough."""
        return words.hash_texts(self.texts)[self._long], self._long

    @cached_property
    def heads(self) -> tuple[Hashes, Rows]:
        """Of the first `contained_words` words of the texts that have as many."""
        long = np.flatnonzero(self.words.long_enough(self.limits.contained_words))
        first = self.words.starts[:-1][long]
        lengths = self.limits.contained_words * words.PER_WORD[self.words.kinds_W[first]]
        return self.words.hash_runs(first, lengths), long

    @cached_property
    def runs(self) -> tuple[Hashes, Rows]:
        """Of every run of `contained_words` words; the word at which it starts."""
        return self.words.windows(self.limits.contained_words)

    @cached_property
    def ngrams(self) -> tuple[Hashes, Rows]:
        """Of every run of `ngram_words` words."""
        hashes, words_at = self.words.windows(self.limits.ngram_words)
        return hashes, self.words.text_of(words_at)

    @cached_property
    def bands(self) -> tuple[Hashes, Rows]:
        """The keys of texts that are long enough, all of a text one after the other."""
        keys_BT = minhash.keys([self.texts.take(self._long)], minhash.plan(self.limits.threshold))
        keys_BT += np.arange(len(keys_BT), dtype=np.uint64)[:, None]  # a key is of its band alone
        return mix(keys_BT.T.ravel()), np.repeat(self._long, len(keys_BT))

    @cached_property
    def _long(self) -> Rows:
        return np.flatnonzero(self.words.long_enough(self.limits.exact_words))


class Shard(NamedTuple):
    """Some test texts and the tables to find them by."""

    texts: Texts
    words: Words
    whole: Table  # hash of a text long enough -> the first such text
    heads: Table  # hash of the first `contained_words` words -> text
    runs: Table  # hash of any such run -> word at which it starts
    ngrams: Table  # hash of a run of `ngram_words` -> the first text with it
    bands: Table  # key of any band of a text long enough -> text
    sets: list[str]  # the test set of each text [S]


_PARTS: dict[str, Any] = {"texts": Texts, "words": Words} | dict.fromkeys(
    ("whole", "heads", "runs", "ngrams", "bands"), Table
)


class Hits(NamedTuple):
    """What was found of each text: the number of the first method that hit (or of none), and by which test text."""

    methods_T: npt.NDArray[np.int64]
    shards_T: Rows
    tests_T: Rows


def build_shards(batches: Iterable[Batch], folder: Path, limits: Limits) -> dict[str, dict[str, int]]:
    """Write the shards of all test texts, those of a set that are equal when folded once.

    Returns:
        By test set: texts, how many of them differ, and how many are too short for each method to judge.
    """
    counts: dict[str, dict[str, int]] = {}
    number, held, size = 0, list[tuple[str, Texts]](), 0
    for name, strings in batches:
        texts = fold(pa.array(strings, pa.large_string()))
        texts = texts.take(np.sort(np.unique(words.hash_texts(texts), return_index=True)[1]))
        count = counts.setdefault(name, dict.fromkeys(("texts", "too_short", "too_short_to_be_contained"), 0))
        count["texts"] += len(strings)
        for first, last in minhash.blocks(texts.starts, SHARD_CHARACTERS):
            if size and size + texts.starts[last] - texts.starts[first] > SHARD_CHARACTERS:
                _write_shard(folder / f"{number:05}", held, limits, counts)
                number, held, size = number + 1, [], 0
            held.append((name, texts.slice(first, last)))
            size += int(texts.starts[last] - texts.starts[first])
    if held:
        _write_shard(folder / f"{number:05}", held, limits, counts)
    return counts


def _write_shard(
    folder: Path, held: list[tuple[str, Texts]], limits: Limits, counts: dict[str, dict[str, int]]
) -> None:
    names = [name for name, texts in held for _ in range(len(texts))]
    codes = np.concatenate([texts.codes_C for _, texts in held])
    lengths = np.concatenate([texts.lengths for _, texts in held])
    texts = Texts(codes, np.concatenate([[0], np.cumsum(lengths)]))
    shard = make_shard(texts, names, limits)
    for key, least in (
        ("too_short", limits.exact_words),
        ("too_short_to_be_contained", limits.contained_words),
    ):
        for name in np.array(names)[~shard.words.long_enough(least)].tolist():
            counts[name][key] += 1
    for name, kind in _PARTS.items():
        for key in kind._fields:
            with atomic_write(folder / f"{name}.{key}.npy") as file:
                np.save(file, getattr(getattr(shard, name), key))
    write_json(folder / SHARD_FILE, names)


def make_shard(texts: Texts, sets: list[str], limits: Limits) -> Shard:
    marks = Marks(texts, limits)
    return Shard(
        texts,
        marks.words,
        whole=Table.of(*_first(*marks.whole)),
        heads=Table.of(*marks.heads),
        runs=Table.of(*marks.runs),
        ngrams=Table.of(*_first(*marks.ngrams)),
        bands=Table.of(*marks.bands),
        sets=sets,
    )


def _first(hashes: Hashes, values: Rows) -> tuple[Hashes, Rows]:
    """Each hash once, with the first value."""
    hashes, first = np.unique(hashes, return_index=True)
    return hashes, values[first]


def open_shards(folder: Path) -> list[Shard]:
    """The shards in a folder, mapped."""
    paths = sorted(file.parent for file in folder.glob(f"*/{SHARD_FILE}"))
    return [_open_shard(path) for path in paths]


def _open_shard(folder: Path) -> Shard:
    def part(name: str, kind: Any) -> Any:
        return kind(*(np.load(folder / f"{name}.{key}.npy", mmap_mode="r") for key in kind._fields))

    parts = {name: part(name, kind) for name, kind in _PARTS.items()}
    return Shard(**parts, sets=read_json(folder / SHARD_FILE))


def judge(texts: Texts, shards: Sequence[Shard], limits: Limits, methods: Collection[str] = METHODS) -> Hits:
    """What each text shares with a test text: the first of METHODS that hits, of these, and a test text."""
    marks = Marks(texts, limits)
    hits = Hits(*(np.full(len(texts), value) for value in (len(METHODS), -1, -1)))
    for number, shard in enumerate(shards):
        for method, name in enumerate(METHODS):
            if name in methods:
                for texts_M, tests_M in _WAYS[name](marks, shard):
                    _note(hits, method, number, texts_M, tests_M)
    return hits


def _note(hits: Hits, method: int, shard: int, texts_M: Rows, tests_M: Rows) -> None:
    better = hits.methods_T[texts_M] > method
    texts, first = np.unique(texts_M[better], return_index=True)
    hits.methods_T[texts] = method
    hits.shards_T[texts] = shard
    hits.tests_T[texts] = tests_M[better][first]


Matches = Iterator[tuple[Rows, Rows]]
"""Texts and the test texts that they match [M, M]."""


def _exact(marks: Marks, shard: Shard) -> Matches:
    hashes, texts = marks.whole
    for places, tests in shard.whole.find(hashes):
        yield texts[places], tests


def _contained(marks: Marks, shard: Shard) -> Matches:
    hashes, words_at = marks.runs
    for places, tests in shard.heads.find(hashes):
        yield _fits(marks.words, words_at[places], shard.words, tests)
    hashes, texts = marks.heads
    for places, words_at in shard.runs.find(hashes):
        tests, inner = _fits(shard.words, words_at, marks.words, texts[places])
        yield inner, tests


def _fits(outer: Words, at: Rows, inner: Words, texts: Rows) -> tuple[Rows, Rows]:
    """Texts of `outer` that hold, from word `at` on, all words of these texts of `inner`; and these."""
    lengths = np.diff(inner.starts)[texts]
    outer_texts = outer.text_of(at)
    fits = at + lengths <= outer.starts[1:][outer_texts]
    at, texts, lengths, outer_texts = at[fits], texts[fits], lengths[fits], outer_texts[fits]
    same = outer.hash_runs(at, lengths) == inner.hash_runs(inner.starts[:-1][texts], lengths)
    return outer_texts[same], texts[same]


def _ngram(marks: Marks, shard: Shard) -> Matches:
    hashes, texts = marks.ngrams
    for places, tests in shard.ngrams.find(hashes):
        yield texts[places], tests


def _near(marks: Marks, shard: Shard) -> Matches:
    keys, texts = marks.bands
    for places, tests in shard.bands.find(keys):
        pairs = np.unique(texts[places] * len(shard.texts) + tests)
        texts_M, tests_M = np.divmod(pairs, len(shard.texts))
        both = (minhash.hashed(some) for some in (marks.texts.take(texts_M), shard.texts.take(tests_M)))
        near = minhash.jaccard(*both) > marks.limits.threshold
        yield texts_M[near], tests_M[near]


_WAYS = dict(zip(METHODS, (_exact, _contained, _ngram, _near), strict=True))
