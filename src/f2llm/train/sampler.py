"""From canonical rows to batches: the batch of a step is a pure function of (seed, step).

sources -> whose turn a step is -> which of its rows (epochs.py) -> what each row brings (draws.py) -> texts and roles

A batch holds rows of one source. Which source comes at which step is drawn once for the whole run; inside a source
rows come in a new random order each epoch. What a row leaves open beyond that (hard negatives, instruction on a
document) is drawn from a generator of (seed, step). So a step can be made again out of order, by any process, and
resuming needs no saved iterator.

Shape suffixes: B queries, K hard negatives per query, S steps, P pairs of a query and a text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain

import numpy as np

from f2llm.data.rows import Source
from f2llm.errors import UsageError
from f2llm.model.prompts import TEMPLATE, query_prefix
from f2llm.progress import say
from f2llm.rng import generator
from f2llm.train.draws import DRAW, right_too
from f2llm.train.epochs import CapBy, RowStream
from f2llm.train.objective import NONE
from f2llm.train.sources import SourceRows, Text, hold_out, load_sources

__all__ = ["Batch", "Sampler", "SourceRows", "hold_out", "load_sources", "source_schedule"]


@dataclass(frozen=True)
class Batch:
    """One step's work as data about texts: each distinct text once, with its prompt."""

    source: str
    texts: list[Text]  # distinct, prompts included
    query_B: np.ndarray  # int64, index into texts
    positive_B: np.ndarray
    negative_BK: (
        np.ndarray
    )  # NONE (-1) where a query has fewer than K, which is the most that any of them has
    same_BB: np.ndarray  # bool: positive j may be right for query i too
    known_P2: (
        np.ndarray
    )  # int64, ascending (query, text): what is known to be right for the query; retrieval only
    in_batch: bool


class Sampler:
    """Batches of a run, by step.

    Args:
        steps, epochs: how long the run is; one of them. In an epoch each source has its rows, capped, times its weight.
        batch_size: queries in a step.
        hard_negatives: most of them for each query, by format.
        instructions: whether queries carry their source's instruction.
        document_instruction_rate: share of the documents of symmetric sources that carry it too.
        source_weights: how often rows of a source come, relative to those of others (1).
        cap, cap_by: most rows of a source, or of each of its languages, in an epoch; each epoch draws others.
        language_temperature: T; languages of a source come in proportion to (their capped rows) ** (1 / T).

    Raises UsageError where these do not fit together or not the sources.
    """

    def __init__(
        self,
        sources: Sequence[SourceRows],
        *,
        seed: int,
        batch_size: int,
        hard_negatives: Mapping[str, int],
        instructions: bool,
        document_instruction_rate: float,
        steps: int | None = None,
        epochs: float | None = None,
        source_weights: Mapping[str, float] | None = None,
        cap: int | None = None,
        cap_by: CapBy = "source",
        language_temperature: float = 1.0,
        template: str = TEMPLATE,
    ) -> None:
        self.template = template
        self.seed, self.hard_negatives, self.instructions = seed, hard_negatives, instructions
        self.document_instruction_rate = document_instruction_rate
        self.streams = [
            RowStream(
                rows,
                seed=seed,
                batch_size=batch_size,
                cap=cap,
                cap_by=cap_by,
                language_temperature=language_temperature,
            )
            for rows in sources
        ]
        sizes = _weighted_sizes(self.streams, source_weights or {})
        self.steps = _steps(steps, epochs, sum(sizes, Fraction()) / batch_size)
        self.schedule_S = source_schedule([float(size) for size in sizes], self.steps, seed)
        self.turn_S = _turns(self.schedule_S)
        scheduled = set(self.schedule_S.tolist())
        left_out = [
            stream.rows.source.name
            for number, stream in enumerate(self.streams)
            if sizes[number] and number not in scheduled
        ]
        if left_out:
            say(
                f"{self.steps} steps are too few for {len(left_out)} source(s), of which no row is drawn: "
                f"{', '.join(left_out)}; give more steps or raise their source_weights."
            )

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        """The batch of step 0, 1, ..."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is not among the run's {self.steps} steps, which count from 0.")
        stream = self.streams[self.schedule_S[step]]
        picked = stream[int(self.turn_S[step])]
        return self._batch(
            stream.rows,
            picked.row_M.tolist(),
            picked.share_M.tolist(),
            generator(self.seed, "draws", step),
        )

    def _batch(
        self, rows: SourceRows, row_B: list[int], share_B: list[float], rng: np.random.Generator
    ) -> Batch:
        source = rows.source
        draw, most = DRAW[source.format], self.hard_negatives[source.format]
        drawn = [draw(rows, row, share, most, rng) for row, share in zip(row_B, share_B, strict=True)]
        positives, negatives = [positive for positive, _ in drawn], [texts for _, texts in drawn]
        documents = {*positives, *chain.from_iterable(negatives)}
        same_BB, known = right_too(rows, row_B, positives, documents)

        asked = rows.asked(row_B, documents, prompt_of(source, self.instructions, self.template))
        rate = self.document_instruction_rate if source.symmetric else 0.0
        number: dict[Text, int] = {}

        def index(text: Text) -> int:
            return number.setdefault(text, len(number))

        def document(text: Text) -> int:
            return index(asked[text] if asked and rng.random() < rate else text)

        query_B = [index(asked.get(text, text)) for text in (rows.query[row] for row in row_B)]
        positive_B = [document(text) for text in positives]
        negative_BK = np.full((len(row_B), max(map(len, negatives))), NONE)
        for i, texts in enumerate(negatives):
            negative_BK[i, : len(texts)] = [document(text) for text in texts]
        forms = ((i, form) for i, text in known for form in (text, asked.get(text, text)))
        pairs = {(i, number[form]) for i, form in forms if form in number}
        return Batch(
            source=source.name,
            texts=list(number),
            query_B=np.asarray(query_B),
            positive_B=np.asarray(positive_B),
            negative_BK=negative_BK,
            same_BB=same_BB,
            known_P2=np.asarray(sorted(pairs), dtype=np.int64).reshape(-1, 2),
            in_batch=rows.is_retrieval,
        )


def prompt_of(source: Source, instructions: bool, template: str) -> str:
    """What stands in front of the queries of a source; nothing where it has no instruction, or none is wanted."""
    return query_prefix(source.instruction, template) if instructions and source.instruction else ""


def source_schedule(sizes: Sequence[float], steps: int, seed: int) -> np.ndarray:
    """Int64 [S]: which source each step takes, in proportion to `sizes`, shuffled."""
    share = np.asarray(sizes, dtype=np.float64) / sum(sizes)
    # Whole steps first; what is left over goes to the sources that rounding down cut most.
    counts = np.floor(share * steps).astype(np.int64)
    counts[np.argsort(counts - share * steps, kind="stable")[: steps - counts.sum()]] += 1
    return generator(seed, "sources").permutation(np.repeat(np.arange(len(share)), counts))


def _turns(schedule_S: np.ndarray) -> np.ndarray:
    """Int64 [S]: how many earlier steps took the same source."""
    order_S = np.argsort(schedule_S, kind="stable")
    place_S = np.empty_like(order_S)
    place_S[order_S] = np.arange(len(order_S))
    return place_S - np.searchsorted(schedule_S[order_S], schedule_S)


# Sizes and lengths are exact fractions of the decimals as they are written: 1.1 epochs of 10 batches are 11 steps,
# while 1.1 * 10 in floating point rounds up to 12.


def _weighted_sizes(streams: Sequence[RowStream], weights: Mapping[str, float]) -> list[Fraction]:
    """Rows of an epoch of each source, times its weight."""
    names = [stream.rows.source.name for stream in streams]
    if unknown := set(weights) - set(names):
        raise UsageError(
            f"source_weights names {sorted(unknown)[0]!r}, which is not among the sources {names}; correct the name."
        )
    sizes = [
        stream.epoch_size * Fraction(str(weights.get(name, 1)))
        for name, stream in zip(names, streams, strict=True)
    ]
    if not sum(sizes):
        raise UsageError("source_weights leaves no source to draw from; give one of them a weight above 0.")
    return sizes


def _steps(steps: int | None, epochs: float | None, batches: Fraction) -> int:
    """The length of a run, of which one or the other is given, with so many batches in an epoch."""
    if steps is not None and epochs is None:
        return steps
    if epochs is not None and steps is None:
        return math.ceil(Fraction(str(epochs)) * batches)
    raise UsageError(
        f"the length of a run is given in steps or in epochs, got steps={steps}, epochs={epochs}."
    )
