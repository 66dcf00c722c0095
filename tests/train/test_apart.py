"""Batch neighbours without a text in common: what trades achieve, and what they leave alone."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from f2llm.train.apart import LOOKS, LOOKS_PER_ROW, Seats, keep_apart


def clashes(text_P2: np.ndarray, batch_P: np.ndarray) -> int:
    """Rows that would have to leave, counted text by text: in each batch all holders of a text but one."""
    count = 0
    for batch in set(batch_P.tolist()):
        here = Counter(text for pair in text_P2[batch_P == batch].tolist() for text in set(pair))
        count += sum(holders - 1 for holders in here.values())
    return count


def batches_of(size: int, places: int, offset: int = 0) -> np.ndarray:
    return (np.arange(places) + offset) // size - offset // size


def free(places: int) -> np.ndarray:
    return np.zeros(places, dtype=bool)


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows whose texts are shared more or less, in batches of which the first and the last may be short."""
    rng = np.random.default_rng(seed)
    places, size = int(rng.integers(1, 300)), int(rng.integers(1, 40))
    texts = int(rng.integers(1, 2 * places + 1))
    text_P2 = rng.integers(texts, size=(places, 2))
    return (
        text_P2,
        batches_of(size, places, int(rng.integers(size))),
        rng.random(places) < rng.choice([0, 0.3]),
    )


@pytest.mark.parametrize("seed", range(60))
def test_every_row_stays_or_trades_and_nothing_gets_worse(seed: int) -> None:
    text_P2, batch_P, fixed_P = random_case(seed)
    before = text_P2.copy()
    order_P = keep_apart(text_P2, batch_P, fixed_P)
    assert np.array_equal(text_P2, before)
    assert np.array_equal(np.sort(order_P), np.arange(len(batch_P)))
    assert np.array_equal(order_P[fixed_P], np.flatnonzero(fixed_P))
    assert clashes(text_P2[order_P], batch_P) <= clashes(text_P2, batch_P)
    assert np.array_equal(keep_apart(text_P2, batch_P, fixed_P), order_P)


@pytest.mark.parametrize("seed", range(30))
def test_no_clash_is_left_where_no_text_is_in_more_than_a_quarter_as_many_rows_as_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batches, size = int(rng.integers(8, 60)), int(rng.integers(2, 30))
    places = batches * size
    each = batches // 4  # rows of a text, of queries as of positives: the most that is promised
    queries, positives = rng.permutation(places) // each, places + rng.permutation(places) // each
    text_P2, batch_P = np.stack((queries, positives), axis=1), batches_of(size, places)
    assert Counter(text_P2.ravel().tolist()).most_common(1)[0][1] == each
    order_P = keep_apart(text_P2, batch_P, free(places))
    assert clashes(text_P2[order_P], batch_P) == 0


def test_rows_that_do_not_clash_stay_but_for_partners() -> None:
    rng = np.random.default_rng(0)
    text_P2, batch_P = rng.integers(4000, size=(4000, 2)), batches_of(50, 4000)
    found = clashes(text_P2, batch_P)
    order_P = keep_apart(text_P2, batch_P, free(4000))
    assert clashes(text_P2[order_P], batch_P) == 0
    assert found > 50 and 0 < (order_P != np.arange(4000)).sum() <= 2 * found


def test_queries_and_positives_are_texts_of_one_kind() -> None:
    """The positive of one row is the query of another: the second and third row must part."""
    text_P2 = np.array([[0, 1], [2, 3], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [15, 16]])
    batch_P = batches_of(3, 9)
    order_P = keep_apart(text_P2, batch_P, free(9))
    assert clashes(text_P2, batch_P) == 1 and clashes(text_P2[order_P], batch_P) == 0


def test_a_row_whose_texts_are_equal_does_not_clash_with_itself_but_does_with_others() -> None:
    alike = np.array([[0, 0], [1, 2], [3, 6], [4, 5]])
    assert keep_apart(alike, batches_of(2, 4), free(4)).tolist() == [0, 1, 2, 3]
    twice = np.array([[0, 0], [0, 1], [2, 3], [4, 4]])
    order_P = keep_apart(twice, batches_of(2, 4), free(4))
    assert clashes(twice[order_P], batches_of(2, 4)) == 0


def test_what_all_rows_share_does_not_keep_the_rest_from_parting() -> None:
    """One positive for all: nothing to be done about it, but queries can be kept apart all the same."""
    rng = np.random.default_rng(1)
    everywhere = np.stack((1 + rng.permutation(600) // 3, np.zeros(600, dtype=np.int64)), axis=1)
    batch_P = batches_of(20, 600)
    assert clashes(everywhere, batch_P) > 30 * 19
    order_P = keep_apart(everywhere, batch_P, free(600))
    assert (
        clashes(everywhere[order_P], batch_P) == 30 * 19
    )  # of each batch all but one, for the positive alone
    alone = np.stack((1 + np.arange(600), np.zeros(600, dtype=np.int64)), axis=1)
    assert np.array_equal(keep_apart(alone, batch_P, free(600)), np.arange(600))


def test_a_text_of_more_rows_than_batches_is_spread_over_all_of_them() -> None:
    """40 of 300 rows share a text, in 30 batches: 10 clashes are the least, and chance leaves more."""
    rng = np.random.default_rng(2)
    text_P2 = np.stack((1 + np.arange(300), 1000 + np.arange(300)), axis=1)
    text_P2[rng.permutation(300)[:40], 1] = 0
    batch_P = batches_of(10, 300)
    assert clashes(text_P2, batch_P) > 10
    assert clashes(text_P2[keep_apart(text_P2, batch_P, free(300))], batch_P) == 10


@pytest.mark.parametrize("seed", range(20))
def test_a_text_that_has_come_to_all_batches_does_not_hold_its_rows_back(seed: int) -> None:
    """60 of 300 rows share a positive: in 30 batches 30 clashes of it must stay, but none of the queries."""
    rng = np.random.default_rng(seed)
    text_P2 = np.stack((1000 + rng.permutation(300) // 5, 1 + np.arange(300)), axis=1)
    text_P2[rng.permutation(300)[:60], 1] = 0
    batch_P = batches_of(10, 300)
    order_P = keep_apart(text_P2, batch_P, free(300))
    assert clashes(text_P2[order_P, :1], batch_P) == 0
    assert clashes(text_P2[order_P], batch_P) == 30


def test_rows_before_the_first_batch_named_are_partners_only() -> None:
    text_P2 = np.array([[0, 1], [2, 3], [2, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [13, 15]])
    batch_P = batches_of(3, 9)
    order_P = keep_apart(text_P2, batch_P, free(9), first=1)
    assert order_P[:3].tolist() == [0, 1, 2]
    assert clashes(text_P2, batch_P) == 2 and clashes(text_P2[order_P], batch_P) == 1
    fixed_P = batch_P == 1
    order_P = keep_apart(text_P2, batch_P, fixed_P, first=2)
    assert clashes(text_P2[order_P][6:], batch_P[6:]) == 0 and order_P[3:6].tolist() == [3, 4, 5]


def test_rows_without_hope_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text is in more rows than there are batches: looks at partners stay below so many for each batch."""
    looks = 0
    may_go = Seats.may_go

    def counted(self: Seats, *args: Any) -> bool:
        nonlocal looks
        looks += 1
        return may_go(self, *args)

    monkeypatch.setattr(Seats, "may_go", counted)
    rng = np.random.default_rng(3)
    text_P2 = np.stack((rng.integers(40, size=20_000), 40 + rng.integers(40, size=20_000)), axis=1)
    batch_P = batches_of(100, 20_000)
    order_P = keep_apart(text_P2, batch_P, free(20_000))
    assert clashes(text_P2[order_P], batch_P) < clashes(text_P2, batch_P)
    assert (
        0 < looks <= 200 * (LOOKS + (LOOKS_PER_ROW + 1) * 100) < 300_000
    )  # 20,000 rows times 200 batches: 4 million
