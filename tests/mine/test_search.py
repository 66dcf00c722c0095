"""The nearest documents: against all pairs in exact arithmetic, however the search is cut."""

import math
from fractions import Fraction

import numpy as np
import pytest

from f2llm.mine import search
from f2llm.mine.search import (
    BLOCKS,
    NO_DOCUMENT,
    Blocks,
    Pairs,
    Vectors,
    exact_scores,
    nearest,
    rounding_error,
)

CUTS = [
    BLOCKS,
    Blocks(queries=1, documents=1, slack=1),
    Blocks(queries=7, documents=16, slack=1),
    Blocks(queries=3, documents=50, slack=400),
]


def unit_vectors(count: int, dims: int, spread: float = 1.0, seed: int = 0) -> Vectors:
    """Random directions; the smaller the spread, the nearer to one of them."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal(dims) * (1 - spread) + spread * rng.standard_normal((count, dims))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def product(left: np.ndarray, right: np.ndarray) -> float:
    """Correctly rounded: the products are exact in float64, and fsum adds without error."""
    return float(np.float32(math.fsum(float(a) * float(b) for a, b in zip(left, right, strict=True))))


def reference(
    vectors: Vectors, queries: list[int], documents: list[int], count: int, barred: set[tuple[int, int]]
) -> tuple[list[list[int]], list[list[float]]]:
    """All pairs, sorted by score and then by place."""
    places, scores = [], []
    for query, text in enumerate(queries):
        ranked = sorted(
            (-product(vectors[text], vectors[other]), place)
            for place, other in enumerate(documents)
            if (query, place) not in barred
        )[:count]
        missing = count - len(ranked)
        places.append([place for _, place in ranked] + [NO_DOCUMENT] * missing)
        scores.append([-score for score, _ in ranked] + [-math.inf] * missing)
    return places, scores


@pytest.mark.parametrize("blocks", CUTS)
@pytest.mark.parametrize("spread", [1.0, 1e-3, 0.0])
def test_nearest(blocks: Blocks, spread: float) -> None:
    vectors = unit_vectors(140, 12, spread)
    vectors[60:90] = vectors[30:60]  # equal scores
    vectors[90:100] *= -1  # and negative ones
    rng = np.random.default_rng(1)
    queries, documents = list(range(20)), sorted(rng.permutation(np.arange(10, 140))[:110].tolist())
    barred = {(int(rng.integers(20)), int(rng.integers(110))) for _ in range(300)}
    barred |= {(4, place) for place in range(107)}  # of which three documents are left
    pairs = Pairs(*np.array(sorted(barred, key=lambda pair: pair[1])).T)
    found = nearest(vectors, np.array(queries), np.array(documents), 9, pairs, blocks)
    places, scores = reference(vectors, queries, documents, 9, barred)
    assert found.document_QR.tolist() == places
    assert found.score_QR.tolist() == scores


def test_fewer_documents_than_asked_for() -> None:
    vectors = unit_vectors(6, 8)
    found = nearest(vectors, np.array([0, 1]), np.array([3, 5]), 4)
    assert np.sort(found.document_QR[:, :2], axis=1).tolist() == [[0, 1], [0, 1]]
    assert (found.document_QR[:, 2:] == NO_DOCUMENT).all()
    assert np.isneginf(found.score_QR[:, 2:]).all()
    assert (nearest(vectors, np.array([0]), np.array([], np.int64), 2).document_QR == NO_DOCUMENT).all()


def test_a_proposal_that_is_too_short_is_lengthened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that are wrong by just less than the bound, in the worst direction, change nothing."""
    dims, queries, documents = 16, np.arange(4), np.arange(4, 200)
    vectors = unit_vectors(200, dims, spread=1e-4)
    exact, calls = nearest(vectors, queries, documents, 10), []
    propose = search._propose

    def misjudge(
        vectors_TD: Vectors, query_Q: np.ndarray, document_M: np.ndarray, count: int, *rest: object
    ) -> object:
        calls.append((len(query_Q), count))
        scores, places = propose(vectors_TD, query_Q, document_M, len(document_M), *rest)  # type: ignore[arg-type]
        error = 0.45 * rounding_error(dims) * np.where(np.isin(places, exact.document_QR), -1, 1)
        wrong = (scores + error).astype(np.float32)
        order = np.argsort(-wrong, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(wrong, order, axis=1), np.take_along_axis(places, order, axis=1)

    monkeypatch.setattr(search, "_propose", misjudge)
    found = nearest(vectors, queries, documents, 10, blocks=Blocks(queries=4, documents=64, slack=2))
    assert found.document_QR.tolist() == exact.document_QR.tolist()
    assert [count for _, count in calls] == [12, 18, 42, 138, 196][: len(calls)]
    assert len(calls) > 1


def test_a_score_is_the_same_in_whatever_company() -> None:
    vectors = unit_vectors(300, 37)
    left, right = np.arange(300) % 7, np.arange(300)
    together = exact_scores(vectors, left, right)
    alone = [exact_scores(vectors, left[i : i + 1], right[i : i + 1])[0] for i in range(300)]
    assert together.tolist() == alone
    assert together.tolist() == [product(vectors[a], vectors[b]) for a, b in zip(left, right, strict=True)]


@pytest.mark.parametrize("dims", [3, 64, 1024])
def test_rounding_error_is_a_bound(dims: int) -> None:
    for seed in range(20):
        left, right = np.abs(unit_vectors(2, dims, spread=0.1, seed=seed))
        exact = float(sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(left, right, strict=True)))
        rounded = np.float32(0)
        for value in np.sort(left * right):
            rounded = np.float32(rounded + value)
        assert abs(float(rounded) - exact) <= rounding_error(dims)
