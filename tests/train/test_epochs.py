"""A source's stream of rows: how often each row comes in an epoch, against plain counting, and who comes together."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from f2llm.data.rows import Source
from f2llm.train.epochs import Picked, RowStream, share_out
from f2llm.train.sources import SourceRows


def rows_of(
    languages: list[str],
    queries: list[str] | None = None,
    positives: list[list[str]] | None = None,
    format: Any = "retrieval",
) -> SourceRows:
    count = len(languages)
    return SourceRows(
        source=Source(name="s", format=format, task="t", symmetric=True, instruction="", licence="CC0-1.0"),
        query=queries or [f"q{i}" for i in range(count)],
        query_lang=languages,
        positives=positives or [[f"p{i}"] for i in range(count)],
        negatives=[[]] * count,
        label=[None] * count,
    )


def stream(rows: SourceRows, **changes: Any) -> RowStream:
    settings: dict[str, Any] = {
        "seed": 5,
        "batch_size": 8,
        "cap": None,
        "cap_by": "source",
        "language_temperature": 1.0,
    }
    return RowStream(rows, **{**settings, **changes})


def epochs(batches: RowStream, count: int) -> Iterator[list[int]]:
    """Row numbers of each of the first epochs, cut out of as many batches as that takes."""
    size = batches.epoch_size
    turns = math.ceil(count * size / batches.batch_size)
    drawn = [row for turn in range(turns) for row in batches[turn].row_M.tolist()]
    for start in range(0, count * size, size):
        yield drawn[start : start + size]


def expected_share(sizes: dict[str, int], cap: int | None, cap_by: str, temperature: int) -> dict[str, float]:
    """Rows of each language in an epoch, before rounding."""
    total = sum(sizes.values())
    if cap is None:
        capped = {name: Fraction(size) for name, size in sizes.items()}
    elif cap_by == "source":
        capped = {name: Fraction(size * min(cap, total), total) for name, size in sizes.items()}
    else:
        capped = {name: Fraction(min(size, cap)) for name, size in sizes.items()}
    if temperature == 1:
        return {name: float(size) for name, size in capped.items()}
    weights = {name: float(size) ** (1 / temperature) for name, size in capped.items()}
    return {
        name: float(sum(capped.values())) * weight / sum(weights.values()) for name, weight in weights.items()
    }


# --- How often each row comes


@pytest.mark.parametrize("format", ["retrieval", "classification"])
@pytest.mark.parametrize("temperature", [1, 2, 5])
@pytest.mark.parametrize("cap_by", ["source", "language"])
@pytest.mark.parametrize("cap", [None, 1, 9, 40, 1000])
def test_epochs_hold_what_was_planned(cap: int | None, cap_by: str, temperature: int, format: str) -> None:
    """Random sources; each language has its share, rounded up or down, and no row comes again before all have come."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        sizes = {f"l{i}": int(rng.integers(1, 60)) for i in range(int(rng.integers(1, 6)))}
        languages = [name for name, size in sizes.items() for _ in range(size)]
        languages = [languages[i] for i in rng.permutation(len(languages))]
        rows = rows_of(languages, format=format)
        batches = stream(rows, cap=cap, cap_by=cap_by, language_temperature=float(temperature), seed=seed)
        shares = expected_share(sizes, cap, cap_by, temperature)
        assert batches.epoch_size == round(sum(shares.values()))
        if cap is not None:
            assert batches.epoch_size <= cap * (1 if cap_by == "source" else len(sizes))
        for drawn in epochs(batches, 3):
            by_language = Counter(languages[row] for row in drawn)
            assert by_language.total() == batches.epoch_size
            times = Counter(drawn)
            for name, share in shares.items():
                assert math.floor(share - 1e-6) <= by_language[name] <= math.ceil(share + 1e-6)
                every = [times[row] for row in range(len(languages)) if languages[row] == name]
                assert max(every) - min(every) <= 1
                if cap is not None and cap_by == "language":
                    assert by_language[name] <= cap


def test_without_cap_and_temperature_each_row_comes_once_an_epoch_in_another_order() -> None:
    drawn = list(epochs(stream(rows_of(["a"] * 13 + ["b"] * 7)), 6))
    assert all(sorted(epoch) == list(range(20)) for epoch in drawn)
    assert len({tuple(epoch) for epoch in drawn}) == 6


def test_epochs_of_a_capped_source_draw_other_rows() -> None:
    """Ten epochs of a tenth of the rows see about 1 - 0.9 ** 10 = 65 % of them, and none more often than ten times."""
    drawn = list(epochs(stream(rows_of(["a"] * 1000), cap=100), 10))
    assert all(len(set(epoch)) == 100 for epoch in drawn)
    assert abs(len({row for epoch in drawn for row in epoch}) - 651) < 60


def test_temperature_brings_small_languages_back_and_leaves_large_ones_out() -> None:
    """sqrt(900) : sqrt(100) is 3 : 1, so of 1000 rows 750 and 250."""
    batches = stream(rows_of(["big"] * 900 + ["small"] * 100), language_temperature=2.0)
    for drawn in epochs(batches, 2):
        times = Counter(drawn)
        assert sorted(times[row] for row in range(900)) == [0] * 150 + [1] * 750
        assert sorted(times[row] for row in range(900, 1000)) == [2] * 50 + [3] * 50


def test_a_language_too_small_for_a_whole_row_comes_in_its_share_of_the_epochs() -> None:
    """Ten languages share one row of an epoch, a tenth each; over 300 epochs each comes about 30 times."""
    rows = rows_of(["big"] * 990 + [f"small{i}" for i in range(10)])
    batches = stream(rows, cap=100, batch_size=100)
    seen = Counter(rows.query_lang[row] for drawn in epochs(batches, 300) for row in drawn)
    assert seen["big"] == pytest.approx(300 * 99, abs=60)
    assert all(10 < seen[f"small{i}"] < 60 for i in range(10))


@pytest.mark.parametrize("seed", range(20))
def test_shares_add_up_and_are_off_by_less_than_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight_L, total = rng.random(int(rng.integers(1, 50))) ** 3 + 1e-9, int(rng.integers(0, 1000))
    counts = [share_out(weight_L, total, offset) for offset in (0.0, 0.25, 0.999999, rng.random())]
    exact = weight_L / weight_L.sum() * total
    for count_L in counts:
        assert count_L.sum() == total and (count_L >= 0).all()
        assert np.abs(count_L - exact).max() < 1 + 1e-5
    mean = np.mean([share_out(weight_L, total, offset) for offset in np.arange(500) / 500], axis=0)
    assert mean == pytest.approx(exact, abs=0.01)


def test_whole_shares_are_not_rounded_at_any_offset() -> None:
    sizes = np.array([3.0, 1.0, 1_000_000.0, 7.0])
    for offset in np.linspace(0, 1, 101, endpoint=False):
        assert share_out(sizes, 1_000_011, float(offset)).tolist() == [3, 1, 1_000_000, 7]
    for count in (3, 7, 10, 49):  # sums of such fractions are not exact
        assert share_out(np.full(count, 1 / count), 10 * count, 0.0).tolist() == [10] * count
        assert share_out(np.full(count, 0.1), 10 * count, 0.0).tolist() == [10] * count


# --- Who comes together


def with_clashes(rows: SourceRows, batches: Iterable[Picked]) -> int:
    """Batches in which two rows share a query or a positive, or the positive of one is the query of another."""
    found = 0
    for picked in batches:
        texts: list[str] = []
        for row, share in zip(picked.row_M.tolist(), picked.share_M.tolist(), strict=True):
            positives = rows.positives[row]
            texts += {rows.query[row], positives[int(share * len(positives))]}
        found += len(set(texts)) < len(texts)
    return found


def related_rows(seed: int, count: int) -> SourceRows:
    """Queries three times each, positives shared as well and several to choose from, some of them queries of others."""
    rng = np.random.default_rng(seed)
    queries = [f"t{i // 3}" for i in rng.permutation(count)]
    positives = [
        [f"t{count // 6 + i // 2}" for i in rng.integers(count, size=int(rng.integers(1, 4)))]
        for _ in range(count)
    ]
    return rows_of(["a"] * count, queries, positives)


@pytest.mark.parametrize("batch_size", [8, 12, 25])
@pytest.mark.parametrize("seed", range(5))
def test_no_two_rows_of_a_batch_share_a_text(seed: int, batch_size: int) -> None:
    """Batches that span two epochs included: of 401 rows, nearly every epoch ends within one."""
    rows = related_rows(seed, 401)
    turns = 5 * 401 // batch_size
    batches = stream(rows, seed=seed, batch_size=batch_size)
    assert with_clashes(rows, (batches[turn] for turn in range(turns))) == 0
    rng = np.random.default_rng(seed)
    by_chance = [Picked(rng.permutation(401)[:batch_size], rng.random(batch_size)) for _ in range(turns)]
    assert with_clashes(rows, by_chance) > turns / 4


def test_rows_that_a_temperature_repeats_are_kept_apart_too() -> None:
    rows = rows_of(["big"] * 400 + ["small"] * 10)
    batches = stream(rows, language_temperature=2.0, batch_size=10)
    assert max(Counter(next(epochs(batches, 1))).values()) > 4
    assert with_clashes(rows, (batches[turn] for turn in range(150))) == 0


def test_a_seam_between_epochs_is_kept_clear_even_where_there_is_little_room() -> None:
    """30 rows in batches of 8: every fourth batch is of two epochs, and by chance about half of those would clash."""
    rows = rows_of(["a"] * 30)
    for seed in range(5):
        batches = stream(rows, seed=seed)
        assert with_clashes(rows, (batches[turn] for turn in range(400))) == 0


@pytest.mark.parametrize(("count", "batch_size"), [(5, 12), (1, 3), (12, 12), (13, 12)])
def test_sources_smaller_than_a_batch_fill_it_epoch_by_epoch(count: int, batch_size: int) -> None:
    batches = stream(rows_of(["a"] * count), batch_size=batch_size)
    assert all(len(batches[turn].row_M) == batch_size for turn in range(7))
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs(batches, 7))


def test_clashes_that_cannot_be_helped_lose_no_row() -> None:
    """One positive for all rows, and one query for half of them."""
    rows = rows_of(["a"] * 50, ["q"] * 25 + [f"q{i}" for i in range(25)], [["p"]] * 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs(stream(rows), 5))


@pytest.mark.parametrize("seed", range(20))
def test_rows_that_share_all_they_have_come_as_planned(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, batch_size = int(rng.integers(1, 60)), int(rng.integers(2, 20))
    queries = [f"t{i}" for i in rng.integers(6, size=count)]
    rows = rows_of(["a"] * count, queries, [[f"t{i}"] for i in rng.integers(9, size=count)])
    drawn = list(epochs(stream(rows, batch_size=batch_size, seed=seed), 6))
    assert all(sorted(epoch) == list(range(count)) for epoch in drawn)


def test_positives_are_drawn_anew_for_each_epoch() -> None:
    rows = rows_of(["a"] * 16, positives=[["x", "y", "z"]] * 16)
    batches = stream(rows, batch_size=16)
    shares = np.stack([batches[turn].share_M[np.argsort(batches[turn].row_M)] for turn in range(60)])
    assert np.bincount((shares * 3).astype(int).ravel(), minlength=3).min() > 250  # of 320 expected
    assert len(np.unique(shares)) == shares.size


# --- A function of the seed and the number


def test_batches_are_the_same_in_any_order_and_from_any_object() -> None:
    rows = related_rows(0, 101)
    changes: dict[str, Any] = {"cap": 61, "language_temperature": 2.0, "batch_size": 7}
    straight = stream(rows, **changes)
    expected = [straight[turn] for turn in range(60)]
    back_and_forth = stream(rows, **changes)
    for turn in np.random.default_rng(0).permutation(60).tolist():
        for batches in (back_and_forth, stream(rows, **changes)):
            assert np.array_equal(batches[turn].row_M, expected[turn].row_M)
            assert np.array_equal(batches[turn].share_M, expected[turn].share_M)
    namesake = replace(rows, source=rows.source.model_copy(update={"name": "other"}))
    for other in (stream(rows, **changes, seed=6), stream(namesake, **changes)):
        assert not any(np.array_equal(other[turn].row_M, expected[turn].row_M) for turn in range(60))


def test_a_warm_stream_makes_no_epoch_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty batches in order over five epochs: each epoch is made once, and one more to know where the last goes."""
    made: list[int] = []
    shuffle = RowStream._shuffle

    def noted(self: RowStream, epoch: int) -> Picked:
        made.append(epoch)
        return shuffle(self, epoch)

    monkeypatch.setattr(RowStream, "_shuffle", noted)
    batches = stream(rows_of(["a"] * 100))
    for turn in range(60):
        _ = batches[turn]
    assert made == [0, 1, 2, 3, 4, 5]
