"""How far an export agrees with its model: cosines, what retrieval loses, size and speed, as a table.

Shape suffixes: N texts, D dims, Q questions, A answers.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from f2llm.export.runtimes import Encode, Vectors

NEIGHBOURS = 10


@dataclass(frozen=True)
class Row:
    """One model in one runtime, measured on the sample."""

    runtime: str
    precision: str
    dim: int
    smallest_cosine: float | None  # to the original's vectors of the same size; None in a space of its own
    mean_cosine: float | None
    neighbours: float  # share of a text's ten nearest that are the original's too
    ndcg_at_10: float | None  # of finding answers; None for a sample without
    megabytes: float  # 10^6 bytes, weights and all
    tokens_per_second: float


@dataclass(frozen=True)
class Parity:
    """The original first, then the export."""

    rows: tuple[Row, ...]
    texts: int
    pairs: int
    furthest: str  # the text whose vector moved most, or whose neighbours did
    note: str = ""  # why the exported row is not of the runtime that the files are for

    @property
    def exported(self) -> Row:
        return self.rows[-1]

    @property
    def ndcg_change(self) -> float | None:
        """nDCG@10 of the export less the original's."""
        before, after = self.rows[0].ndcg_at_10, self.exported.ndcg_at_10
        return None if before is None or after is None else after - before

    def render(self) -> str:
        """A Markdown table that also reads well as text."""
        titles = [
            "runtime",
            "precision",
            "dim",
            "cosine min",
            "mean",
            "neighbours",
            "nDCG@10",
            "MB",
            "tokens/s",
        ]
        table = [titles, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [_line(cells, widths) for cells in table]
        rule = _line(["-" * width for width in widths], widths)
        return "\n".join([lines[0], rule, *lines[1:], *(["", self.note] if self.note else [])])


@dataclass(frozen=True)
class Side:
    """One of two that are compared: how it encodes, and the same texts as it wants them."""

    encode: Encode
    texts: list[str]
    tokens: int  # of all texts, for the speed
    runtime: str
    precision: str
    megabytes: float


def measured(
    original: Side,
    exported: Side,
    pairs: Sequence[tuple[int, int]],
    *,
    same_space: bool = True,
    note: str = "",
) -> Parity:
    """Encode all texts both ways.

    Args:
        pairs: numbers of questions and of their answers among the texts.
        same_space: whether the vectors are meant to be equal.
    """
    (before_ND, before_speed), (after_ND, after_speed) = _timed(original), _timed(exported)
    kept_N = neighbours_kept(before_ND, after_ND)
    cosine_N = (before_ND * after_ND).sum(1) if same_space else None

    def row(side: Side, vectors_ND: Vectors, speed: float, cosine_N: Vectors | None, kept_N: Vectors) -> Row:
        return Row(
            runtime=side.runtime,
            precision=side.precision,
            dim=vectors_ND.shape[1],
            smallest_cosine=None if cosine_N is None else float(cosine_N.min()),
            mean_cosine=None if cosine_N is None else float(cosine_N.mean()),
            neighbours=float(kept_N.mean()),
            ndcg_at_10=ndcg_at_10(vectors_ND, pairs) if pairs else None,
            megabytes=side.megabytes,
            tokens_per_second=speed,
        )

    ones_N = np.ones(len(before_ND), np.float32)
    rows = (
        row(original, before_ND, before_speed, ones_N, ones_N),
        row(exported, after_ND, after_speed, cosine_N, kept_N),
    )
    furthest = original.texts[int((kept_N if cosine_N is None else cosine_N).argmin())]
    return Parity(rows, len(original.texts), len(pairs), furthest, note)


def _timed(side: Side) -> tuple[Vectors, float]:
    """Vectors, and tokens per second."""
    side.encode(side.texts[:1])  # the first call makes ready what later ones use
    started = time.perf_counter()
    vectors_ND = side.encode(side.texts)
    return vectors_ND, side.tokens / (time.perf_counter() - started)


def neighbours_kept(before_ND: Vectors, after_ND: Vectors) -> Vectors:
    """For each text, the share of its ten nearest others (fewer if there are fewer) that stay so [N]."""
    count = min(NEIGHBOURS, len(before_ND) - 1)
    if count < 1:
        return np.ones(len(before_ND), np.float32)
    nearest = []
    for vectors_ND in (before_ND, after_ND):
        scores_NN = vectors_ND @ vectors_ND.T
        np.fill_diagonal(scores_NN, -np.inf)
        nearest.append(np.argsort(-scores_NN, axis=1, kind="stable")[:, :count])
    shared = [len(np.intersect1d(a, b)) / count for a, b in zip(*nearest, strict=True)]
    return np.array(shared, np.float32)


def ndcg_at_10(vectors_ND: Vectors, pairs: Sequence[tuple[int, int]]) -> float:
    """Mean over questions of 1 / log2(1 + rank) of the one right answer among all, 0 beyond rank 10.

    Järvelin and Kekäläinen 2002; of answers with equal scores the right one comes last.
    """
    answers = sorted({answer for _, answer in pairs})
    place = {answer: number for number, answer in enumerate(answers)}
    scores_QA = vectors_ND[[question for question, _ in pairs]] @ vectors_ND[answers].T
    right_Q1 = np.array([[place[answer]] for _, answer in pairs])
    rank_Q = (scores_QA >= np.take_along_axis(scores_QA, right_Q1, axis=1)).sum(1)
    return float(np.where(rank_Q <= NEIGHBOURS, 1 / np.log2(1 + rank_Q), 0).mean())


def megabytes(path: Path) -> float:
    """Of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def _cells(row: Row) -> list[str]:
    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    return [
        row.runtime,
        row.precision,
        str(row.dim),
        number(row.smallest_cosine, 6),
        number(row.mean_cosine, 6),
        number(row.neighbours, 3),
        number(row.ndcg_at_10, 4),
        number(row.megabytes, 1),
        number(row.tokens_per_second, 0),
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.ljust(w) if i < 2 else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"
