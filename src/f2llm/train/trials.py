"""What validation asks: for each source its texts, which of them have to find which, and fixed batches for the loss.

Made once per run from the rows held out of training; validate.py turns it into figures as often as wanted. What has to
find what:

- retrieval: a query its answers, among the positives and hard negatives of all held-out rows
- clustering: a text the other texts of its label, among all texts
- classification: a text its label, among the labels

What is right is what `SourceRows.answers` says: in retrieval that includes the positives of rows with the same query
and of the same thing, and a text that stands under two labels has both.

Queries carry the instruction as in training, candidates are bare. The query's own text is never a candidate, save among
labels.

Shape suffixes: C candidates, N texts of a batch, R right candidates of a query.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from f2llm.errors import F2Error
from f2llm.model.prompts import TEMPLATE
from f2llm.recipe_train import TrainStage
from f2llm.train.sampler import Batch, Sampler, prompt_of
from f2llm.train.sources import SourceRows, Text


@dataclass(frozen=True)
class Question:
    """One query and what it has to find, as numbers of the trial's candidates."""

    text: int  # among the trial's texts
    lang: str
    right_R: np.ndarray  # int64, ascending
    own: int | None  # the candidate that is the query's own text


@dataclass(frozen=True)
class Trial:
    """All that is asked of one source."""

    source: str
    format: str
    rows: int
    texts: list[Text]  # distinct, prompts included: of queries, candidates and batches
    candidate_C: np.ndarray  # int64, among texts
    questions: list[Question]
    batches: list[tuple[Batch, np.ndarray]]  # and int64 [N], the place of its texts among `texts`


def prepare(
    config: TrainStage, held_out: Sequence[SourceRows], seed: int, template: str = TEMPLATE
) -> list[Trial]:
    """The trials of a run; sources without held-out rows have none.

    A question needs a right and a wrong candidate; rows that give none count in the loss alone.

    Raises:
        F2Error if no source gives any question.
    """
    trials = [_trial(config, rows, seed, template) for rows in held_out if len(rows)]
    if not any(trial.questions for trial in trials):
        raise F2Error(
            f"the {sum(map(len, held_out))} rows held out for validation give no question with a right and a wrong "
            "answer; raise validation.rows, give more data or leave validation out."
        )
    return trials


def _trial(config: TrainStage, rows: SourceRows, seed: int, template: str) -> Trial:
    number: dict[Text, int] = {}

    def index(text: Text) -> int:
        return number.setdefault(text, len(number))

    prompt = prompt_of(rows.source, config.instructions, template)
    asked = rows.asked(range(len(rows)), (), prompt)
    candidates, right_by_row = CANDIDATES[rows.source.format](rows)
    place = {text: c for c, text in enumerate(candidates)}
    questions = []
    for query, lang, right_R in zip(rows.query, rows.query_lang, right_by_row, strict=True):
        own = place.get(query) if rows.source.format != "classification" else None
        right_R = right_R[right_R != own] if own is not None else right_R
        wrong = len(candidates) - len(right_R) - (own is not None)
        if len(right_R) and wrong:
            questions.append(Question(index(asked.get(query, query)), lang, right_R, own))
    candidate_C = np.asarray([index(text) for text in candidates], dtype=np.int64)
    batches = [
        (batch, np.asarray([index(text) for text in batch.texts])) for batch in _batches(config, rows, seed)
    ]
    return Trial(
        source=rows.source.name,
        format=rows.source.format,
        rows=len(rows),
        texts=list(number),
        candidate_C=candidate_C,
        questions=questions,
        batches=batches,
    )


def _batches(config: TrainStage, rows: SourceRows, seed: int) -> Iterator[Batch]:
    """One epoch in whole batches, drawn as in training; rows left over at the end have no part in the loss."""
    if rows.source.format != "retrieval" and len(rows.labels) < 2:
        return  # no other label, no negatives
    size = min(config.batch_size, len(rows))
    steps = len(rows) // size
    sampler = Sampler(
        [rows],
        seed=seed,
        steps=steps,
        batch_size=size,
        hard_negatives=config.hard_negatives.model_dump(),
        instructions=config.instructions,
        document_instruction_rate=config.document_instruction_rate,
    )
    for step in range(steps):
        yield sampler[step]


# Distinct candidates, and for each row which of them are right (int64, ascending).
Candidates = tuple[list[Text], list[np.ndarray]]


def _documents(rows: SourceRows) -> Candidates:
    documents = list(dict.fromkeys(text for texts in (*rows.positives, *rows.negatives) for text in texts))
    place = {text: c for c, text in enumerate(documents)}
    return documents, [_ascending(place[text] for text in rows.answers(row)) for row in range(len(rows))]


def _texts(rows: SourceRows) -> Candidates:
    texts = list(dict.fromkeys(rows.query))
    place = {text: c for c, text in enumerate(texts)}
    of_label = {
        label: _ascending(place[rows.query[row]] for row in members.tolist())
        for label, members in zip(rows.labels, rows.rows_of_label, strict=True)
    }
    right = [[of_label[label] for label in rows.answers(row)] for row in range(len(rows))]
    return texts, [
        several[0] if len(several) == 1 else np.unique(np.concatenate(several)) for several in right
    ]


def _labels(rows: SourceRows) -> Candidates:
    place = {label: c for c, label in enumerate(rows.labels)}
    return rows.labels, [_ascending(place[label] for label in rows.answers(row)) for row in range(len(rows))]


def _ascending(numbers: Iterable[int]) -> np.ndarray:
    return np.asarray(sorted(set(numbers)), dtype=np.int64)


CANDIDATES: dict[str, Callable[[SourceRows], Candidates]] = {
    "retrieval": _documents,
    "clustering": _texts,
    "classification": _labels,
}
