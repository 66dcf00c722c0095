"""The rows of one source as columns, with what drawing from them needs: groups, known answers, texts as numbers.

Rows come from a folder of rows, as Python lists of strings (`SourceRows`), or from a token store, whose texts are
numbers and whose columns stay on disk until they are read (`NumberedRows`). Draws, masks and holding out ask one thing
of a text, whether it equals another, so they are the same for both, and so are the batches. What needs an order takes
one that does not depend on the form of texts: that of rows, of labels as strings, or of hashes of queries.

What is derived from the columns is computed when it is first asked for, and once.

Shape suffixes: N rows, T rows that are taken, L labels, P positives of all rows.
"""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm.data.rows import Source
from f2llm.data.token_store import TokenStore
from f2llm.data.token_store_format import LISTS, NO_LABEL
from f2llm.data.token_store_numbers import text_hashes
from f2llm.errors import F2Error
from f2llm.rng import generator
from f2llm.text import clean

Value = TypeVar("Value", bound=Hashable)
Text = Any
"""A string, or the number of a text in a token store; equal texts are equal values."""

COLUMNS = ("query", "query_lang", "positives", "negatives", "label")
LARGEST_SHARE = 10  # at most one row in so many is held out
KEPT_OF_LABEL = 2  # rows that training keeps of each label: a text, and a text to be found for it
GROUPS_KEPT = 4096  # of rows with one query or label: those whose answers stay gathered


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source, as columns."""

    source: (
        Source  # its `rows` and `languages` are those of the whole source, of which these rows may be a part
    )
    query: Sequence[Text]
    query_lang: Sequence[str]
    positives: Sequence[Sequence[Text]]
    negatives: Sequence[Sequence[Text]]
    label: Sequence[Text | None]

    def __len__(self) -> int:
        return len(self.query)

    @property
    def is_retrieval(self) -> bool:
        """Whether rows come with documents, and documents of batch neighbours are negatives."""
        return self.source.format == "retrieval"

    def take(self, row_numbers: np.ndarray) -> "SourceRows":
        """The given rows (integers [T]), in the given order, as often as given."""
        columns: dict[str, Any] = {
            name: [getattr(self, name)[row] for row in row_numbers.tolist()] for name in COLUMNS
        }
        return replace(self, **columns)

    def asked(self, rows: Iterable[int], documents: Collection[Text], prefix: str) -> dict[Text, Text]:
        """What the queries of rows, and documents where these may carry the prompt too, are behind the prompt.

        Args:
            documents: of these rows.
            prefix: the prompt; without one, nothing stands behind it.
        """
        asked = {*(self.query[row] for row in rows), *(documents if self.source.symmetric else ())}
        return {text: prefix + text for text in asked} if prefix else {}

    # --- Groups of rows

    @cached_property
    def rows_by_language(self) -> dict[str, np.ndarray]:
        """Ascending row numbers (int32) of each language of queries, in the order in which these first appear."""
        return {language: np.asarray(rows, np.int32) for language, rows in rows_by(self.query_lang).items()}

    @cached_property
    def labels(self) -> list[Text]:
        """The labels, sorted as strings; of use outside retrieval only."""
        return sorted({label for label in self.label if label is not None})

    @cached_property
    def label_number(self) -> np.ndarray:
        """Int32 [N]: the place of each row's label among `labels`, in retrieval any number; -1 for none."""
        place: dict[Text | None, int] = {label: place for place, label in enumerate(self.labels)}
        return np.fromiter((place.get(label, -1) for label in self.label), np.int32, len(self))

    @cached_property
    def rows_of_label(self) -> list[np.ndarray]:
        """Ascending row numbers (int32) of each of `labels`."""
        order = np.argsort(self.label_number, kind="stable").astype(np.int32)
        edge_L = np.searchsorted(self.label_number, np.arange(len(self.labels)), sorter=order)
        return np.split(order, edge_L)[1:]

    # --- What is right for a query

    def answers(self, row: int) -> set[Text]:
        """All that the source itself says is right for the query of a row, in whatever row it says so.

        In retrieval these are texts: the positives of all rows with the same query or of the same thing (label). In
        the other formats they are the labels under which the text stands; most have one. Do not change the set.
        """
        groups = [group for shared in self._shared_answers if (group := shared(row))]
        if not groups:
            return set(self._own_answers(row))
        return groups[0] if len(groups) == 1 else groups[0] | groups[1]

    def _own_answers(self, row: int) -> Iterable[Text]:
        return self.positives[row] if self.is_retrieval else [self.label[row]]

    @cached_property
    def _shared_answers(self) -> "list[_Shared]":
        """Answers by query and, in retrieval, by label; without those that no two rows have in common."""
        numbers = [self.query_number, self.label_number] if self.is_retrieval else [self.query_number]
        shared = [_Shared(number_N, self._own_answers) for number_N in numbers]
        return [each for each in shared if each.rows]

    # --- Texts as numbers

    @cached_property
    def query_number(self) -> np.ndarray:
        """Integers [N]: a number for the text of each query; positives have numbers of the same kind."""
        return self._text_numbers[: len(self)]

    def query_and_positive(self, row_T: np.ndarray, share_T: np.ndarray) -> np.ndarray:
        """Integers [T, 2]: numbers of the query and of the positive at a share (0 <= share < 1) of the row's list."""
        start_N, count_N = self._positive_spans
        place_T = start_N[row_T] + (share_T * count_N[row_T]).astype(np.int64)
        return np.stack((self.query_number[row_T], self._text_numbers[place_T]), axis=1)

    @cached_property
    def _text_numbers(self) -> np.ndarray:
        """Int64 [N + P]: equal numbers for equal texts, of all queries and then of all positives."""
        texts = pa.array([*self.query, *chain.from_iterable(self.positives)], pa.large_string())
        return texts.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)

    @cached_property
    def _positive_spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Int64 [N] each: where the positives of a row start among the text numbers, and how many they are."""
        count_N = np.fromiter(map(len, self.positives), np.int64, len(self))
        return len(self) + np.cumsum(count_N) - count_N, count_N

    def query_keys(self) -> np.ndarray:
        """Uint64 [N]: a hash of the text of each query."""
        return text_hashes(map(clean, self.query))[:, 0]


class _Shared:
    """Answers that rows have in common because they have a number (of a query, of a label) in common."""

    def __init__(self, number_N: np.ndarray, own_answers: Callable[[int], Iterable[Text]]) -> None:
        order = np.argsort(number_N, kind="stable").astype(np.int32)
        ordered = number_N[order]
        same = ordered[1:] == ordered[:-1]
        follows = np.append(False, same)[: len(order)]
        several = (follows | np.append(same, False)[: len(order)]) & (ordered >= 0)
        rows, is_first = order[several], ~follows[several]
        group_N = np.full(len(number_N), -1, np.int32)
        group_N[rows] = np.cumsum(is_first) - 1
        starts = np.append(np.flatnonzero(is_first), len(rows)).astype(np.int32)
        # Single items of these are read, which memoryview gives faster than NumPy.
        self.rows, self.starts, self.group_N = rows.data, starts.data, group_N.data
        self._own_answers, self._gathered = own_answers, lru_cache(GROUPS_KEPT)(self._gather)

    def __call__(self, row: int) -> set[Text] | None:
        """Answers of all rows that have the row's number; None where no other row has it."""
        group = self.group_N[row]
        return None if group < 0 else self._gathered(group)

    def _gather(self, group: int) -> set[Text]:
        rows = self.rows[self.starts[group] : self.starts[group + 1]]
        return set(chain.from_iterable(map(self._own_answers, rows)))


def rows_by(values: Iterable[Value]) -> dict[Value, list[int]]:
    """Ascending numbers of the rows that have each value."""
    groups: dict[Value, list[int]] = {}
    for row, value in enumerate(values):
        groups.setdefault(value, []).append(row)
    return groups


# --- Rows of a token store


@dataclass(frozen=True)
class NumberedRows(SourceRows):
    """The rows of one source in a token store: texts are numbers, and most of what is known of a row stays on disk."""

    store: TokenStore
    row_N: np.ndarray  # which rows of the store, uint32 or uint64

    @staticmethod
    def of(store: TokenStore, source: Source, row_N: np.ndarray) -> "NumberedRows":
        columns: dict[str, Any] = {name: _Column(store, name, row_N) for name in COLUMNS}
        return NumberedRows(source=source, **columns, store=store, row_N=row_N)

    def take(self, row_numbers: np.ndarray) -> "NumberedRows":
        return NumberedRows.of(self.store, self.source, self.row_N[row_numbers])

    def asked(self, rows: Iterable[int], documents: Collection[Text], prefix: str) -> dict[Text, Text]:
        if not prefix:
            return {}
        stored = self.row_N[list(rows)].tolist()
        asked = {self.store.item("query", row): self.store.item("query_asked", row) for row in stored}
        if self.source.symmetric and self.is_retrieval:
            for row, name in ((row, name) for row in stored for name in LISTS):
                asked |= zip(self.store.items(name, row), self.store.items(f"{name}_asked", row), strict=True)
        elif self.source.symmetric:
            bare, behind = self._asked_documents
            place = np.searchsorted(bare, np.asarray(list(documents), bare.dtype))
            asked |= zip(documents, behind[place].tolist(), strict=True)
        return asked

    @cached_property
    def _asked_documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Uint32: the documents of clustering (texts) or classification (labels), ascending; and behind the prompt."""
        name = "query" if self.source.format == "clustering" else "label"
        bare, row = np.unique(self.store.column(name, self.row_N), return_index=True)
        return bare, self.store.column(f"{name}_asked", self.row_N[row])

    @cached_property
    def rows_by_language(self) -> dict[str, np.ndarray]:
        language_N = self.store.column("query_lang", self.row_N)
        order = np.argsort(language_N, kind="stable").astype(np.int32)
        languages, start = np.unique(language_N[order], return_index=True)
        groups = zip(languages.tolist(), np.split(order, start)[1:], strict=True)
        by_appearance = sorted(groups, key=lambda group: int(group[1][0]))
        return {self.store.languages[language]: rows for language, rows in by_appearance}

    @cached_property
    def labels(self) -> list[Text]:
        present = set(np.unique(self.store.column("label", self.row_N)).tolist())
        sorted_labels = self.store.labels.get(self.source.name, {}).values()  # none of retrieval
        return [number for number in sorted_labels if number in present]

    @cached_property
    def label_number(self) -> np.ndarray:
        numbers, place_N = np.unique(self.store.column("label", self.row_N), return_inverse=True)
        known = numbers[numbers != NO_LABEL]
        if not len(known):
            return np.broadcast_to(np.int32(-1), len(self))
        place = np.argsort(known if self.is_retrieval else self.labels)
        return np.append(place, -1).astype(np.int32)[place_N]  # NO_LABEL is the largest number

    @cached_property
    def query_number(self) -> np.ndarray:
        return self.store.column("query", self.row_N)

    def query_and_positive(self, row_T: np.ndarray, share_T: np.ndarray) -> np.ndarray:
        positive_T = self.store.pick("positives", self.row_N[row_T], share_T)
        return np.stack((self.query_number[row_T], positive_T), axis=1)

    def query_keys(self) -> np.ndarray:
        return self.store.column("query_key", self.row_N)


class _Column(Sequence[Any]):
    """A column of rows in a token store; every item is read when it is asked for."""

    def __init__(self, store: TokenStore, name: str, row_N: np.ndarray) -> None:
        self._store, self._name, self._row_N = store, name, row_N

    def __len__(self) -> int:
        return len(self._row_N)

    def __getitem__(self, row: Any) -> Any:
        stored = int(self._row_N[row])
        if self._name in LISTS:
            return self._store.items(self._name, stored)
        item = self._store.item(self._name, stored)
        if self._name == "query_lang":
            return self._store.languages[item]
        return None if self._name == "label" and item == NO_LABEL else item


# --- Loading and dividing


def load_sources(
    table: pa.Table | TokenStore, sources: Sequence[Source], formats: Sequence[str]
) -> list[SourceRows]:
    """Rows of every source whose format is wanted, in the order of `sources`.

    Raises F2Error where no source has such a format, or a source with labels has but one.
    """
    wanted = [source for source in sources if source.format in formats]
    every = _stored(table, wanted) if isinstance(table, TokenStore) else _listed(table, wanted)
    loaded = []
    for rows in every:
        if not rows.is_retrieval and len(rows.labels) < 2:
            raise F2Error(
                f"source {rows.source.name} ({rows.source.format}) has {len(rows.labels)} label(s), expected at least "
                "2; without another label there is no negative, so add rows or leave the source out."
            )
        loaded.append(rows)
    if not loaded:
        raise F2Error(f"no source has a format out of {list(formats)}; give data of such a format.")
    return loaded


def _listed(table: pa.Table, sources: Sequence[Source]) -> Iterator[SourceRows]:
    for source in sources:
        part = table.filter(pc.equal(table["source"], source.name))
        yield SourceRows(source, **{name: part[name].to_pylist() for name in COLUMNS})


def _stored(store: TokenStore, sources: Sequence[Source]) -> Iterator[SourceRows]:
    source_of_row = store.column("source")
    for source in sources:
        row_N = np.flatnonzero(source_of_row == store.sources.index(source))
        yield NumberedRows.of(store, source, row_N.astype(np.min_scalar_type(store.row_count)))


def hold_out(rows: SourceRows, count: int, seed: int) -> tuple[SourceRows, SourceRows]:
    """The rows to train on and the rows held out of training, each in the order in which they stood.

    Held out are whole queries, in the order of a hash of their text and the seed, as long as they fit: at most `count`
    rows, and at most a tenth of all. So rows with the same query are on one side, the choice does not depend on the
    order of rows, and a text that stands in several sources is early in all of them. In clustering and classification
    every label keeps two rows in training, or its only one, and so no label vanishes.
    """
    room = min(count, len(rows) // LARGEST_SHARE)
    left = Counter[int]() if rows.is_retrieval else Counter(rows.label_number.tolist())
    held: list[int] = []
    for taken in _queries_by_chance(rows, seed) if room else ():
        labels = Counter[int]() if rows.is_retrieval else Counter(rows.label_number[taken].tolist())
        if len(held) + len(taken) > room or any(
            left[label] - n < KEPT_OF_LABEL for label, n in labels.items()
        ):
            continue
        held += taken
        left -= labels
        if len(held) == room:
            break
    is_held = np.zeros(len(rows), dtype=bool)
    is_held[held] = True
    return rows.take(np.flatnonzero(~is_held)), rows.take(np.flatnonzero(is_held))


def _queries_by_chance(rows: SourceRows, seed: int) -> Iterator[list[int]]:
    """The rows of each query, in the order of a hash of seed and text.

    The hash of the text goes through the finaliser of SplitMix64 (Steele et al. 2014), which is one to one.
    """
    key_N = rows.query_keys() + generator(seed, "held out").integers(2**64, dtype=np.uint64)
    key_N = (key_N ^ (key_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key_N = (key_N ^ (key_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    key_N ^= key_N >> np.uint64(31)
    order_N = np.argsort(key_N, kind="stable")
    key_N = key_N[order_N]
    start = 0
    while start < len(order_N):
        end = start + int(np.searchsorted(key_N[start:], key_N[start], "right"))
        yield order_N[start:end].tolist()
        start = end
