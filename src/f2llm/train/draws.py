"""What a row of each format brings to a batch: its positive, its hard negatives, and what may be right for it too.

What the source itself says is right for a query (`SourceRows.answers`) is never its negative. Hard negatives of a row
are distinct texts; a row that has fewer than it may have brings fewer.

Shape suffixes: B rows of a batch.
"""

from collections.abc import Callable, Sequence

import numpy as np

from f2llm.train.sources import SourceRows, Text, rows_by

ATTEMPTS = 32  # draws of a clustering negative before all texts of other labels are gone through


def draw_retrieval(
    rows: SourceRows, row: int, share: float, count: int, rng: np.random.Generator
) -> tuple[Text, list[Text]]:
    """The positive at `share` of the row's list, and up to `count` of its hard negatives."""
    positives, right = rows.positives[row], rows.answers(row)
    wrong = [t for t in dict.fromkeys(rows.negatives[row]) if t not in right and t != rows.query[row]]
    return positives[int(share * len(positives))], _some(wrong, count, rng)


def draw_clustering(
    rows: SourceRows, row: int, share: float, count: int, rng: np.random.Generator
) -> tuple[Text, list[Text]]:
    """Another text of the row's label as positive, up to `count` that share no label with the row's as negatives."""
    negatives: dict[Text, None] = {}
    while len(negatives) < count and (text := _stranger(rows, row, negatives, rng)) is not None:
        negatives[text] = None
    return _partner(rows, row, share, rng), list(negatives)


def draw_classification(
    rows: SourceRows, row: int, share: float, count: int, rng: np.random.Generator
) -> tuple[Text, list[Text]]:
    """The label's text as positive, up to `count` other labels' texts as negatives."""
    right = rows.answers(row)
    wrong = [label for label in rows.labels if label not in right and label != rows.query[row]]
    return rows.label[row], _some(wrong, count, rng)


DRAW: dict[str, Callable[[SourceRows, int, float, int, np.random.Generator], tuple[Text, list[Text]]]] = {
    "retrieval": draw_retrieval,
    "clustering": draw_clustering,
    "classification": draw_classification,
}


def _some(texts: Sequence[Text], count: int, rng: np.random.Generator) -> list[Text]:
    """Up to `count` of the texts, in random order."""
    return [texts[i] for i in rng.permutation(len(texts))[:count]] if count else []


def _partner(rows: SourceRows, row: int, share: float, rng: np.random.Generator) -> Text:
    """Another text of the row's label; the row's own where its label has no other."""
    pool = rows.rows_of_label[rows.label_number[row]]  # ascending
    if len(pool) > 1:
        place = int(share * (len(pool) - 1))
        other = pool[place + (place >= np.searchsorted(pool, row))]
        if rows.query_number[other] != rows.query_number[row]:
            return rows.query[other]
    others = pool[rows.query_number[pool] != rows.query_number[row]]
    return rows.query[others[int(rng.random() * len(others))]] if len(others) else rows.query[row]


def _stranger(rows: SourceRows, row: int, taken: dict[Text, None], rng: np.random.Generator) -> Text | None:
    """A text, not taken yet, that stands under no label of the row's text: of any other label with equal chances."""
    of_label, own = rows.rows_of_label, rows.answers(row)
    place = rows.label_number[row]

    def fits(other: int) -> bool:
        return rows.query[other] not in taken and own.isdisjoint(rows.answers(other))

    for _ in range(ATTEMPTS):
        drawn = int(rng.random() * (len(of_label) - 1))
        pool = of_label[drawn + (drawn >= place)]
        other = int(pool[int(rng.random() * len(pool))])
        if fits(other):
            return rows.query[other]
    others = (pool for label, pool in zip(rows.labels, of_label, strict=True) if label not in own)
    rest = [other for pool in others for other in pool.tolist() if fits(other)]
    return rows.query[rest[int(rng.random() * len(rest))]] if rest else None


def right_too(
    rows: SourceRows, row_B: Sequence[int], positives: Sequence[Text], documents: set[Text]
) -> tuple[np.ndarray, list[tuple[int, Text]]]:
    """Which of a batch's positives and documents may be right for which query.

    A document may be if it is the text of the query or among its answers; so the positive of a row with the same query,
    label or positive may be too. In formats other than retrieval neighbours never meet, and it is their labels that are
    compared with the answers.

    Args:
        row_B: row numbers of the batch.
        positives: [B], drawn for them.
        documents: all positives and hard negatives of the batch, without prompts.

    Returns:
        Bool [B, B], whether positive j may be right for query i too; and (i, document) for every document that is
        known to be right for query i, in ascending order, in retrieval.
    """
    given = list(positives) if rows.is_retrieval else [rows.label[row] for row in row_B]
    columns = {value: np.asarray(places) for value, places in rows_by(given).items()}
    same_BB = np.zeros((len(row_B), len(row_B)), dtype=bool)
    known = []
    for i, row in enumerate(row_B):
        right = rows.answers(row) & (documents if rows.is_retrieval else columns.keys())
        if rows.is_retrieval:
            right |= {rows.query[row]} & documents
            known += [(i, text) for text in sorted(right)]
        for text in right & columns.keys():
            same_BB[i, columns[text]] = True
    return same_BB, known
