"""Columns of a source: parts of them, what they say is right, and which rows are held out."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from f2llm.data.rows import Source
from f2llm.train.sources import SourceRows, hold_out


def rows_of(format: Any, query: list[str], **columns: list[Any]) -> SourceRows:
    count = len(query)
    filled: dict[str, Any] = {
        "query_lang": ["und"] * count,
        "positives": [[]] * count,
        "negatives": [[]] * count,
        "label": [None] * count,
        **columns,
    }
    facts = Source(name="s", format=format, task="t", symmetric=True, instruction="", licence="CC0-1.0")
    return SourceRows(source=facts, query=query, **filled)


def random_retrieval(seed: int, count: int = 60) -> SourceRows:
    """Rows that share queries, labels and positives."""
    rng = np.random.default_rng(seed)
    labels = [None, *(f"thing {i}" for i in range(20))]
    return rows_of(
        "retrieval",
        [f"t{i}" for i in rng.integers(40, size=count)],
        query_lang=[f"l{i}" for i in rng.integers(3, size=count)],
        positives=[[f"t{i}" for i in rng.integers(50, size=rng.integers(1, 5))] for _ in range(count)],
        negatives=[[f"n{i}"] for i in range(count)],
        label=[labels[i] for i in rng.integers(21, size=count)],
    )


def lines(rows: SourceRows) -> list[tuple[Any, ...]]:
    """Every row as one value."""
    columns = (
        rows.query,
        rows.query_lang,
        map(tuple, rows.positives),
        map(tuple, rows.negatives),
        rows.label,
    )
    return list(zip(*columns, strict=True))


# --- Parts, groups, numbers


def test_take_gives_the_rows_asked_for_with_groups_of_their_own() -> None:
    rows = random_retrieval(0)
    numbers = np.array([5, 3, 3, 59])
    part = rows.take(numbers)
    assert lines(part) == [lines(rows)[n] for n in numbers]
    assert part.source is rows.source and len(part) == 4
    groups = part.rows_by_language
    assert {name: sorted(group.tolist()) for name, group in groups.items()} == {
        name: [i for i, lang in enumerate(part.query_lang) if lang == name] for name in part.query_lang
    }
    assert len(rows.take(np.arange(0))) == 0


@pytest.mark.parametrize("seed", range(5))
def test_answers_are_gathered_over_rows_with_the_same_query_or_label(seed: int) -> None:
    rows = random_retrieval(seed)
    for row in range(len(rows)):
        expected = set()
        for other in range(len(rows)):
            same_thing = rows.label[row] is not None and rows.label[row] == rows.label[other]
            if rows.query[row] == rows.query[other] or same_thing:
                expected |= set(rows.positives[other])
        assert rows.answers(row) == expected


@pytest.mark.parametrize("format", ["clustering", "classification"])
def test_answers_of_other_formats_are_the_labels_of_the_text(format: str) -> None:
    rows = rows_of(format, ["a", "b", "a", "c"], label=["x", "y", "y", "x"])
    assert [rows.answers(row) for row in range(4)] == [{"x", "y"}, {"y"}, {"x", "y"}, {"x"}]
    assert rows.labels == ["x", "y"]


def test_numbers_are_equal_where_texts_are() -> None:
    rows = random_retrieval(3)
    rng = np.random.default_rng(0)
    row_T, share_T = rng.integers(60, size=500), np.append(rng.random(498), [0.0, np.nextafter(1, 0)])
    number_T2 = rows.query_and_positive(row_T, share_T)
    texts = [
        (rows.query[row], rows.positives[row][int(share * len(rows.positives[row]))])
        for row, share in zip(row_T.tolist(), share_T.tolist(), strict=True)
    ]
    pairs = set(zip((text for pair in texts for text in pair), number_T2.ravel().tolist(), strict=True))
    assert len(pairs) == len({text for text, _ in pairs}) == len({number for _, number in pairs})


# --- Holding out


@pytest.mark.parametrize("count", [0, 1, 5, 20, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_held_out_rows_are_whole_queries_and_few(seed: int, count: int) -> None:
    rows = random_retrieval(seed, count=200)
    train, held = hold_out(rows, count, seed)
    assert Counter(lines(train)) + Counter(lines(held)) == Counter(lines(rows))
    assert not set(train.query) & set(held.query)
    largest = max(Counter(rows.query).values())
    assert min(count, 20) - largest < len(held) <= min(count, 20)
    order = {line: place for place, line in reversed(list(enumerate(lines(rows))))}
    assert [order[line] for line in lines(held)] == sorted(order[line] for line in lines(held))


def test_single_rows_are_held_out_to_the_full_number() -> None:
    rows = rows_of("retrieval", [f"q{i}" for i in range(300)], positives=[["p"]] * 300)
    assert [len(hold_out(rows, count, 0)[1]) for count in (7, 29, 30, 31, 256)] == [7, 29, 30, 30, 30]
    few = rows.take(np.arange(9))
    assert len(hold_out(few, 256, 0)[1]) == 0


@pytest.mark.parametrize("format", ["retrieval", "clustering"])
def test_the_choice_depends_on_texts_and_seed_but_not_on_the_order_of_rows(format: str) -> None:
    rng = np.random.default_rng(1)
    queries = [f"q{i}" for i in rng.integers(150, size=300)]
    labels = [f"k{i}" for i in rng.integers(30, size=300)]
    rows = rows_of(format, queries, label=labels, positives=[["p"]] * 300)
    held = Counter(lines(hold_out(rows, 25, 7)[1]))
    for seed in range(5):
        mixed = rows.take(np.random.default_rng(seed).permutation(300))
        assert Counter(lines(hold_out(mixed, 25, 7)[1])) == held
    others = [set(hold_out(rows, 25, seed)[1].query) for seed in range(8, 12)]
    assert all(len(other & {line[0] for line in held}) < len(other) / 2 for other in others)


def test_fewer_rows_are_the_first_of_more_and_sources_agree_on_texts() -> None:
    """A text that is held out of a source is held out of another one that has no larger share of its own texts."""
    rows = rows_of("retrieval", [f"q{i}" for i in range(400)], positives=[["p"]] * 400)
    few, many = (set(hold_out(rows, count, 3)[1].query) for count in (10, 30))
    assert few < many and len(few) == 10 and len(many) == 30
    named = rows_of("clustering", [f"q{i}" for i in range(400)], label=[str(i % 2) for i in range(400)])
    assert set(hold_out(named, 30, 3)[1].query) == many


@pytest.mark.parametrize("format", ["clustering", "classification"])
@pytest.mark.parametrize("seed", range(10))
def test_every_label_keeps_two_rows_in_training(seed: int, format: str) -> None:
    """Most labels have three rows or fewer, so that the rule decides nearly every row."""
    rng = np.random.default_rng(seed)
    labels = [f"k{i}" for i in np.minimum(rng.geometric(0.05, size=100), 60)]
    rows = rows_of(format, [f"q{i}" for i in rng.integers(80, size=100)], label=labels)
    train, held = hold_out(rows, 10, seed)
    before, after = Counter(labels), Counter(train.label)
    assert all(after[label] >= min(2, before[label]) for label in before)
    assert len(held) > 0 and not set(train.query) & set(held.query)


def test_nothing_is_held_out_where_no_label_can_spare_a_row() -> None:
    rows = rows_of("clustering", [f"q{i}" for i in range(40)], label=[f"k{i // 2}" for i in range(40)])
    train, held = hold_out(rows, 4, 0)
    assert len(held) == 0 and lines(train) == lines(rows)
