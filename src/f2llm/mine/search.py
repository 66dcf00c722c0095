"""The k nearest documents of each query, exactly: the same ones in the same order however the work is cut.

float32 products, block by block -> k + slack candidates of each query -> their scores in float64 -> the first k
                                                              ^ more slack, where that might miss one

How a matrix product rounds depends on the shapes of its blocks, so it only proposes. What decides is the score in
float64, computed pair by pair and rounded to float32; equal scores stand in the order of the documents. The rounding
error of the product is bounded, so it is known of each query whether a document outside the proposal could belong
among its first k; where one could, the query is searched again with a longer proposal.

Vectors are unit vectors. Shape suffixes: T texts, Q queries, N documents of a block, K proposed, R asked for, D dims,
P pairs, S survivors, W width of a stripe.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Numbers = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float32]

NO_DOCUMENT = -1
STRIPES = 16  # of a block's columns: a query looks into a row of them only where one is above its floor
PAIR_BYTES = 1 << 25  # of float64 vectors at a time


class Pairs(NamedTuple):
    """Pairs of a query and a document, by their places in the search, each once."""

    query_P: Numbers
    document_P: Numbers


NO_PAIRS = Pairs(np.empty(0, np.int64), np.empty(0, np.int64))


class Nearest(NamedTuple):
    """The nearest documents of queries, best first; places without one hold NO_DOCUMENT and minus infinity."""

    document_QR: Numbers
    score_QR: Scores


class Blocks(NamedTuple):
    """How a search is cut, which changes nothing but its speed."""

    queries: int
    documents: int
    slack: int
    """Proposed beyond what is asked for, 1 at least; four times as many each time that is not enough."""


BLOCKS = Blocks(queries=512, documents=1 << 14, slack=32)


def nearest(
    vectors_TD: Vectors,
    query_Q: Numbers,
    document_M: Numbers,
    count: int,
    barred: Pairs = NO_PAIRS,
    blocks: Blocks = BLOCKS,
) -> Nearest:
    """The `count` documents with the highest scores (dot products) for each query.

    Args:
        vectors_TD: unit vectors of texts; may be a mapped file, of which a block at a time is read.
        query_Q, document_M: which of them are the queries and the documents.
        count: R, documents of a query, at most.
        barred: documents that may not be among those of a query, by places in `query_Q` and `document_M`.

    Returns:
        Places in `document_M` and float32 scores [Q, R]; of equal scores the earlier place comes first.
    """
    document_QR = np.full((len(query_Q), count), NO_DOCUMENT, np.int64)
    score_QR = np.full((len(query_Q), count), -np.inf, np.float32)
    left, slack = np.arange(len(query_Q)), blocks.slack
    while len(left) and len(document_M):
        proposed = min(count + slack, len(document_M))
        own = _of_queries(barred, left, len(query_Q))
        approximate, document_QK = _propose(vectors_TD, query_Q[left], document_M, proposed, own, blocks)
        found = _decide(vectors_TD, query_Q[left], document_M, approximate, document_QK, count)
        document_QR[left, : found.document_QR.shape[1]] = found.document_QR
        score_QR[left, : found.score_QR.shape[1]] = found.score_QR
        if proposed == len(document_M):
            break
        # Whatever was not proposed scores at most this, and must not reach the last place.
        ceiling_Q = approximate[:, -1].astype(np.float64) + rounding_error(vectors_TD.shape[1])
        left, slack = left[~(ceiling_Q < score_QR[left, -1])], 4 * slack
    return Nearest(document_QR, score_QR)


def rounding_error(dims: int) -> float:
    """Most that a float32 product of unit vectors can be off, in whatever order it is summed.

    n u / (1 - n u) times the sum of |x y|, which is 1 at most (Higham, Accuracy and Stability of Numerical Algorithms,
    section 3.1); 4 more roundings for lengths that are not quite 1 and for the score that it is compared with.
    """
    units = (dims + 4) * 2.0**-24
    return units / (1 - units)


def exact_scores(vectors_TD: Vectors, left_P: Numbers, right_P: Numbers) -> Scores:
    """Float32 [P]: the dot product of each pair of texts in float64, rounded once; the same in whatever company."""
    step = max(1, PAIR_BYTES // (8 * vectors_TD.shape[1]))
    score_P = np.empty(len(left_P), np.float32)
    for first in range(0, len(left_P), step):
        pairs = slice(first, first + step)
        score_P[pairs] = _dot(vectors_TD[left_P[pairs]], vectors_TD[right_P[pairs], None])[:, 0]
    return score_P


def _dot(query_QD: Vectors, document_QKD: Vectors) -> Scores:
    # vecdot takes one pair at a time, so that its sum does not depend on the others.
    exact = np.vecdot(document_QKD.astype(np.float64), query_QD.astype(np.float64)[:, None])
    return exact.astype(np.float32)


def _of_queries(pairs: Pairs, chosen: Numbers, queries: int) -> Pairs:
    """The pairs of the chosen queries, which then count from 0."""
    place = np.full(queries, -1)
    place[chosen] = np.arange(len(chosen))
    kept = place[pairs.query_P] >= 0
    return Pairs(place[pairs.query_P[kept]], pairs.document_P[kept])


def _propose(
    vectors_TD: Vectors, query_Q: Numbers, document_M: Numbers, count: int, barred: Pairs, blocks: Blocks
) -> tuple[Scores, Numbers]:
    """The highest float32 products [Q, K] and their documents; minus infinity where there are fewer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    best_QK = torch.full((len(query_Q), count), -torch.inf, device=device)
    place_QK = torch.full((len(query_Q), count), NO_DOCUMENT, device=device)
    query_QD = torch.from_numpy(vectors_TD[query_Q]).to(device)
    with _full_precision():
        for first, pairs in _by_block(barred, len(document_M), blocks.documents):
            chosen = document_M[first : first + blocks.documents]
            document_ND = torch.from_numpy(vectors_TD[chosen]).to(device)
            document_ND = F.pad(document_ND, (0, 0, 0, -len(chosen) % STRIPES))
            for begin in range(0, len(query_Q), blocks.queries):
                tile = slice(begin, min(begin + blocks.queries, len(query_Q)))
                score_QN = query_QD[tile] @ document_ND.T
                score_QN[:, len(chosen) :] = -torch.inf
                low, high = np.searchsorted(pairs.query_P, [tile.start, tile.stop])
                row, column = pairs.query_P[low:high] - begin, pairs.document_P[low:high] - first
                score_QN[torch.from_numpy(row), torch.from_numpy(column)] = -torch.inf
                best_QK[tile], place_QK[tile] = _merge(best_QK[tile], place_QK[tile], score_QN, first)
    return best_QK.cpu().numpy(), place_QK.cpu().numpy()


@contextmanager
def _full_precision() -> Iterator[None]:
    """The bound on rounding is that of float32, so nothing shorter may stand in for it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _by_block(barred: Pairs, documents: int, size: int) -> Iterator[tuple[int, Pairs]]:
    """The first document of each block, and the pairs that are barred in it, in the order of the queries."""
    order = np.lexsort((barred.query_P, barred.document_P // size))
    query_P, document_P = barred.query_P[order], barred.document_P[order]
    for first in range(0, documents, size):
        low, high = np.searchsorted(document_P // size, [first // size, first // size + 1])
        yield first, Pairs(query_P[low:high], document_P[low:high])


def _merge(best_QK: Tensor, place_QK: Tensor, score_QN: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The best of what was found and of a block of scores, whose first column is document `first`; sorted."""
    count = best_QK.shape[1]
    floor_Q = best_QK[:, -1:]
    if torch.isneginf(floor_Q).any():
        new_QN, column_QN = score_QN.topk(min(count, score_QN.shape[1]))
        new = new_QN, torch.where(torch.isneginf(new_QN), NO_DOCUMENT, column_QN + first)
    else:
        new = _above(score_QN, floor_Q, first)
    both_QN = torch.cat((best_QK, new[0]), dim=1)
    top_QK, taken_QK = both_QN.topk(count)
    return top_QK, torch.cat((place_QK, new[1]), dim=1).gather(1, taken_QK)


def _above(score_QN: Tensor, floor_Q1: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The scores above each query's floor and their documents, side by side; most are not, so few are looked at."""
    queries, columns = score_QN.shape
    stripe = columns // STRIPES
    stripes_Q_W = score_QN.view(queries, STRIPES, stripe)
    query_S, column_S = (stripes_Q_W.amax(dim=1) > floor_Q1).nonzero(as_tuple=True)
    looked_at = stripes_Q_W[query_S, :, column_S]
    survivor, in_stripe = (looked_at > floor_Q1[query_S]).nonzero(as_tuple=True)
    query_S, column_S = query_S[survivor], column_S[survivor] + in_stripe * stripe
    count_Q = torch.bincount(query_S, minlength=queries)
    slot_S = torch.arange(len(query_S), device=query_S.device) - (count_Q.cumsum(0) - count_Q)[query_S]
    shape = (queries, int(count_Q.max()))
    new = score_QN.new_full(shape, -torch.inf), query_S.new_full(shape, NO_DOCUMENT)
    new[0][query_S, slot_S] = score_QN[query_S, column_S]
    new[1][query_S, slot_S] = column_S + first
    return new


def _decide(
    vectors_TD: Vectors,
    query_Q: Numbers,
    document_M: Numbers,
    approximate_QK: Scores,
    place_QK: Numbers,
    count: int,
) -> Nearest:
    """The first `count` of the proposed documents, by exact score and then by place."""
    exact_QK = np.empty_like(approximate_QK)
    step = max(1, PAIR_BYTES // (8 * vectors_TD.shape[1] * max(1, place_QK.shape[1])))
    for first in range(0, len(query_Q), step):
        rows = slice(first, first + step)
        exact_QK[rows] = _dot(vectors_TD[query_Q[rows]], vectors_TD[document_M[place_QK[rows]]])
    exact_QK[place_QK == NO_DOCUMENT] = -np.inf
    order_QR = np.lexsort((place_QK, -exact_QK), axis=1)[:, :count]
    return Nearest(
        np.take_along_axis(place_QK, order_QR, axis=1), np.take_along_axis(exact_QK, order_QR, axis=1)
    )
