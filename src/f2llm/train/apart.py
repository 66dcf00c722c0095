"""Batch neighbours without a text in common: rows that clash trade places with rows of other batches.

In-batch negatives are the documents of a query's neighbours, so a neighbour with the same query or the same document
is a negative lost. The usual remedy, to put a clashing row off until a batch has room for it, piles such rows up at the
end of the epoch, where nothing is left to put between them, and goes over them again for every batch. Trades keep all
places filled, need to look at the clashing rows alone, and know the whole epoch.

Shape suffixes: P places in a row of batches.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import chain

import numpy as np

# Most looks around for partners of the rows of one batch: so many, and so many more for each of its rows. Chance finds
# partners within a few, so these are spent only where hardly a row is of use.
LOOKS, LOOKS_PER_ROW = 256, 8


def keep_apart(text_P2: np.ndarray, batch_P: np.ndarray, fixed_P: np.ndarray, first: int = 0) -> np.ndarray:
    """Let rows trade places until no two of a batch share a text, as far as single trades achieve it.

    Rows that share no text with a batch neighbour stay, so a shuffled order remains one. A row that does goes to a
    batch that has none of its texts and has a row to give in return that meets none of its own where it comes to. No
    trade makes a clash, so one pass is enough; and there is a trade for every row if no text stands in more than a
    quarter as many rows as there are batches. Beyond that clashes may remain (to be rid of all is to colour the edges
    of a graph, NP-hard at the limit), and they must where a text has more rows than there are batches.

    Args:
        text_P2: integers, numbers of the two texts of the row at each place.
        batch_P: integers, ascending from 0 without a gap: the batch in which each place lies.
        fixed_P: bool, rows that stay where they are.
        first: the first batch whose rows look for partners; rows of those before it may become partners.

    Returns:
        int32 [P]: which of the rows comes to each place.
    """
    # Numbers of a large store are far apart, and there are no more of them here than texts.
    numbers, text_P2 = np.unique(text_P2, return_inverse=True)
    text_P2 = text_P2.reshape(-1, 2).astype(np.int32)
    alike_P = text_P2[:, 0] == text_P2[:, 1]
    if alike_P.any():  # one text, which does not clash with itself: the positive gets a number of its own
        text_P2[alike_P, 1] = len(numbers) + np.arange(alike_P.sum())
    suspects, spread_T = _suspects(text_P2, batch_P)
    suspects = suspects[(batch_P[suspects] >= first) & ~fixed_P[suspects]]
    if not len(suspects):
        return np.arange(len(batch_P), dtype=np.int32)
    seats = Seats(text_P2, batch_P, fixed_P, spread_T)
    for place in suspects.tolist():
        partner = next(seats.partners(place), None) if seats.clashes(place) else None
        if partner is not None:
            seats.trade(place, partner)
    return np.asarray(seats.order)


def _suspects(text_P2: np.ndarray, batch_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending places of rows that clash where it can be helped, and of each text the number of batches that hold it.

    Texts that a single row has are not counted (0).
    """
    batches = batch_P[-1] + 1
    repeated_P2 = np.bincount(text_P2.ravel())[text_P2] > 1
    place_R, _ = np.nonzero(repeated_P2)
    key_R = text_P2[repeated_P2].astype(np.int64) * batches + batch_P[place_R]
    key, inverse_R, rows = np.unique(key_R, return_inverse=True, return_counts=True)
    spread_T = np.bincount(key // batches, minlength=text_P2.max() + 1)
    clash = (rows > 1) & (spread_T[key // batches] < batches)
    return np.unique(place_R[clash[inverse_R]]), spread_T


class Seats:
    """Which row sits at which place, and which texts each batch holds by now.

    Single items are read and written, which memoryview does faster than NumPy, in a tenth of the memory of lists.
    """

    def __init__(
        self, text_P2: np.ndarray, batch_P: np.ndarray, fixed_P: np.ndarray, spread_T: np.ndarray
    ) -> None:
        self.order = np.arange(len(batch_P), dtype=np.int32).data
        # The texts of the row that sits at each place.
        self.one, self.two = (np.ascontiguousarray(text_P).data for text_P in text_P2.T)
        self.batch, self.fixed, self.spread = batch_P.data, fixed_P.data, spread_T.data
        self.batches = int(batch_P[-1]) + 1
        self.start = np.searchsorted(batch_P, np.arange(self.batches + 1)).tolist()
        self.looks_left = [LOOKS + LOOKS_PER_ROW * size for size in np.diff(self.start).tolist()]
        self._held: dict[int, Counter[int]] = {}

    def texts(self, place: int) -> tuple[int, int]:
        return self.one[place], self.two[place]

    def held(self, batch: int) -> Counter[int]:
        """How many rows of a batch have each of its texts."""
        if batch not in self._held:
            here = slice(self.start[batch], self.start[batch + 1])
            self._held[batch] = Counter(chain(self.one[here], self.two[here]))
        return self._held[batch]

    def clashes(self, place: int) -> bool:
        """Whether the row here shares a text with a neighbour, and there is a batch without that text."""
        here = self.held(self.batch[place])
        return any(here[t] > 1 and self.spread[t] < self.batches for t in self.texts(place))

    def partners(self, place: int) -> Iterator[int]:
        """Places of rows with which the row here may trade.

        Each seat of a batch begins its search elsewhere: where its neighbours found partners, their rows sit now.
        """
        home, texts = self.batch[place], self.texts(place)
        here, seat = self.held(home), place - self.start[home]
        for step in range(self.batches - 1):
            self.looks_left[home] -= 1
            if self.looks_left[home] < 0:
                return
            other = (home + 1 + (seat + step) % (self.batches - 1)) % self.batches
            there, start = self.held(other), self.start[other]
            if not self.may_go(texts, here, there):
                continue
            size = self.start[other + 1] - start
            for partner in (start + (seat + number) % size for number in range(size)):
                self.looks_left[home] -= 1
                if not self.fixed[partner] and self.may_go(self.texts(partner), there, here):
                    yield partner

    def may_go(self, texts: tuple[int, int], here: Counter[int], there: Counter[int]) -> bool:
        """Whether no text of a row here meets itself there; one that all batches hold may, if this one keeps it too."""
        for t in texts:  # noqa: SIM110 - all(...) takes twice as long
            if t in there and (here[t] == 1 or self.spread[t] < self.batches):
                return False
        return True

    def trade(self, place: int, partner: int) -> None:
        """Let the rows of two places change places."""
        self._count(self.texts(place), self.batch[place], self.batch[partner])
        self._count(self.texts(partner), self.batch[partner], self.batch[place])
        for seats in (self.order, self.one, self.two):
            seats[place], seats[partner] = seats[partner], seats[place]

    def _count(self, texts: tuple[int, int], home: int, other: int) -> None:
        """Count the texts of a row in another batch than before."""
        here, there = self.held(home), self.held(other)
        for t in texts:
            here[t] -= 1
            if not here[t]:
                del here[t]
                self.spread[t] -= 1
            self.spread[t] += t not in there
            there[t] += 1
