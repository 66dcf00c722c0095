"""What rows of each format bring to a batch, and what they never do."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from f2llm.data.rows import Source
from f2llm.train.draws import draw_classification, draw_clustering, draw_retrieval, right_too
from f2llm.train.sources import SourceRows


def rows_of(format: Any, query: list[str], **columns: list[Any]) -> SourceRows:
    count = len(query)
    filled: dict[str, Any] = {"positives": [[]] * count, "negatives": [[]] * count, "label": [None] * count}
    facts = Source(name="s", format=format, task="t", symmetric=True, instruction="", licence="CC0-1.0")
    return SourceRows(source=facts, query=query, query_lang=["und"] * count, **{**filled, **columns})


def draws(draw: Any, rows: SourceRows, row: int, count: int, times: int) -> list[tuple[str, list[str]]]:
    rng = np.random.default_rng(row)
    return [draw(rows, row, rng.random(), count, rng) for _ in range(times)]


# --- Retrieval


def test_a_row_takes_as_many_of_its_candidates_as_it_has_and_each_equally_often() -> None:
    candidates = [f"n{i}" for i in range(6)]
    rows = rows_of(
        "retrieval", ["q0", "q1"], positives=[["p"], ["p"]], negatives=[candidates, candidates[:2]]
    )
    many = [negatives for _, negatives in draws(draw_retrieval, rows, 0, 3, 2000)]
    assert all(len(set(negatives)) == len(negatives) == 3 for negatives in many)
    times = Counter(text for negatives in many for text in negatives)
    assert all(abs(times[text] - 1000) < 120 for text in candidates)
    assert all(sorted(n) == ["n0", "n1"] for _, n in draws(draw_retrieval, rows, 1, 3, 20))
    assert all(n == [] for _, n in draws(draw_retrieval, rows, 0, 0, 3))


def test_what_is_right_for_the_query_is_never_its_hard_negative() -> None:
    """The query itself, positives of the row, of another row with the query, of another row of the thing."""
    rows = rows_of(
        "retrieval",
        ["q", "q", "other", "r"],
        positives=[["p", "p2"], ["elsewhere"], ["same thing"], ["p3"]],
        negatives=[["q", "p", "p2", "elsewhere", "same thing", "p3", "n", "n"], [], [], []],
        label=["x", None, "x", None],
    )
    assert all(sorted(negatives) == ["n", "p3"] for _, negatives in draws(draw_retrieval, rows, 0, 7, 30))


def test_the_share_chooses_the_positive() -> None:
    rows = rows_of("retrieval", ["q"], positives=[["a", "b", "c"]])
    rng = np.random.default_rng(0)
    chosen = [draw_retrieval(rows, 0, share, 0, rng)[0] for share in (0.0, 0.33, 0.34, 0.66, 0.67, 0.999999)]
    assert chosen == ["a", "a", "b", "b", "c", "c"]


# --- Clustering


@pytest.mark.parametrize("seed", range(5))
def test_clustering_texts_share_a_label_with_their_positive_and_none_with_their_negatives(seed: int) -> None:
    """Texts under several labels included, and against all that could have been drawn."""
    rng = np.random.default_rng(seed)
    texts, labels = [f"t{i}" for i in rng.integers(12, size=30)], [f"k{i}" for i in rng.integers(5, size=30)]
    rows = rows_of("clustering", texts, label=labels)
    under: dict[str, set[str]] = {text: set() for text in texts}
    for text, label in zip(texts, labels, strict=True):
        under[text].add(label)
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        partners = {other for other in under if label in under[other]} - {text}
        strangers = {other for other in under if not under[other] & under[text]}
        drawn = draws(draw_clustering, rows, row, 4, 120)
        assert {positive for positive, _ in drawn} == (partners or {text})
        assert all(len(set(n)) == len(n) == min(4, len(strangers)) for _, n in drawn)
        assert {negative for _, n in drawn for negative in n} == strangers


def test_clustering_negatives_come_from_all_labels_equally() -> None:
    """Of a label with one text as often as of one with fifty."""
    labels = ["own", "own", "single", *["many"] * 50]
    rows = rows_of("clustering", [f"t{i}" for i in range(53)], label=labels)
    firsts = [negatives[0] for _, negatives in draws(draw_clustering, rows, 0, 1, 1000)]
    assert abs(firsts.count("t2") - 500) < 80


def test_clustering_partners_are_equally_likely_whatever_place_they_have() -> None:
    """The anchor's own text stands three times under its label; the other texts share its place evenly."""
    rows = rows_of("clustering", ["a", "x", "a", "y", "a", "z"], label=["k"] * 6)
    for row in (0, 2, 4):
        times = Counter(positive for positive, _ in draws(draw_clustering, rows, row, 0, 3000))
        assert set(times) == {"x", "y", "z"} and min(times.values()) > 850


# --- Classification


def test_classification_sets_the_label_against_labels_the_text_does_not_have() -> None:
    rows = rows_of(
        "classification",
        ["t0", "t1", "t1", "no"],
        label=["yes", "yes", "no", "yes"],
    )
    assert {(p, *n) for p, n in draws(draw_classification, rows, 0, 3, 20)} == {("yes", "no")}
    assert {(p, *n) for p, n in draws(draw_classification, rows, 1, 3, 20)} == {("yes",)}  # it is both
    assert {(p, *n) for p, n in draws(draw_classification, rows, 3, 3, 20)} == {
        ("yes",)
    }  # "no" is its own text


def test_classification_negatives_are_distinct_labels_drawn_evenly() -> None:
    rows = rows_of("classification", [f"t{i}" for i in range(5)], label=list("abcde"))
    drawn = [negatives for _, negatives in draws(draw_classification, rows, 2, 2, 2000)]
    assert all(len(set(negatives)) == 2 for negatives in drawn)
    times = Counter(text for negatives in drawn for text in negatives)
    assert set(times) == set("abde") and all(abs(times[label] - 1000) < 120 for label in "abde")


# --- What may be right too


@pytest.mark.parametrize("seed", range(6))
def test_right_too_against_a_double_loop(seed: int) -> None:
    """Rows that share queries, positives, labels, and each other's texts; some of the source are not in the batch."""
    rng = np.random.default_rng(seed)
    labels = [None, None, *(f"thing {i}" for i in range(10))]
    rows = rows_of(
        "retrieval",
        [f"t{i}" for i in rng.integers(40, size=50)],
        positives=[[f"t{i}" for i in rng.integers(60, size=3)] for _ in range(50)],
        label=[labels[i] for i in rng.integers(12, size=50)],
    )
    row_B = rng.permutation(50)[:20].tolist()
    positives = [rows.positives[row][0] for row in row_B]
    documents = {*positives, *(f"t{i}" for i in rng.integers(60, size=15))}
    same_BB, known = right_too(rows, row_B, positives, documents)
    expected_known = []
    for i, mine in enumerate(row_B):
        answers = {rows.query[mine]}
        for other in range(50):
            alike = rows.label[mine] is not None and rows.label[mine] == rows.label[other]
            if alike or rows.query[mine] == rows.query[other]:
                answers |= set(rows.positives[other])
        expected_known += [(i, text) for text in sorted(answers & documents)]
        for j, other in enumerate(row_B):
            expected = (
                positives[j] in answers
                or positives[j] == positives[i]
                or rows.query[other] == rows.query[mine]
                or (rows.label[mine] is not None and rows.label[mine] == rows.label[other])
            )
            assert same_BB[i, j] == expected
    assert known == expected_known and len(known) > len(row_B)


@pytest.mark.parametrize("format", ["clustering", "classification"])
def test_rows_of_other_formats_are_compared_by_the_labels_of_their_texts(format: str) -> None:
    rows = rows_of(format, ["a", "a", "b", "c"], label=["x", "y", "y", "z"])
    same_BB, known = right_too(rows, [0, 1, 2, 3], ["x", "y", "z", "a"], {"x", "y", "z", "a"})
    expected = [[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert same_BB.astype(int).tolist() == expected and known == []
