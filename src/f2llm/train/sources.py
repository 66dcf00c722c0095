"""The rows of one source as columns, with what drawing from them needs: groups, known answers, texts as numbers.

What is derived from the columns is computed when it is first asked for, and once.

Shape suffixes: N rows, T rows that are taken, P positives of all rows.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm.data.rows import Source
from f2llm.errors import F2Error

Value = TypeVar("Value", bound=Hashable)

COLUMNS = ("query", "query_lang", "positives", "negatives", "label")
LARGEST_SHARE = 10  # at most one row in so many is held out
KEPT_OF_LABEL = 2  # rows that training keeps of each label: a text, and a text to be found for it


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source, as columns."""

    source: (
        Source  # its `rows` and `languages` are those of the whole source, of which these rows may be a part
    )
    query: list[str]
    query_lang: list[str]
    positives: list[list[str]]
    negatives: list[list[str]]
    label: list[str | None]

    def __len__(self) -> int:
        return len(self.query)

    @property
    def is_retrieval(self) -> bool:
        """Whether rows come with documents, and documents of batch neighbours are negatives."""
        return self.source.format == "retrieval"

    def take(self, row_numbers: np.ndarray) -> "SourceRows":
        """The given rows (int64 [T]), in the given order, as often as given."""
        columns: dict[str, Any] = {
            name: [getattr(self, name)[row] for row in row_numbers.tolist()] for name in COLUMNS
        }
        return replace(self, **columns)

    @cached_property
    def rows_by_label(self) -> dict[str | None, np.ndarray]:
        """Ascending row numbers (int64) of each label; None stands for rows without one."""
        return {label: np.asarray(rows) for label, rows in rows_by(self.label).items()}

    @cached_property
    def rows_by_language(self) -> dict[str, np.ndarray]:
        """Ascending row numbers (int64) of each language of queries."""
        return {language: np.asarray(rows) for language, rows in rows_by(self.query_lang).items()}

    @cached_property
    def labels(self) -> list[str]:
        """The labels, sorted."""
        return sorted(label for label in self.rows_by_label if label is not None)

    def answers(self, row: int) -> set[str]:
        """All that the source itself says is right for the query of a row, in whatever row it says so.

        In retrieval these are texts: the positives of all rows with the same query or of the same thing (label). In
        the other formats they are the labels under which the text stands; most have one. Do not change the set.
        """
        by_query, by_label = self._shared_answers
        shared = [by_query.get(self.query[row]), by_label.get(self.label[row])]
        groups = [group for group in shared if group]
        if not groups:
            return set(self._own_answers(row))
        return groups[0] if len(groups) == 1 else groups[0] | groups[1]

    def _own_answers(self, row: int) -> Iterable[str]:
        return self.positives[row] if self.is_retrieval else [str(self.label[row])]

    @cached_property
    def _shared_answers(self) -> tuple[dict[str, set[str]], dict[str | None, set[str]]]:
        """Answers by query and, in retrieval, by label: of queries and labels that several rows have."""
        by_query: dict[str, set[str]] = defaultdict(set)
        by_label: dict[str | None, set[str]] = defaultdict(set)
        for row in np.flatnonzero(np.bincount(self.query_number)[self.query_number] > 1).tolist():
            by_query[self.query[row]].update(self._own_answers(row))
        if self.is_retrieval:
            for label, rows in self.rows_by_label.items():
                if label is not None and len(rows) > 1:
                    by_label[label].update(chain.from_iterable(self.positives[row] for row in rows))
        return dict(by_query), dict(by_label)

    @cached_property
    def query_number(self) -> np.ndarray:
        """Int64: a number for the text of each query; positives have numbers of the same kind."""
        return self._text_numbers[: len(self)]

    def query_and_positive(self, row_T: np.ndarray, share_T: np.ndarray) -> np.ndarray:
        """Int64 [T, 2]: the numbers of the query and of the positive at a share (0 <= share < 1) of the row's list."""
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


def rows_by(values: Sequence[Value]) -> dict[Value, list[int]]:
    """Ascending numbers of the rows that have each value."""
    groups: dict[Value, list[int]] = defaultdict(list)
    for row, value in enumerate(values):
        groups[value].append(row)
    return groups


def load_sources(table: pa.Table, sources: Sequence[Source], formats: Sequence[str]) -> list[SourceRows]:
    """Columns of every source whose format is wanted, in the order of `sources`.

    Raises F2Error where no source has such a format, or a source with labels has but one.
    """
    loaded = []
    for source in sources:
        if source.format not in formats:
            continue
        part = table.filter(pc.equal(table["source"], source.name))
        rows = SourceRows(source, **{name: part[name].to_pylist() for name in COLUMNS})
        if not rows.is_retrieval and len(rows.rows_by_label) < 2:
            raise F2Error(
                f"source {source.name} ({source.format}) has {len(rows.rows_by_label)} label(s), expected at least 2; "
                "without another label there is no negative, so add rows or leave the source out."
            )
        loaded.append(rows)
    if not loaded:
        raise F2Error(f"no source has a format out of {list(formats)}; give data of such a format.")
    return loaded


def hold_out(rows: SourceRows, count: int, seed: int) -> tuple[SourceRows, SourceRows]:
    """The rows to train on and the rows held out of training, each in the order in which they stood.

    Held out are whole queries, in the order of a hash of their text and the seed, as long as they fit: at most `count`
    rows, and at most a tenth of all. So rows with the same query are on one side, the choice does not depend on the
    order of rows, and a text that stands in several sources is early in all of them. In clustering and classification
    every label keeps two rows in training, or its only one, and so no label vanishes.
    """
    room = min(count, len(rows) // LARGEST_SHARE)
    left = Counter(rows.label)
    groups = rows_by(rows.query) if room > 0 else {}
    held: list[int] = []
    for query in sorted(groups, key=lambda text: hashlib.sha256(f"{seed}\x1f{text}".encode()).digest()):
        taken = groups[query]
        labels = Counter(rows.label[row] for row in taken)
        if len(held) + len(taken) > room or (
            not rows.is_retrieval
            and any(left[label] - number < KEPT_OF_LABEL for label, number in labels.items())
        ):
            continue
        held += taken
        left -= labels
        if len(held) == room:
            break
    is_held = np.zeros(len(rows), dtype=bool)
    is_held[held] = True
    return rows.take(np.flatnonzero(~is_held)), rows.take(np.flatnonzero(is_held))
