"""Who is searched for whom: pools of documents, and which of them are no negative of a row, because it is known.

A pool has the documents of a source (or of a language, or all) and the rows whose negatives are looked for among
them. Documents that say the same but for case and white space are one, in the words in which it comes first. Never
a negative of a row is what says the same as

- one of its positives, or a positive of any row of the pool with the same query or the same label (of its source),
- the query itself,
- a negative that it has already, where these are kept.

A pool is a folder of arrays, which are mapped where they are used.

Shape suffixes: R rows of the pool, M documents, P pairs of a row and a text, G groups of rows.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from f2llm.files import atomic_write, read_json, write_json
from f2llm.mine.search import NO_DOCUMENT, Numbers, Pairs
from f2llm.mine.texts import NO_LABEL, Corpus, PartRows
from f2llm.recipe_corpus import PoolOf


class Reason(IntEnum):
    """Why a document is no negative of a row; of several the first counts."""

    POSITIVE = 0
    RIGHT_FOR_QUERY = 1
    RIGHT_FOR_LABEL = 2
    QUERY_ITSELF = 3
    GIVEN_NEGATIVE = 4


@dataclass(frozen=True)
class Pool:
    """Rows in the order of parts; documents in the order of their texts' numbers."""

    part: Numbers  # [R]
    row: Numbers  # [R] place in its part
    source: Numbers  # [R] which of the sources
    language: Numbers  # [R] of the query; which of the languages
    query: Numbers  # [R] number of its text
    document: Numbers  # [M] number of its text
    own: Numbers  # [R] the document that says the same as the query, or NO_DOCUMENT
    positive_starts: Numbers  # [R + 1]
    positive: Numbers  # [P] number of its text
    positive_document: Numbers  # [P]
    negative_starts: Numbers  # [R + 1]
    negative_document: Numbers
    query_group: Numbers  # [R] rows with the same query
    query_starts: Numbers  # [G + 1]
    query_document: Numbers  # the positives of each group, each once
    label_group: Numbers
    label_starts: Numbers
    label_document: Numbers

    @staticmethod
    def load(folder: Path) -> "Pool":
        return Pool(
            **{field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r") for field in fields(Pool)}
        )

    def save(self, folder: Path) -> None:
        for field in fields(self):
            with atomic_write(folder / f"{field.name}.npy") as file:
                np.save(file, getattr(self, field.name))

    def __len__(self) -> int:
        return len(self.row)


class Barred(NamedTuple):
    """Documents that are no negatives of a block of rows, each once, and why."""

    pairs: Pairs
    reason_P: Numbers


def barred(pool: Pool, rows: slice, keep_given: bool) -> Barred:
    """What is known of the rows, which count from 0 at the first of the slice."""
    row_R = np.arange(rows.start, rows.stop)
    own = np.asarray(pool.own[rows])
    found = [
        _listed(pool.positive_starts, pool.positive_document, row_R),
        _listed(pool.query_starts, pool.query_document, pool.query_group[rows]),
        _listed(pool.label_starts, pool.label_document, pool.label_group[rows]),
        Pairs(np.flatnonzero(own != NO_DOCUMENT), own[own != NO_DOCUMENT]),
        _listed(pool.negative_starts, pool.negative_document, row_R[: len(row_R) * keep_given]),
    ]
    together = np.concatenate([pairs.query_P * len(pool.document) + pairs.document_P for pairs in found])
    reason_P = np.repeat(np.arange(len(found)), [len(pairs.query_P) for pairs in found])
    once, first = np.unique(together, return_index=True)  # of equal ones the first
    return Barred(Pairs(*np.divmod(once, max(1, len(pool.document)))), reason_P[first])


def _listed(starts: Numbers, values: Numbers, chosen: Numbers) -> Pairs:
    """The values of the chosen lists, each with the place of its list among them."""
    place = spans(starts, chosen)
    lengths = starts[chosen + 1] - starts[chosen]
    return Pairs(np.repeat(np.arange(len(chosen)), lengths), np.asarray(values[place]))


def spans(starts: Numbers, chosen: Numbers) -> Numbers:
    """The places of all values of the chosen lists, one list after the other."""
    lengths = starts[chosen + 1] - starts[chosen]
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts[chosen] - (ends - lengths), lengths)


# --- Making them


def make_pools(
    corpus: Corpus, parts: int, pool_of: PoolOf, sources: Sequence[str], languages: Sequence[str]
) -> list[Path]:
    """The folders of all pools, in the order in which their first rows come.

    Args:
        sources, languages: what the rows of the pools refer to by number.
    """
    folder = corpus.work / "pools"
    if (folder / "pools.json").exists():
        return [folder / name for name in read_json(folder / "pools.json")]
    with_pool: dict[str, list[int]] = defaultdict(list)
    for part in range(parts):
        for name in dict.fromkeys(_pool_names(corpus.rows(part), pool_of)):
            with_pool[name].append(part)
    made = []
    for number, (name, its_parts) in enumerate(with_pool.items()):
        read = [_only(corpus.rows(part), name, pool_of) for part in its_parts]
        made.append(folder / f"{number:05}")
        _make_pool(its_parts, read, sources, languages).save(made[-1])
    write_json(folder / "pools.json", [path.name for path in made])
    return made


def _pool_names(rows: PartRows, pool_of: PoolOf) -> list[str]:
    """The pool of each row."""
    if pool_of == "corpus":
        return [""] * len(rows.row)
    return rows.source if pool_of == "source" else rows.positive_lang


def _only(rows: PartRows, pool: str, pool_of: PoolOf) -> PartRows:
    """The rows of one pool."""
    chosen = np.flatnonzero([name == pool for name in _pool_names(rows, pool_of)])
    taken: dict[str, Any] = {}
    for field in fields(PartRows):
        values = getattr(rows, field.name)
        if isinstance(values, list):
            taken[field.name] = [values[row] for row in chosen.tolist()]
        elif field.name.startswith(("positive", "negative")) and not field.name.endswith("s"):
            starts = _starts(getattr(rows, field.name.removesuffix("_key") + "s"))
            taken[field.name] = values[spans(starts, chosen)]
        else:
            taken[field.name] = values[chosen]
    return PartRows(**taken)


def _make_pool(
    parts: Sequence[int], read: Sequence[PartRows], sources: Sequence[str], languages: Sequence[str]
) -> Pool:
    def whole(name: str) -> Numbers:
        return np.concatenate([getattr(rows, name) for rows in read])

    def coded(name: str, values: Sequence[str]) -> Numbers:
        code = {value: number for number, value in enumerate(values)}
        return np.array([code[value] for rows in read for value in getattr(rows, name)], np.int64)

    text = np.concatenate([whole("positive"), whole("negative")])
    key = np.concatenate([whole("positive_key"), whole("negative_key")])
    order = np.lexsort((text, key))
    is_first = np.ones(len(order), bool)
    is_first[1:] = key[order][1:] != key[order][:-1]
    document, known_key = text[order][is_first], key[order][is_first]
    by_number = np.argsort(document, kind="stable")
    document_of_key = np.empty_like(by_number)
    document_of_key[by_number] = np.arange(len(by_number))

    def of_keys(keys: Numbers) -> Numbers:
        """The document of each key, or NO_DOCUMENT."""
        place = np.minimum(np.searchsorted(known_key, keys), len(known_key) - 1)
        return np.where(known_key[place] == keys, document_of_key[place], NO_DOCUMENT)

    positive_document = of_keys(whole("positive_key"))
    positive_starts = _starts(whole("positives"))
    label = whole("label_key")
    alone = label == NO_LABEL
    label = np.where(alone, -1 - np.arange(len(label)), label)  # a row without a label shares it with none
    query_group, query_starts, query_document = _groups(
        whole("query_key"), positive_starts, positive_document
    )
    label_group, label_starts, label_document = _groups(label, positive_starts, positive_document)
    return Pool(
        part=np.repeat(parts, [len(rows.row) for rows in read]).astype(np.int64),
        row=whole("row"),
        source=coded("source", sources),
        language=coded("query_lang", languages),
        query=whole("query"),
        document=document[by_number],
        own=of_keys(whole("query_key")),
        positive_starts=positive_starts,
        positive=whole("positive"),
        positive_document=positive_document,
        negative_starts=_starts(whole("negatives")),
        negative_document=of_keys(whole("negative_key")),
        query_group=query_group,
        query_starts=query_starts,
        query_document=query_document,
        label_group=label_group,
        label_starts=label_starts,
        label_document=label_document,
    )


def _groups(value_R: Numbers, starts: Numbers, document_P: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Rows of equal value: the group of each row, and the documents of each group as one sorted list of lists."""
    values, group_R = np.unique(value_R, return_inverse=True)
    most = int(document_P.max()) + 1
    pairs = np.unique(np.repeat(group_R, np.diff(starts)) * most + document_P)
    return group_R, _starts(np.bincount(pairs // most, minlength=len(values))), pairs % most


def _starts(lengths: Numbers) -> Numbers:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
