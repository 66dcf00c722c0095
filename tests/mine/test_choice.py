"""The choice of negatives: against a rule applied to one document after the other, and what the margins mean."""

import math
from itertools import product

import numpy as np
import pytest

from f2llm.mine.choice import Fate, Limits, choose
from f2llm.mine.search import NO_DOCUMENT


def reference(
    ranked: list[tuple[int, float]], positive: float, limits: Limits, candidates: int
) -> tuple[list[tuple[int, float]], list[Fate]]:
    """One row, document by document."""
    kept: list[tuple[int, float]] = []
    fates: list[Fate] = []
    for document, score in sorted(ranked, key=lambda pair: (-pair[1], pair[0])):
        if limits.absolute_margin is not None and positive - score < limits.absolute_margin:
            fates.append(Fate.ABSOLUTE_MARGIN)
        elif limits.relative_margin is not None and positive - score < limits.relative_margin * abs(positive):
            fates.append(Fate.RELATIVE_MARGIN)
        elif limits.max_score is not None and score > limits.max_score:
            fates.append(Fate.MAX_SCORE)
        elif len(kept) == candidates:
            fates.append(Fate.NOT_NEEDED)
        else:
            kept.append((document, score))
            fates.append(Fate.KEPT)
    return kept, fates


@pytest.mark.parametrize(
    "limits", [Limits(*some) for some in product([None, 0.25], [None, 0.0, 0.5], [None, -0.5, 0.25])]
)
@pytest.mark.parametrize("candidates", [1, 3, 12])
def test_choose(limits: Limits, candidates: int) -> None:
    rng = np.random.default_rng(0)
    rows, ranks = 60, 12
    # Quarters, so that scores are equal to one another and to limits, without a rounding anywhere.
    score = (rng.integers(-8, 9, (rows, ranks)) / 4).astype(np.float32)
    document = np.stack([rng.permutation(100)[:ranks] for _ in range(rows)])
    for row in range(0, rows, 3):  # a pool that ends within the window
        score[row, 5:], document[row, 5:] = -np.inf, NO_DOCUMENT
    positive = (rng.integers(-8, 9, rows) / 4).astype(np.float32)
    choice = choose(document, score, positive, limits, candidates)
    for row in range(rows):
        ranked = [
            pair for pair in zip(document[row].tolist(), score[row].tolist(), strict=True) if pair[0] >= 0
        ]
        kept, fates = reference(ranked, float(positive[row]), limits, candidates)
        missing = candidates - len(kept)
        assert choice.document_QC[row].tolist() == [d for d, _ in kept] + [NO_DOCUMENT] * missing
        assert choice.score_QC[row].tolist() == [s for _, s in kept] + [-math.inf] * missing
        assert choice.fate_QR[row].tolist() == [*fates, *[Fate.NONE] * (ranks - len(fates))]


@pytest.mark.parametrize("positive", [0.8, -0.8])
def test_a_relative_margin_asks_for_less_than_the_positive_whatever_its_sign(positive: float) -> None:
    """Positive * (1 - margin) would let a document through that scores above a negative positive."""
    scores = np.array([[positive + 0.02, positive, positive - 0.039, positive - 0.041]], np.float32)
    choice = choose(
        np.arange(4)[None],
        scores,
        np.array([positive], np.float32),
        Limits(relative_margin=0.05),
        candidates=4,
    )
    assert choice.document_QC[0].tolist() == [3, NO_DOCUMENT, NO_DOCUMENT, NO_DOCUMENT]


def test_a_larger_margin_never_keeps_more() -> None:
    rng = np.random.default_rng(1)
    scores = -np.sort(-rng.uniform(-1, 1, (50, 30)).astype(np.float32), axis=1)
    positive = rng.uniform(-1, 1, 50).astype(np.float32)
    for name in ("absolute_margin", "relative_margin"):
        kept = [
            (
                choose(
                    np.tile(np.arange(30), (50, 1)), scores, positive, Limits(**{name: margin}), 30
                ).fate_QR
                == Fate.KEPT
            )
            for margin in (0, 0.1, 0.3, 0.9)
        ]
        for less, more in zip(kept[1:], kept[:-1], strict=True):
            assert (more | ~less).all()
            assert more.sum() > less.sum()
