"""Which of the written rows are kept: each check names what is wrong with a row, and the first that does decides.

answer -> form and label -> length -> copies -> language -> repeats of earlier rows -> the order of an embedding model

Checks go from cheap to dear. A repeat is one of a row that passed all before it, whichever request wrote that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from f2llm.data.folded import fold
from f2llm.synthetic.generate import RowRequest
from f2llm.synthetic.journal import Ended
from f2llm.synthetic.kinds import Kind, Labelled, LabelTask, Span, Triple, label_text

Reason = str | None


@dataclass(frozen=True)
class Row:
    """A row that was written, in canonical columns, and what asked for it."""

    asked: RowRequest
    ended: Ended
    query: str
    positives: list[str]
    negatives: list[str]
    label: str | None
    positive_lang: str
    wrong_label: bool = False

    @property
    def kind(self) -> Kind:
        return self.asked.kind

    @property
    def query_lang(self) -> str:
        return self.asked.language


class Encoder(Protocol):
    """What is used of `f2llm.embed.embedder.Embedder`."""

    def encode(
        self, texts: Sequence[str], *, prompt: str, instruction: str | None, too_long: Literal["truncate"]
    ) -> np.ndarray:
        """Unit vectors, float32 [N, D]."""


IsOther = Callable[[str, Sequence[str]], Sequence[bool]]
"""Whether each text is of another language than the tag says; False where that cannot be told."""


def make_row(asked: RowRequest, ended: Ended, other_language: str) -> Row:
    """The row of a good answer."""
    answer = asked.request.form.model_validate(ended.answer)
    if isinstance(answer, Triple):
        positive_lang = other_language if asked.kind.name == "bitext" else asked.language
        return Row(asked, ended, answer.query, [answer.positive], [answer.negative], None, positive_lang)
    assert isinstance(answer, Labelled) and isinstance(asked.task, LabelTask)
    label, other = answer.label, answer.other_label
    wrong = label != asked.label or other == label or other not in asked.task.labels
    # Of classification the document is a label's text; clustering has other texts as negatives.
    negatives = [label_text(asked.task, other)] if asked.kind.format == "classification" else []
    return Row(asked, ended, answer.text, [], negatives, label_text(asked.task, label), asked.language, wrong)


def check_languages(sure: float) -> IsOther:
    """By the detector of `f2llm.data.language_id`, for what is found with a probability of `sure`."""
    from f2llm.data.language_id import OTHER, detect, verdict

    return lambda tag, texts: [
        verdict(tag, text, guess, sure) == OTHER for text, guess in zip(texts, detect(texts), strict=True)
    ]


class Checks:
    """All checks; it remembers which queries there were.

    Args:
        is_other: tells texts of another language; None where nobody looks.
        encoder: has to find a positive above its negative; None where nobody looks.
    """

    def __init__(self, is_other: IsOther | None, encoder: Encoder | None) -> None:
        self._is_other, self._encoder = is_other, encoder
        self._seen: set[tuple[str, str, str]] = set()

    def reasons(self, rows: Sequence[Row]) -> list[Reason]:
        """Why each row is rejected; None where it is kept."""
        reasons: list[Reason] = [None] * len(rows)
        for check in (_labels, _lengths, _copies, self._languages, self._repeats, self._ranks):
            left = [number for number, reason in enumerate(reasons) if reason is None]
            for number, reason in zip(left, check([rows[number] for number in left]), strict=True):
                reasons[number] = reason
        return reasons

    def _languages(self, rows: Sequence[Row]) -> list[Reason]:
        if self._is_other is None:
            return [None] * len(rows)
        texts = [
            (tag, text, number)
            for number, row in enumerate(rows)
            for tag, text in [(row.query_lang, row.query)]
            + [(row.positive_lang, text) for text in (row.positives + row.negatives) * bool(row.positives)]
        ]
        wrong: set[int] = set()
        for tag in sorted({tag for tag, _, _ in texts}):
            of_tag = [(text, number) for other, text, number in texts if other == tag]
            found = self._is_other(tag, [text for text, _ in of_tag])
            wrong |= {number for (_, number), is_other in zip(of_tag, found, strict=True) if is_other}
        return ["wrong language" if number in wrong else None for number in range(len(rows))]

    def _repeats(self, rows: Sequence[Row]) -> list[Reason]:
        reasons: list[Reason] = []
        folded = fold(pa.array([row.query for row in rows], pa.string())).strings()
        for row, query in zip(rows, folded, strict=True):
            key = (row.kind.name, row.query_lang, query)
            reasons.append("duplicate" if key in self._seen else None)
            self._seen.add(key)
        return reasons

    def _ranks(self, rows: Sequence[Row]) -> list[Reason]:
        reasons: list[Reason] = [None] * len(rows)
        if self._encoder is None:
            return reasons
        for kind in {row.kind.name: row.kind for row in rows if row.positives}.values():
            numbers = [number for number, row in enumerate(rows) if row.kind == kind]
            of_kind = [rows[number] for number in numbers]

            def encode(texts: list[str], prompt: str, instruction: str | None = None) -> np.ndarray:
                assert self._encoder is not None
                return self._encoder.encode(
                    texts, prompt=prompt, instruction=instruction, too_long="truncate"
                )

            query_ND = encode([row.query for row in of_kind], "query", kind.instruction)
            positive_ND = encode([row.positives[0] for row in of_kind], "document")
            negative_ND = encode([row.negatives[0] for row in of_kind], "document")
            is_right_N = (query_ND * (positive_ND - negative_ND)).sum(axis=1) > 0
            for number, is_right in zip(numbers, is_right_N.tolist(), strict=True):
                reasons[number] = None if is_right else "positive not above negative"
        return reasons


def _labels(rows: Sequence[Row]) -> list[Reason]:
    return ["wrong label" if row.wrong_label else None for row in rows]


def _lengths(rows: Sequence[Row]) -> list[Reason]:
    return [_length(row) for row in rows]


def _length(row: Row) -> Reason:
    documents = [*row.positives, *row.negatives] if row.positives else []
    spans: list[tuple[str, Span]] = [
        (row.query, row.kind.query_span),
        *((text, row.kind.document_span) for text in documents),
    ]
    if any(len(text) < span.fewest for text, span in spans):
        return "too short"
    return "too long" if any(len(text) > span.most for text, span in spans) else None


def _copies(rows: Sequence[Row]) -> list[Reason]:
    """Of rows in which two of the three texts are one."""
    reasons: list[Reason] = []
    for row in rows:
        texts = fold(pa.array([row.query, *row.positives, *row.negatives], pa.string())).strings()
        reasons.append("copied text" if len(set(texts)) < len(texts) else None)
    return reasons


def columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Of rows, for `f2llm.data.rows.rows_table`."""
    names = ("query", "positives", "negatives", "label", "query_lang", "positive_lang")
    return {name: [getattr(row, name) for row in rows] for name in names}
