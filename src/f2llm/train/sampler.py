"""From canonical rows to batches: the batch of a step is a pure function of (seed, step).

A batch holds rows of one source. Which source comes at which step is drawn once for the whole run; inside a source
rows come in a new random order each epoch. Everything a row leaves open (which positive, partners of a clustering
or classification text, instruction on a document) is drawn from a generator of (seed, step). So a step can be made
again out of order, by any process, and resuming needs no saved iterator.

Shape suffixes: B queries, K hard negatives per query, S steps.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from f2llm.data.rows import Source
from f2llm.errors import F2Error, UsageError
from f2llm.model.prompts import query_prefix
from f2llm.rng import generator

# Positive of each query, hard negatives of each query, label of each query.
Drawn = tuple[list[str], list[list[str]], list[str | None]]


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source, as columns, with what the draws need."""

    source: Source
    query: list[str]
    positives: list[list[str]]
    negatives: list[list[str]]
    label: list[str | None]
    rows_by_label: dict[str | None, np.ndarray]

    def __len__(self) -> int:
        return len(self.query)


def load_sources(table: pa.Table, sources: Sequence[Source], formats: Sequence[str]) -> list[SourceRows]:
    """Columns of every source whose format is wanted, in the order of `sources`."""
    loaded = []
    source_of_row = np.asarray(table["source"].to_pylist())
    for source in sources:
        if source.format not in formats:
            continue
        part = table.filter(pa.array(source_of_row == source.name))
        labels = part["label"].to_pylist()
        by_label: dict[str | None, list[int]] = defaultdict(list)
        for row, label in enumerate(labels):
            by_label[label].append(row)
        if source.format != "retrieval" and len(by_label) < 2:
            raise F2Error(
                f"source {source.name} ({source.format}) has {len(by_label)} label(s), expected at least 2; "
                "without another label there is no negative, so add rows or leave the source out."
            )
        loaded.append(
            SourceRows(
                source=source,
                query=part["query"].to_pylist(),
                positives=part["positives"].to_pylist(),
                negatives=part["negatives"].to_pylist(),
                label=labels,
                rows_by_label={label: np.asarray(row_numbers) for label, row_numbers in by_label.items()},
            )
        )
    if not loaded:
        raise F2Error(f"no source has a format out of {list(formats)}; give data of such a format.")
    return loaded


def source_schedule(sizes: Sequence[float], steps: int, seed: int) -> np.ndarray:
    """int64 [S]: which source each step takes, in proportion to `sizes`, shuffled."""
    share = np.asarray(sizes, dtype=np.float64) / sum(sizes)
    # Whole steps first; what is left over goes to the sources that rounding down cut most.
    counts = np.floor(share * steps).astype(np.int64)
    counts[np.argsort(counts - share * steps, kind="stable")[: steps - counts.sum()]] += 1
    return generator(seed, "sources").permutation(np.repeat(np.arange(len(share)), counts))


@dataclass(frozen=True)
class Batch:
    """One step's work as data about texts: each distinct text once, with its prompt."""

    source: str
    texts: list[str]  # distinct, prompts included
    query_B: np.ndarray  # int64, index into texts
    positive_B: np.ndarray
    negative_BK: np.ndarray
    same_BB: np.ndarray  # bool: positive j may be right for query i too
    in_batch: bool


class Sampler:
    """Batches of a run, by step."""

    def __init__(
        self,
        sources: Sequence[SourceRows],
        *,
        seed: int,
        steps: int,
        batch_size: int,
        hard_negatives: Mapping[str, int],
        instructions: bool,
        document_instruction_rate: float,
        source_weights: Mapping[str, float] | None = None,
    ) -> None:
        if unknown := set(source_weights or {}) - {rows.source.name for rows in sources}:
            raise UsageError(
                f"source_weights names {sorted(unknown)[0]!r}, which is not among the sources "
                f"{[rows.source.name for rows in sources]}; correct the name."
            )
        self.sources, self.seed, self.batch_size = sources, seed, batch_size
        self.hard_negatives, self.instructions = hard_negatives, instructions
        self.document_instruction_rate = document_instruction_rate
        weights = [len(rows) * (source_weights or {}).get(rows.source.name, 1.0) for rows in sources]
        if not sum(weights):
            raise UsageError(
                "source_weights leaves no source to draw from; give one of them a weight above 0."
            )
        self.schedule_S = source_schedule(weights, steps, seed)

    def __getitem__(self, step: int) -> Batch:
        """The batch of step 0, 1, ..."""
        chosen = int(self.schedule_S[step])
        rows = self.sources[chosen]
        turn = int((self.schedule_S[:step] == chosen).sum())
        picked_B = self._rows(rows, turn)
        rng = generator(self.seed, "draws", step)
        draw, count = DRAW[rows.source.format], self.hard_negatives[rows.source.format]
        positives, negatives, labels = draw(rows, picked_B, count, rng)
        queries, known = [rows.query[r] for r in picked_B], [rows.positives[r] for r in picked_B]
        same_BB = _same(queries, positives, labels, known)
        return self._assemble(rows.source, queries, positives, negatives, same_BB, rng)

    def _rows(self, rows: SourceRows, turn: int) -> np.ndarray:
        """Row numbers of the source's `turn`-th batch; a batch may span epochs."""
        wanted = np.arange(turn * self.batch_size, (turn + 1) * self.batch_size)
        epochs, places = np.divmod(wanted, len(rows))
        order = {
            e: generator(self.seed, rows.source.name, int(e)).permutation(len(rows))
            for e in np.unique(epochs)
        }
        return np.asarray([order[e][p] for e, p in zip(epochs, places, strict=True)])

    def _assemble(
        self,
        source: Source,
        queries: list[str],
        positives: list[str],
        negatives: list[list[str]],
        same_BB: np.ndarray,
        rng: np.random.Generator,
    ) -> Batch:
        prefix = query_prefix(source.instruction) if self.instructions and source.instruction else ""
        rate = self.document_instruction_rate if prefix and source.symmetric else 0.0

        def document(text: str) -> str:
            return prefix + text if rate and rng.random() < rate else text

        number: dict[str, int] = {}

        def index(text: str) -> int:
            return number.setdefault(text, len(number))

        query_B = [index(prefix + text) for text in queries]
        positive_B = [index(document(text)) for text in positives]
        negative_BK = [[index(document(text)) for text in row] for row in negatives]
        return Batch(
            source=source.name,
            texts=list(number),
            query_B=np.asarray(query_B),
            positive_B=np.asarray(positive_B),
            negative_BK=np.asarray(negative_BK, dtype=np.int64).reshape(len(queries), -1),
            same_BB=same_BB,
            in_batch=source.format == "retrieval",
        )


def _draw_retrieval(rows: SourceRows, picked_B: np.ndarray, count: int, rng: np.random.Generator) -> Drawn:
    """One positive of each row and up to `count` of its hard negatives (as many as every row of the batch has)."""
    positives = [
        _pick(rows.positives[r], u) for r, u in zip(picked_B, rng.random(len(picked_B)), strict=True)
    ]
    count = min(count, *(len(rows.negatives[r]) for r in picked_B))
    negatives = [
        [rows.negatives[r][i] for i in rng.permutation(len(rows.negatives[r]))[:count]] for r in picked_B
    ]
    return positives, negatives, [rows.label[r] for r in picked_B]


def _draw_clustering(rows: SourceRows, picked_B: np.ndarray, count: int, rng: np.random.Generator) -> Drawn:
    """A text of the same label as positive, texts of `count` other labels (drawn with replacement) as negatives."""
    own = [rows.label[r] for r in picked_B]
    others = _other_labels(rows, own, rng.random((len(own), count)))
    positives = [_partner(rows, int(r), u) for r, u in zip(picked_B, rng.random(len(own)), strict=True)]
    negatives = [
        [_text(rows, label, u) for label, u in zip(row, us, strict=True)]
        for row, us in zip(others, rng.random((len(own), count)), strict=True)
    ]
    return positives, negatives, own


def _draw_classification(
    rows: SourceRows, picked_B: np.ndarray, count: int, rng: np.random.Generator
) -> Drawn:
    """The label's text as positive, `count` other labels' texts as negatives."""
    own = [rows.label[r] for r in picked_B]
    return [str(label) for label in own], _other_labels(rows, own, rng.random((len(own), count))), own


DRAW = {"retrieval": _draw_retrieval, "clustering": _draw_clustering, "classification": _draw_classification}


def _pick(pool: Sequence[str], u: float) -> str:
    """The element at share `u` (0 <= u < 1) of a list: a uniform draw from a number that is drawn in bulk."""
    return pool[int(u * len(pool))]


def _text(rows: SourceRows, label: str | None, u: float) -> str:
    pool = rows.rows_by_label[label]
    return rows.query[pool[int(u * len(pool))]]


def _partner(rows: SourceRows, row: int, u: float) -> str:
    """Another text of the row's label; the row's own where its label has no other."""
    pool = rows.rows_by_label[rows.label[row]]  # ascending
    if len(pool) == 1:
        return rows.query[row]
    place = int(u * (len(pool) - 1))
    return rows.query[pool[place + (place >= np.searchsorted(pool, row))]]


def _other_labels(rows: SourceRows, own: Sequence[str | None], u_BK: np.ndarray) -> list[list[str]]:
    labels = sorted(str(label) for label in rows.rows_by_label)
    place = {label: number for number, label in enumerate(labels)}

    def other(label: str, u: float) -> str:
        drawn = int(u * (len(labels) - 1))
        return labels[drawn + (drawn >= place[label])]

    return [[other(str(label), u) for u in us] for label, us in zip(own, u_BK, strict=True)]


def _same(
    queries: list[str], positives: list[str], labels: list[str | None], known: list[list[str]]
) -> np.ndarray:
    """Bool [B, B]: whether the positive of j may be right for query i too.

    It is where rows i and j name the same thing, share the query or the positive, or where the positive of j is the
    text of i or among the positives known for i, drawn or not.
    """

    def numbers(*values: Sequence[object]) -> list[np.ndarray]:
        seen: dict[object, int] = {}
        return [np.asarray([seen.setdefault(v, len(seen)) for v in column]) for column in values]

    query_B, positive_B = numbers(queries, positives)
    (label_B,) = numbers([label if label is not None else object() for label in labels])
    same_BB: np.ndarray = (
        (label_B[:, None] == label_B[None, :])
        | (positive_B[:, None] == positive_B[None, :])
        | (query_B[:, None] == query_B[None, :])
        | (query_B[:, None] == positive_B[None, :])
    )
    columns = defaultdict(list)
    for column, positive in enumerate(positives):
        columns[positive].append(column)
    for row, texts in enumerate(known):
        same_BB[row, [column for text in texts for column in columns.get(text, ())]] = True
    return same_BB
