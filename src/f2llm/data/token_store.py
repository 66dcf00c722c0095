"""The token store: every distinct text of a corpus as token ids, and every row as the numbers of its texts.

A text is known by its number: texts are numbered from 0 in the order in which they first appear. A text with a prompt
in front is a text of its own, tokenised as the whole that it is, so its ids are those that any tokenizer gives for
the whole; no rule about where prompts may be cut off is needed. A row names its texts as they stand and, in columns
ending in `_asked`, behind their source's prompt; where a source has no prompt, both numbers are the same.

Opening reads store.json and looks at the sizes of the files, however many texts they hold. A part is mapped into memory
when it is first asked for; its pages are the system's, which lends them while nobody else needs the room. Every read is
checked against the bounds of the part, and every text against EOS at its end and before its beginning. That finds a
truncated or misaligned file; `TokenStore.verify` reads everything and finds every edited byte. A file that shrinks
while it is mapped is beyond any reader of mapped memory.

Shape suffixes: N numbers asked for, M of these in one part.
"""

import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from f2llm.data.token_store_format import (
    ASKED,
    COLUMNS,
    LABELS_FILE,
    LISTS,
    NO_LABEL,
    ROW_COLUMNS,
    TOKENS,
    Header,
    check_size,
    layout,
    part_file,
    read_header,
    token_dtype,
)
from f2llm.errors import F2Error, UsageError
from f2llm.files import read_json, sha256_file


class StoredRows(NamedTuple):
    """Rows by number, as columns; texts are numbers, `label` is NO_LABEL where there is none."""

    query: np.ndarray  # uint32
    query_asked: np.ndarray
    query_key: np.ndarray  # uint64
    label: np.ndarray  # uint32
    label_asked: np.ndarray
    source: np.ndarray  # uint16, index into TokenStore.sources
    query_lang: np.ndarray  # uint16, index into TokenStore.languages
    positive_lang: np.ndarray
    hash: np.ndarray  # uint64
    positives: list[np.ndarray]  # uint32, of each row
    positives_asked: list[np.ndarray]
    negatives: list[np.ndarray]
    negatives_asked: list[np.ndarray]


def open_store(folder: Path) -> "TokenStore":
    """The store in a folder.

    Raises F2Error where a file of it is missing or not as long as store.json says.
    """
    header = read_header(folder)
    for number, part in enumerate(header.parts):
        check_size(folder / part_file(number), part.size)
    return TokenStore(folder, header)


# Columns of offsets, what they lead to, and where the first of them leads.
SPANS = (("offsets", TOKENS, 1), *((f"{name}_offsets", name, 0) for name in LISTS))


@dataclass(frozen=True)
class _Mapped:
    """A part in memory, as far as it is used."""

    path: Path
    columns: dict[str, np.ndarray]
    # Of these single items and short slices are read, which memoryview gives faster than NumPy.
    tokens: memoryview
    offsets: memoryview
    end: int
    """Where the last text ends among the tokens."""

    def damaged(self, what: str) -> F2Error:
        return F2Error(f"{self.path} is damaged: {what}; make the token store again.")


class TokenStore:
    """Texts and rows of a store by their numbers. `len` is the number of texts."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder, self.header = folder, header
        self.sources, self.languages = header.sources, header.languages
        self.text_starts = _starts([part.texts for part in header.parts])
        self.row_starts = _starts([part.rows for part in header.parts])
        self._row_starts: list[int] = self.row_starts.tolist()  # Python searches lists faster
        self._mapped: dict[int, _Mapped] = {}

    def __len__(self) -> int:
        return int(self.text_starts[-1])

    @property
    def row_count(self) -> int:
        return self._row_starts[-1]

    @cached_property
    def labels(self) -> dict[str, dict[str, int]]:
        """Of clustering and classification sources by name: their labels, sorted, with the numbers of their texts."""
        labels: dict[str, dict[str, int]] = read_json(self.folder / LABELS_FILE)
        return labels

    def tokens(self, numbers_N: Any, max_length: int | None = None) -> list[np.ndarray]:
        """Token ids of texts, EOS last; uint16 or uint32, in memory of the caller's own.

        Args:
            numbers_N: integers, in any order, as often as wanted.
            max_length: longer texts are cut before EOS, which stays.

        Raises UsageError for a number that is not in the store, F2Error for a damaged file.
        """
        if max_length is not None and max_length < 1:
            raise UsageError(f"max_length is {max_length}; a text needs at least its EOS.")
        numbers_N = self._checked(numbers_N, self.text_starts, "text")
        if not len(numbers_N):
            return []
        part_N = np.searchsorted(self.text_starts, numbers_N, "right") - 1
        local_N = numbers_N - self.text_starts[part_N]
        # Texts lie far apart, a few in a part: item by item they are read faster than part by part with NumPy.
        most = max_length or sys.maxsize
        pieces: list[memoryview] = []
        lengths, cut = [], []
        for number, local in zip(part_N.tolist(), local_N.tolist(), strict=True):
            part = self._mapped.get(number) or self._part(number)
            start, end = part.offsets[local], part.offsets[local + 1]
            if not 1 <= start < end <= part.end:
                raise part.damaged("its offsets lead outside of it")
            if end - start > most:
                end = start + most
                cut.append(len(pieces))
            pieces.append(part.tokens[start - 1 : end])
            lengths.append(1 + end - start)
        flat = np.frombuffer(bytearray().join(pieces), token_dtype(self.header.vocab_size))
        end_N = np.cumsum(lengths)
        flat[end_N[np.asarray(cut, np.int64)] - 1] = self.header.eos_id
        # Before every text stands the EOS of the one before, or that with which the column begins.
        start_N = np.concatenate(([0], end_N[:-1]))
        wrong_N = (flat[start_N] != self.header.eos_id) | (flat[end_N - 1] != self.header.eos_id)
        if wrong_N.any() or flat.max() >= self.header.vocab_size:
            unknown_N = np.maximum.reduceat(flat, start_N) >= self.header.vocab_size
            first = int(np.argmax(wrong_N | unknown_N))
            what = (
                "does not begin after an EOS and end with one" if wrong_N[first] else "has an unknown token"
            )
            raise self._part(int(part_N[first])).damaged(f"text {numbers_N[first]} {what}")
        return [flat[start:end] for start, end in zip((start_N + 1).tolist(), end_N.tolist(), strict=True)]

    def rows(self, numbers_N: Any) -> StoredRows:
        """Rows by number.

        Raises UsageError for a number that is not in the store, F2Error for a damaged file.
        """
        numbers_N = self._checked(numbers_N, self.row_starts, "row")
        asked = ("query_asked", "label_asked")
        columns = {name: np.empty(len(numbers_N), COLUMNS[name]) for name in (*ROW_COLUMNS, *asked)}
        lists: dict[str, list[np.ndarray]] = {
            name: [np.empty(0, "<u4")] * len(numbers_N)
            for name in (*LISTS, *(f"{name}_asked" for name in LISTS))
        }
        for part, place_M, local_M in self._by_part(numbers_N):
            for name, column in columns.items():
                column[place_M] = part.columns[name][local_M]
            for name in LISTS:
                values, behind = part.columns[name], part.columns[f"{name}_asked"]
                start_M, end_M = _spans(part, part.columns[f"{name}_offsets"], local_M, len(values), name)
                for place, start, end in zip(place_M.tolist(), start_M.tolist(), end_M.tolist(), strict=True):
                    lists[name][place] = values[start:end].copy()
                    lists[f"{name}_asked"][place] = behind[start:end].copy()
            self._check_numbers(part, columns, lists, place_M)
        every: dict[str, Any] = {**columns, **lists}
        return StoredRows(**every)

    def _check_numbers(
        self,
        part: _Mapped,
        columns: dict[str, np.ndarray],
        lists: dict[str, list[np.ndarray]],
        place_M: np.ndarray,
    ) -> None:
        limits = {
            "source": len(self.sources),
            "query_lang": len(self.languages),
            "positive_lang": len(self.languages),
        }
        for name, limit in limits.items():
            if (columns[name][place_M] >= limit).any():
                raise part.damaged(f"a row has a {name} that the store does not")
        texts = [columns[name][place_M] for name in ("query", "query_asked", "label", "label_asked")]
        listed = [lists[name][place] for name in lists for place in place_M.tolist()]
        numbers = np.concatenate([*texts, *listed])
        if (numbers[numbers != NO_LABEL] >= len(self)).any() or (texts[0] == NO_LABEL).any():
            raise part.damaged("a row names a text that the store does not have")

    def column(self, name: str, rows_N: Any = None) -> np.ndarray:
        """One of `ROW_COLUMNS`, or the `_asked` of one, of all rows or of some, in memory: 2 to 8 bytes a row."""
        if rows_N is None:
            return np.concatenate([self._part(k).columns[name] for k in range(len(self.header.parts))])
        rows_N = self._checked(rows_N, self.row_starts, "row")
        found_N = np.empty(len(rows_N), COLUMNS[name])
        for part, place_M, local_M in self._by_part(rows_N):
            found_N[place_M] = part.columns[name][local_M]
        return found_N

    def pick(self, name: str, rows_N: Any, share_N: np.ndarray) -> np.ndarray:
        """Uint32 [N]: of each row's list the text at a share (0 <= share < 1) of it; F2Error for an empty list."""
        rows_N = self._checked(rows_N, self.row_starts, "row")
        found_N = np.empty(len(rows_N), COLUMNS[name])
        for part, place_M, local_M in self._by_part(rows_N):
            values = part.columns[name]
            start_M, end_M = _spans(part, part.columns[f"{name}_offsets"], local_M, len(values), name)
            if (start_M == end_M).any():
                raise part.damaged(f"a row has no {name}")
            found_N[place_M] = values[start_M + (share_N[place_M] * (end_M - start_M)).astype(np.int64)]
        return found_N

    def item(self, name: str, row: int) -> int:
        """What a row has in one of `ROW_COLUMNS`, or in the `_asked` of one."""
        part, local = self._place(row)
        return int(part.columns[name][local])

    def items(self, name: str, row: int) -> list[int]:
        """The texts in one of the lists of a row, or what these are behind the prompt."""
        part, local = self._place(row)
        offsets = part.columns[f"{name.removesuffix('_asked')}_offsets"]
        start, end = int(offsets[local]), int(offsets[local + 1])
        values = part.columns[name]
        if not start <= end <= len(values):
            raise part.damaged(f"its offsets of {name} lead outside of it")
        found: list[int] = values[start:end].tolist()
        return found

    def _place(self, row: int) -> tuple[_Mapped, int]:
        """The part that has a row, and where in it."""
        if not 0 <= row < self.row_count:
            self._checked([row], self.row_starts, "row")
        number = bisect_right(self._row_starts, row) - 1
        return self._mapped.get(number) or self._part(number), row - self._row_starts[number]

    def verify(self) -> None:
        """Read all parts and compare them with their checksums; F2Error names the first that differs."""
        for number, facts in enumerate(self.header.parts):
            path = self.folder / part_file(number)
            check_size(path, facts.size)
            if (found := sha256_file(path)) != facts.sha256:
                raise F2Error(
                    f"{path} was changed: its SHA-256 is {found[:16]}..., expected {facts.sha256[:16]}...; "
                    "make the token store again."
                )

    def _checked(self, numbers_N: Any, starts: np.ndarray, what: str) -> np.ndarray:
        numbers_N = np.asarray(numbers_N, dtype=np.int64)
        wrong_N = (numbers_N < 0) | (numbers_N >= starts[-1])
        if wrong_N.any():
            raise UsageError(
                f"{self.folder} has no {what} {numbers_N[wrong_N][0]}; its {starts[-1]:,} count from 0."
            )
        return numbers_N

    def _by_part(self, numbers_N: np.ndarray) -> Iterator[tuple[_Mapped, np.ndarray, np.ndarray]]:
        """Of each part concerned: the part, which of the rows lie in it [M], and where in it [M]."""
        part_N = np.searchsorted(self.row_starts, numbers_N, "right") - 1
        order_N = np.argsort(part_N, kind="stable")
        numbers, start = np.unique(part_N[order_N], return_index=True)
        for number, place_M in zip(numbers.tolist(), np.split(order_N, start[1:]), strict=False):
            yield self._part(number), place_M, numbers_N[place_M] - self.row_starts[number]

    def _part(self, number: int) -> _Mapped:
        if number not in self._mapped:
            path, facts = self.folder / part_file(number), self.header.parts[number]
            check_size(path, facts.size)
            try:
                with open(path, "rb") as file:
                    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:  # every mapped part is an open file
                raise F2Error(
                    f"{path} cannot be opened ({error.strerror}); where too many files are open, raise the limit: "
                    f"ulimit -n {len(self.header.parts) + 1024}."
                ) from None
            # Texts are read here and there: what the system would read ahead is of no use.
            content.madvise(mmap.MADV_RANDOM)
            places, _ = layout(facts.counts, self.header.vocab_size)
            columns = {
                name: np.frombuffer(content, dtype, facts.counts[name], start)
                for name, (dtype, start) in places.items()
            }
            for asked, name in ASKED.items():
                columns[asked] = columns[asked] if len(columns[asked]) else columns[name]
            tokens, offsets = columns[TOKENS].data, columns["offsets"].data
            part = _Mapped(path, columns, tokens, offsets, len(tokens))
            for name, values, first in SPANS:
                if columns[name][0] != first or columns[name][-1] != len(columns[values]):
                    raise part.damaged(f"its {name} do not lead from the first to the last of its {values}")
            self._mapped[number] = part
        return self._mapped[number]


def _spans(
    part: _Mapped, offsets: np.ndarray, local_M: np.ndarray, limit: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Int64 [M] each: beginning and end of the spans, inside 0 to `limit`."""
    start_M, end_M = offsets[local_M].astype(np.int64), offsets[local_M + 1].astype(np.int64)
    if (start_M > end_M).any() or (end_M > limit).any():
        raise part.damaged(f"its {name} lead outside of it")
    return start_M, end_M


def _starts(counts: list[int]) -> np.ndarray:
    """Int64: the number of the first text or row of each part, and at the end how many there are."""
    return np.concatenate(([0], np.cumsum(np.asarray(counts, dtype=np.int64))))
