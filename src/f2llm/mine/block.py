"""Negatives for a block of rows of one pool: search, rescoring, choice, and what is counted of them.

Shape suffixes: B rows of the block, R ranks, C candidates, P pairs.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from f2llm.files import atomic_write, read_json, write_json
from f2llm.mine.choice import Choice, Fate, Limits, choose
from f2llm.mine.pools import Barred, Pool, Reason, barred, spans
from f2llm.mine.search import NO_DOCUMENT, Nearest, Numbers, Scores, exact_scores, nearest
from f2llm.mine.texts import Corpus

ROWS_AT_ONCE = 1 << 14
# Of positive - negative; the first and the last bin are open.
MARGIN_EDGES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)

Rerank = Callable[[Sequence[tuple[str, str]]], Scores]
"""Float32 scores of pairs of a query and a document, the higher the better."""


@dataclass(frozen=True)
class Rules:
    """What makes a document a candidate."""

    candidates: int
    skip_ranks: int
    last_rank: int
    limits: Limits
    keep_given: bool


@dataclass(frozen=True)
class Block:
    """Rows of a pool, `first` to `last` (left out)."""

    corpus: Corpus
    pool: Path
    first: int
    last: int
    rules: Rules
    sources: tuple[str, ...]
    languages: tuple[str, ...]
    prefixes: tuple[str, ...]  # of queries, by source
    rerank: Rerank | None

    @property
    def path(self) -> Path:
        return found_path(self.pool, self.first)


def found_path(pool: Path, row: int) -> Path:
    """Where the candidates of a row of a pool are, at place `row` % ROWS_AT_ONCE."""
    return pool / f"found-{row // ROWS_AT_ONCE:06}.npz"


class Found(NamedTuple):
    """Candidates of rows: numbers of texts, NO_DOCUMENT beyond the last; scores; and the lowest of the positives."""

    text_BC: Numbers
    score_BC: Scores
    positive_B: Scores

    @staticmethod
    def load(path: Path) -> "Found":
        with np.load(path) as saved:
            return Found(saved["text"], saved["score"], saved["positive"])


def mine_block(block: Block) -> list[dict[str, Any]]:
    """Write what was found for the rows of a block; returns counts by source and language."""
    done = block.path.with_suffix(".json")
    if not done.exists():
        counts = _mine(block)
        write_json(done, counts)
    counted: list[dict[str, Any]] = read_json(done)
    return counted


def _mine(block: Block) -> list[dict[str, Any]]:
    pool, vectors_TD, rules = Pool.load(block.pool), block.corpus.vectors(), block.rules
    rows = slice(block.first, block.last)
    query_B, known = np.asarray(pool.query[rows]), barred(pool, rows, rules.keep_given)
    document_M = np.asarray(pool.document)
    ranked = nearest(vectors_TD, query_B, document_M, rules.last_rank, known.pairs)
    own = spans(pool.positive_starts, np.arange(rows.start, rows.stop))
    own_B = np.diff(pool.positive_starts[rows.start : rows.stop + 1])
    positive_P = exact_scores(vectors_TD, np.repeat(query_B, own_B), pool.positive[own])
    window = Nearest(ranked.document_QR[:, rules.skip_ranks :], ranked.score_QR[:, rules.skip_ranks :])
    if block.rerank:
        window, positive_P = _rescored(block, block.rerank, pool, window, own, own_B)
    positive_B = np.minimum.reduceat(positive_P, np.cumsum(own_B) - own_B)
    choice = choose(*window, positive_B, rules.limits, rules.candidates)
    chosen = choice.document_QC
    found = Found(
        np.where(chosen == NO_DOCUMENT, NO_DOCUMENT, document_M[chosen]), choice.score_QC, positive_B
    )
    with atomic_write(block.path) as file:
        np.savez(file, text=found.text_BC, score=found.score_BC, positive=found.positive_B)
    passed = _in_window(
        known,
        ranked,
        exact_scores(vectors_TD, query_B[known.pairs.query_P], document_M[known.pairs.document_P]),
    )
    return _count(block, pool, choice, positive_B, passed)


def _rescored(
    block: Block, rerank: Rerank, pool: Pool, window: Nearest, own: Numbers, own_B: Numbers
) -> tuple[Nearest, Scores]:
    """The window and the positives with the cross-encoder's scores."""
    source_B = pool.source[block.first : block.last].tolist()
    asked = block.corpus.texts(np.asarray(pool.query[block.first : block.last])).to_pylist()
    queries = [text[len(block.prefixes[source]) :] for text, source in zip(asked, source_B, strict=True)]

    def scores(row_P: Numbers, text_P: Numbers) -> Scores:
        texts = block.corpus.texts(text_P).to_pylist()
        return rerank([(queries[row], text) for row, text in zip(row_P.tolist(), texts, strict=True)])

    row_P, rank_P = np.nonzero(window.document_QR != NO_DOCUMENT)
    score_BR = np.full_like(window.score_QR, -np.inf)
    score_BR[row_P, rank_P] = scores(row_P, pool.document[window.document_QR[row_P, rank_P]])
    return window._replace(score_QR=score_BR), scores(
        np.repeat(np.arange(len(own_B)), own_B), pool.positive[own]
    )


def _in_window(known: Barred, ranked: Nearest, score_P: Scores) -> Barred:
    """Those that would be among the ranks, if they were not barred."""
    last_P = ranked.score_QR[known.pairs.query_P, -1]
    last_document_P = ranked.document_QR[known.pairs.query_P, -1]
    inside = (score_P > last_P) | ((score_P == last_P) & (known.pairs.document_P < last_document_P))
    return Barred(type(known.pairs)(*(values[inside] for values in known.pairs)), known.reason_P[inside])


def _count(
    block: Block, pool: Pool, choice: Choice, positive_B: Scores, passed: Barred
) -> list[dict[str, Any]]:
    rows = slice(block.first, block.last)
    group_B = pool.source[rows] * len(block.languages) + pool.language[rows]
    margin_BC = positive_B[:, None] - choice.score_QC  # infinite where there is no candidate
    counted = []
    for group in np.unique(group_B).tolist():
        of_group = group_B == group
        source, language = divmod(group, len(block.languages))
        fates = np.bincount(choice.fate_QR[of_group].ravel(), minlength=len(Fate))
        reasons = np.bincount(passed.reason_P[of_group[passed.pairs.query_P]], minlength=len(Reason))
        margins = margin_BC[of_group]
        bins = np.searchsorted(MARGIN_EDGES, margins[np.isfinite(margins)], side="right")
        per_row = (choice.document_QC[of_group] != NO_DOCUMENT).sum(axis=1)
        counted.append(
            {
                "source": block.sources[source],
                "language": block.languages[language],
                "rows": int(of_group.sum()),
                "candidates": {str(n): rows for n, rows in sorted(Counter(per_row.tolist()).items())},
                "ranked": {fate.name.lower(): int(fates[fate]) for fate in Fate if fate != Fate.NONE},
                "passed_over": {reason.name.lower(): int(reasons[reason]) for reason in Reason},
                "margins": np.bincount(bins, minlength=len(MARGIN_EDGES) + 1).tolist(),
            }
        )
    return counted
