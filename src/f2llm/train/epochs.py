"""An endless stream of a source's rows, epoch after epoch: how many of which, and who comes together in a batch.

capped sizes of languages -> share of each in an epoch -> its rows, shuffled -> rows of a batch kept apart -> batches

An epoch is a function of (seed, source, epoch) and, where its last batch goes over into the next epoch, of the rows
that this one opens with. So any batch can be had at once, and having had the batches before it makes it cheap: an
epoch is made in one go and kept, and a batch is a slice.

Shape suffixes: N rows of the source, M rows of an epoch, L languages, P places in a row of batches, B rows of a batch.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from f2llm.rng import generator
from f2llm.train.apart import keep_apart
from f2llm.train.sources import SourceRows

CapBy = Literal["source", "language"]


@dataclass(frozen=True)
class Picked:
    """Rows, and what the epoch draws for each of them."""

    row_M: np.ndarray  # int32, row numbers
    share_M: np.ndarray  # float64 in [0, 1): chooses the positive among those that the row has to choose from

    def take(self, places: np.ndarray | slice) -> "Picked":
        return Picked(self.row_M[places], self.share_M[places])


class RowStream:
    """Batches of one source, by number.

    Args:
        cap: most rows of the source, or (`cap_by` language) of each of its languages, in an epoch.
        language_temperature: T; a language has a share of the epoch in proportion to (its capped rows) ** (1 / T).
    """

    def __init__(
        self,
        rows: SourceRows,
        *,
        seed: int,
        batch_size: int,
        cap: int | None,
        cap_by: CapBy,
        language_temperature: float,
    ) -> None:
        self.rows, self.seed, self.batch_size = rows, seed, batch_size
        self.capped_L = _capped_sizes(rows, cap, cap_by)
        self.share_L = self.capped_L ** (1.0 / language_temperature)
        # Sources take turns, so each keeps epochs of its own: the present one in its order, the next one shuffled.
        self._shuffled, self._ordered = lru_cache(1)(self._shuffle), lru_cache(1)(self._order)

    @property
    def epoch_size(self) -> int:
        """Rows in an epoch: those of the source, capped."""
        return round(self.capped_L.sum())

    def __getitem__(self, turn: int) -> Picked:
        """The source's batch 0, 1, ...; one that spans epochs has the end of one and the beginning of the next."""
        epoch_B, place_B = np.divmod(
            np.arange(turn * self.batch_size, (turn + 1) * self.batch_size), self.epoch_size
        )
        parts = [self._ordered(int(e)).take(place_B[epoch_B == e]) for e in np.unique(epoch_B)]
        return Picked(
            np.concatenate([part.row_M for part in parts]), np.concatenate([part.share_M for part in parts])
        )

    def _shuffle(self, epoch: int) -> Picked:
        """The rows of an epoch in its random order, kept apart within the epoch."""
        rng = generator(self.seed, "epoch", self.rows.source.name, epoch)
        row_M = rng.permutation(self._choose(rng))
        picked = Picked(row_M, rng.random(len(row_M)))
        if not self.rows.is_retrieval:  # batch neighbours never meet
            return picked
        return picked.take(keep_apart(self._texts(picked), self._batches(epoch), np.zeros(len(row_M), bool)))

    def _choose(self, rng: np.random.Generator) -> np.ndarray:
        """Rows of an epoch, int32 [M]: of each language its share, and each row once before any comes again."""
        count_L = share_out(self.share_L, self.epoch_size, rng.random())
        chosen = []
        for pool, count in zip(self.rows.rows_by_language.values(), count_L.tolist(), strict=True):
            times, rest = divmod(count, len(pool))
            chosen += [*[pool] * times, rng.permutation(pool)[:rest]]
        return np.concatenate(chosen)

    def _order(self, epoch: int) -> Picked:
        """`_shuffle`, with the rows of the last batch kept apart from those that the next epoch adds to it.

        The rows that this epoch itself adds to a batch of the last one stay: that one has relied on them.
        """
        picked, batch_M = self._shuffled(epoch), self._batches(epoch)
        start, end = epoch * self.epoch_size, (epoch + 1) * self.epoch_size
        if not self.rows.is_retrieval or end % self.batch_size == 0:
            return picked
        added = self._shuffled(epoch + 1).take(slice(-end % self.batch_size))
        is_added = np.arange(len(batch_M) + len(added.row_M)) >= len(batch_M)
        batch_P = np.append(batch_M, np.full(len(added.row_M), batch_M[-1]))
        order_P = keep_apart(
            np.concatenate((self._texts(picked), self._texts(added))),
            batch_P,
            fixed_P=is_added | ((batch_P == 0) & (start % self.batch_size > 0)),
            first=batch_M[-1],
        )
        return picked.take(order_P[: len(batch_M)])

    def _texts(self, picked: Picked) -> np.ndarray:
        return self.rows.query_and_positive(picked.row_M, picked.share_M)

    def _batches(self, epoch: int) -> np.ndarray:
        """Int32 [M], ascending from 0: the batch in which each place of an epoch lies."""
        offset = epoch * self.epoch_size % self.batch_size
        return np.arange(offset, offset + self.epoch_size, dtype=np.int32) // np.int32(self.batch_size)


def _capped_sizes(rows: SourceRows, cap: int | None, cap_by: CapBy) -> np.ndarray:
    """Float64 [L]: rows that each language has in an epoch at T = 1; a cap of the source cuts all in proportion."""
    size_L = np.asarray([len(pool) for pool in rows.rows_by_language.values()], dtype=np.float64)
    if cap is None or not len(rows):
        return size_L
    return np.minimum(size_L, cap) if cap_by == "language" else size_L * min(1.0, cap / len(rows))


def share_out(weight_L: np.ndarray, total: int, offset: float) -> np.ndarray:
    """Int64 [L] that adds up to `total`: each in proportion to its weight, rounded up or down.

    The shares are laid end to end and cut at whole numbers less `offset` (0 <= offset < 1; systematic sampling), so
    that over random offsets each count is on average exactly its share: what is rounded to nothing now comes later.
    """
    edge_L = np.cumsum(weight_L) * total / weight_L.sum()
    edge_L[-1] = total
    return np.diff(np.floor(edge_L.round(6) + offset).astype(np.int64), prepend=0)
