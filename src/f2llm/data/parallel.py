"""Texts that say the same in many languages to pairs of query and positive, with memory that hardly grows.

texts -> a spool on disk -> sorted by language and id -> for each direction that is asked the ids that both languages
have -> pairs, a part at a time. Pairs come by direction, within it in the order of the queries. What memory holds is
17 bytes a text (its number, the hash of its id, whether it found a partner), and twice that while it sorts; the texts
and the rest are mapped from files.

Shapes: T texts, I texts of one language, P pairs.
"""

import mmap
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from f2llm.data.canonical import tag
from f2llm.errors import UsageError
from f2llm.rng import generator

Numbers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
Directions = Sequence[tuple[str, str]] | Literal["all", "english"]

COLUMNS = {
    "key": np.uint64,  # hash of the id; that any two of a hundred million ids have the same has a chance of 1 in 3,700
    "lang": np.int32,
    "file": np.int32,
    "number": np.int64,
    "text_end": np.int64,
    "id_end": np.int64,
}


class Pairs(NamedTuple):
    """Some pairs of texts of two languages."""

    query_lang: str
    positive_lang: str
    query_P: Numbers
    """Numbers of texts in the texts."""
    positive_P: Numbers


class Spool:
    """Texts being written to a folder; the t-th that is added has the number t."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.langs: dict[str, int] = {}
        self.ends = dict.fromkeys(("text", "id"), 0)  # bytes written
        self._files = {name: open(folder / name, "wb") for name in (*self.ends, *COLUMNS)}  # noqa: SIM115

    def add(
        self,
        ids: Sequence[str],
        texts: Sequence[str],
        langs: Sequence[str],
        file: int,
        numbers: Sequence[int],
    ) -> None:
        columns = {
            "key": [int.from_bytes(blake2b(one.encode(), digest_size=8).digest()) for one in ids],
            "lang": [self.langs.setdefault(one, len(self.langs)) for one in langs],
            "text_end": self._add("text", texts),
            "id_end": self._add("id", ids),
            "file": [file] * len(ids),
            "number": numbers,
        }
        for name, values in columns.items():
            self._files[name].write(np.asarray(values, COLUMNS[name]).tobytes())

    def _add(self, name: str, texts: Sequence[str]) -> Numbers:
        raw = [text.encode() for text in texts]
        self._files[name].writelines(raw)
        ends = self.ends[name] + np.cumsum([len(text) for text in raw], dtype=np.int64)
        self.ends[name] += sum(map(len, raw))
        return ends

    def close(self) -> "Texts":
        """Write the last, and read from here on; there has to be a text."""
        for file in self._files.values():
            file.close()
        return Texts(self.folder, list(self.langs))


class Texts:
    """The texts of a spool by number, and which of two languages have the same id."""

    def __init__(self, folder: Path, langs: list[str]) -> None:
        self.langs = langs
        self._columns = {
            name: np.asarray(np.memmap(folder / name, kind, "r")) for name, kind in COLUMNS.items()
        }
        self._bytes = {name: _map(folder / name) for name in ("text", "id")}
        lang_T: Numbers = self._columns["lang"]
        key_T: Keys = self._columns["key"]
        self.count = len(lang_T)
        order_T = np.lexsort((key_T, lang_T))  # stable: of equal ones the first that was read stays first
        key_T, lang_T = key_T[order_T], lang_T[order_T]
        again_T = np.zeros(self.count, bool)
        again_T[1:] = (key_T[1:] == key_T[:-1]) & (lang_T[1:] == lang_T[:-1])
        self.again = np.sort(order_T[again_T])
        """Numbers of the texts whose id and language an earlier one has; they are in no pair."""
        order_T, key_T, lang_T = order_T[~again_T], key_T[~again_T], lang_T[~again_T]
        edges = np.searchsorted(lang_T, range(len(langs) + 1))
        self._of = {
            name: (key_T[start:stop], order_T[start:stop])
            for name, start, stop in zip(langs, edges[:-1], edges[1:], strict=True)
        }

    @property
    def mean_size(self) -> float:
        """Bytes of a text."""
        return float(self._columns["text_end"][-1] / self.count)

    def take(self, numbers: Numbers, what: Literal["text", "id"] = "text") -> list[str]:
        """Texts, or their ids."""
        end_T, held = self._columns[f"{what}_end"], self._bytes[what]
        starts = np.where(numbers == 0, 0, end_T[numbers - 1]).tolist()
        return [held[start:end].decode() for start, end in zip(starts, end_T[numbers].tolist(), strict=True)]

    def place(self, number: int) -> tuple[int, int]:
        """File and number in it, as they were given to `Spool.add`."""
        return int(self._columns["file"][number]), int(self._columns["number"][number])

    def lang(self, number: int) -> str:
        return self.langs[self._columns["lang"][number]]

    def matches(self, query_lang: str, positive_lang: str) -> Pairs:
        """The texts of two languages that have the same ids."""
        (key_I, number_I), (key_J, number_J) = self._of[query_lang], self._of[positive_lang]
        found_I = np.minimum(np.searchsorted(key_J, key_I), len(key_J) - 1)
        same_I = key_J[found_I] == key_I
        query_P, positive_P = number_I[same_I], number_J[found_I[same_I]]
        order_P = np.argsort(query_P)
        return Pairs(query_lang, positive_lang, query_P[order_P], positive_P[order_P])


def _map(file: Path) -> mmap.mmap:
    with open(file, "rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def directions(langs: Iterable[str], asked: Directions, name: str) -> list[tuple[str, str]]:
    """The (query, positive) languages that are asked, of those that are there; `eng` means `eng_Latn` as well."""
    there = sorted(langs)
    every = [(query, positive) for query in there for positive in there if query != positive]
    if asked == "all":
        return every
    if asked == "english":
        return [pair for pair in every if sum(_is(one, "eng") for one in pair) == 1]
    found: dict[tuple[str, str], None] = {}
    for query, positive in asked:
        wanted = [
            (q, p) for q, p in every if _is(q, tag(query) or query) and _is(p, tag(positive) or positive)
        ]
        if not wanted:
            raise UsageError(
                f"{name} has no texts for the direction {query} -> {positive}, only {', '.join(there):.200}; mend "
                "'directions' of its record."
            )
        found |= dict.fromkeys(wanted)
    return list(found)


def _is(lang: str, asked: str) -> bool:
    return asked in (lang, lang.split("_")[0])


def count_pairs(texts: Texts, wanted: Sequence[tuple[str, str]]) -> tuple[int, npt.NDArray[np.bool_]]:
    """How many pairs there are, and which of the texts (bool [T]) are in one."""
    count, used_T = 0, np.zeros(texts.count, bool)
    for query_lang, positive_lang in wanted:
        pairs = texts.matches(query_lang, positive_lang)
        count += len(pairs.query_P)
        used_T[pairs.query_P] = used_T[pairs.positive_P] = True
    return count, used_T


def iterate_pairs(
    texts: Texts, wanted: Sequence[tuple[str, str]], drawn: Numbers | None, most: int
) -> Iterator[list[Pairs]]:
    """All pairs, or those of the sorted numbers `drawn`, `most` at a time."""
    held: list[Pairs] = []
    room, before = most, 0
    for direction in wanted:
        pairs = texts.matches(*direction)
        count = len(pairs.query_P)
        if drawn is not None:
            first, last = np.searchsorted(drawn, (before, before + count))
            chosen = drawn[first:last] - before
            pairs = pairs._replace(query_P=pairs.query_P[chosen], positive_P=pairs.positive_P[chosen])
        before += count
        while len(pairs.query_P):
            held.append(pairs._replace(query_P=pairs.query_P[:room], positive_P=pairs.positive_P[:room]))
            pairs = pairs._replace(query_P=pairs.query_P[room:], positive_P=pairs.positive_P[room:])
            room -= len(held[-1].query_P)
            if room == 0:
                yield held
                held, room = [], most
    if held:
        yield held


def draw(seed: int, name: str, total: int, limit: int) -> Numbers | None:
    """Sorted numbers of `limit` things of `total`, any of them as likely; None where that is all."""
    if limit >= total:
        return None
    return np.sort(generator(seed, "limit", name).choice(total, limit, replace=False, shuffle=False))
