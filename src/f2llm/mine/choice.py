"""Which of a row's nearest documents become its negatives: a window of ranks, then limits on their scores.

Ranks count the documents that are not known to be right, from the most similar. Of ranks `skip_ranks` + 1 to
`last_rank` those stay whose score is not above

    positive - absolute_margin,    positive - |positive| * relative_margin,    max_score

and the best `candidates` of them are kept. `positive` is the lowest score of the row's own positives. The relative
margin is a share of the size of that score, so that it lowers the limit whatever its sign (positive * (1 - margin)
would raise it for a negative one). A cross-encoder, if there is one, gives the scores and the order of what is in the
window, and those of the positives, before the limits are applied.

Shape suffixes: Q rows, R ranks of the window, C candidates.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from f2llm.mine.search import NO_DOCUMENT, Numbers, Scores


class Fate(IntEnum):
    """What becomes of a place in the window; of several limits the first counts."""

    NONE = 0  # the pool has no more documents
    KEPT = 1
    ABSOLUTE_MARGIN = 2
    RELATIVE_MARGIN = 3
    MAX_SCORE = 4
    NOT_NEEDED = 5  # there are enough better ones


class Limits(NamedTuple):
    """Above which scores a document may be right, though nobody says so; None: no such limit."""

    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None


class Choice(NamedTuple):
    """The candidates of each row, best first, and what became of all places of the window, in the order of scores."""

    document_QC: Numbers
    score_QC: Scores
    fate_QR: npt.NDArray[np.int8]


def choose(
    document_QR: Numbers, score_QR: Scores, positive_Q: Scores, limits: Limits, candidates: int
) -> Choice:
    """Candidates out of a window of ranks; places without one hold NO_DOCUMENT and minus infinity."""
    order = np.lexsort(
        (document_QR, -score_QR), axis=1
    )  # ranks already are in this order, rescored ones are not
    document_QR = np.take_along_axis(document_QR, order, axis=1)
    score_QR = np.take_along_axis(score_QR, order, axis=1)
    fate_QR = np.full(score_QR.shape, Fate.KEPT, np.int8)
    for fate, ceiling_Q in reversed(_ceilings(positive_Q, limits)):
        fate_QR[score_QR > ceiling_Q[:, None]] = fate
    fate_QR[document_QR == NO_DOCUMENT] = Fate.NONE
    is_kept = fate_QR == Fate.KEPT
    fate_QR[is_kept & (np.cumsum(is_kept, axis=1) > candidates)] = Fate.NOT_NEEDED
    first_QC = np.argsort(fate_QR != Fate.KEPT, axis=1, kind="stable")[:, :candidates]
    is_kept = np.take_along_axis(fate_QR, first_QC, axis=1) == Fate.KEPT
    return Choice(
        np.where(is_kept, np.take_along_axis(document_QR, first_QC, axis=1), NO_DOCUMENT),
        np.where(is_kept, np.take_along_axis(score_QR, first_QC, axis=1), np.float32(-np.inf)),
        fate_QR,
    )


def _ceilings(positive_Q: Scores, limits: Limits) -> list[tuple[Fate, npt.NDArray[np.float64]]]:
    positive = positive_Q.astype(np.float64)
    found = []
    if limits.absolute_margin is not None:
        found.append((Fate.ABSOLUTE_MARGIN, positive - limits.absolute_margin))
    if limits.relative_margin is not None:
        found.append((Fate.RELATIVE_MARGIN, positive - np.abs(positive) * limits.relative_margin))
    if limits.max_score is not None:
        found.append((Fate.MAX_SCORE, np.full_like(positive, limits.max_score)))
    return found
