"""Numbers for the distinct texts of a corpus, in the order of their first appearance, in memory that stays flat.

part -> hashes of its distinct texts, sorted, on disk
ranges of hash values -> for each hash in the range, where it first appears        (each range alone, anywhere)
parts in order -> the number of each text of each part                             (one pass)

A text is known by 128 bits of BLAKE2b, so two texts are taken for one with a chance of 1e-20 in a corpus of a billion
texts. On disk a text takes 20 bytes for each part that it is in, and 12 more while numbers are given; in memory a
worker holds a range, `RANGE_TEXTS` texts of some 90 bytes, and the one pass holds a part.

Texts of a part have places: 0, 1 ... in order of appearance. Laid end to end, the places of all parts are global.

Shape suffixes: N texts of a part, R texts of a range.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from f2llm.engine import map_items
from f2llm.errors import F2Error
from f2llm.files import atomic_write, sync_folder

RANGE_TEXTS = 1 << 21
MOST_TEXTS = 2**32 - 1  # the last number of 32 bits stands for "no text"
NUMBERS_FILE = "numbers.bin"
HASH_BYTES = 16


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """Uint64 [N, 2]: the hash of each text."""
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest() for text in texts)
    return np.frombuffer(joined, "<u8").reshape(-1, 2)


@dataclass(frozen=True)
class HashFile:
    """Hashes of a part's texts: high halves, low halves and places, all in the order of the hashes."""

    path: Path
    count: int

    @staticmethod
    def write(path: Path, hash_N2: np.ndarray) -> None:
        order_N = np.lexsort((hash_N2[:, 1], hash_N2[:, 0]))  # stable: equal hashes stay in order of place
        with atomic_write(path) as file:
            file.write(hash_N2[order_N, 0].astype("<u8").tobytes())
            file.write(hash_N2[order_N, 1].astype("<u8").tobytes())
            file.write(order_N.astype("<u4").tobytes())

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """High halves (uint64), low halves and places (uint32), mapped."""
        if not self.count:
            return np.empty(0, "<u8"), np.empty(0, "<u8"), np.empty(0, "<u4")
        if self.path.stat().st_size != 20 * self.count:
            raise F2Error(
                f"{self.path} has not the {20 * self.count:,} bytes that it had; make the store again."
            )
        content = np.memmap(self.path, np.uint8, mode="r").view(np.ndarray)
        high, low, place = np.split(content, [8 * self.count, 16 * self.count])
        return high.view("<u8"), low.view("<u8"), place.view("<u4")


@dataclass(frozen=True)
class _Range:
    number: int
    ranges: int
    files: tuple[HashFile, ...]
    out: Path

    @property
    def path(self) -> Path:
        return self.out / f"first-{self.number:05}.bin"

    def slice(self, high_N: np.ndarray) -> slice:
        """Where the hashes of this range stand among sorted high halves."""
        edges = [(number << 64) // self.ranges for number in (self.number, self.number + 1)]
        inner = np.asarray([edge for edge in edges if edge < 1 << 64], np.uint64)  # the last range has no end
        return slice(*[*np.searchsorted(high_N, inner).tolist(), len(high_N)][:2])


def number_texts(files: Sequence[HashFile], work: Path) -> tuple[np.ndarray, np.ndarray]:
    """Give the distinct texts of parts their numbers.

    Args:
        files: the hashes of each part, in order.
        work: a folder for files of its own, and for those of no other list of parts.

    Returns:
        Uint32, mapped: the number of the text at each global place; int64 [parts + 1]: the global place at which each
        part begins. A part's new texts have ascending numbers, above those of all earlier parts.
    """
    starts = np.concatenate(([0], np.cumsum([file.count for file in files], dtype=np.int64)))
    path = work / NUMBERS_FILE
    if not path.exists():
        ranges = max(1, -(-int(starts[-1]) // RANGE_TEXTS))
        work.mkdir(parents=True, exist_ok=True)
        items = [_Range(number, ranges, tuple(files), work) for number in range(ranges)]
        for _ in map_items(_find_first, items, what="number texts", unit="range"):
            pass
        _give_numbers(items, starts, path)
    return np.memmap(path, "<u4", mode="r").view(np.ndarray), starts


def _find_first(item: _Range) -> None:
    """Write, for each hash of the range in each part, the global place of its first appearance.

    The file has for each part how many hashes it has in the range, then the places (uint64) part by part.
    """
    if item.path.exists():
        return
    high_parts, low_parts, place_parts, start = [], [], [], 0
    for file in item.files:
        high, low, place = file.columns()
        taken = item.slice(high)
        high_parts.append(high[taken])
        low_parts.append(low[taken])
        place_parts.append(place[taken].astype(np.uint64) + np.uint64(start))
        start += file.count
    high_R, low_R, place_R = (np.concatenate(found) for found in (high_parts, low_parts, place_parts))
    # Stable, and parts and places ascend, so of equal hashes the first comes first.
    order_R = np.lexsort((low_R, high_R))
    high_R, low_R = high_R[order_R], low_R[order_R]
    is_first_R = np.ones(len(order_R), dtype=bool)
    is_first_R[1:] = (high_R[1:] != high_R[:-1]) | (low_R[1:] != low_R[:-1])
    first_R = np.empty(len(order_R), dtype="<u8")
    first_R[order_R] = place_R[order_R][is_first_R][np.cumsum(is_first_R) - 1]
    with atomic_write(item.path) as out:
        out.write(np.asarray([len(found) for found in high_parts], "<u8").tobytes())
        out.write(first_R.tobytes())


def _give_numbers(ranges: Sequence[_Range], starts: np.ndarray, path: Path) -> None:
    """Write the number of the text at each global place to `path`."""
    parts = len(starts) - 1
    first = [np.memmap(item.path, "<u8", mode="r").view(np.ndarray) for item in ranges]
    cursors = [parts] * len(ranges)  # where the answers for the next part begin in each file
    temporary = path.with_suffix(".tmp")
    numbers = np.memmap(temporary, "<u4", mode="w+", shape=int(starts[-1]))
    following = 0
    for part, file in enumerate(ranges[0].files):
        answers = []
        for index, answer in enumerate(first):
            count = int(answer[part])
            answers.append(answer[cursors[index] : cursors[index] + count])
            cursors[index] += count
        first_N = np.empty(file.count, dtype=np.int64)
        first_N[file.columns()[2]] = np.concatenate(answers)
        own_N = np.arange(starts[part], starts[part + 1])
        new_N = own_N[first_N == own_N]
        if following + len(new_N) > MOST_TEXTS:
            raise F2Error(
                f"the rows have more than {MOST_TEXTS:,} distinct texts, the most that a token store can hold; "
                "divide them between two stores."
            )
        numbers[new_N] = np.arange(following, following + len(new_N))
        numbers[own_N] = numbers[first_N]
        following += len(new_N)
    numbers.flush()
    del numbers
    os.replace(temporary, path)
    sync_folder(path.parent)
