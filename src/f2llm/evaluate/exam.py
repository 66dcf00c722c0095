"""The exam: which held-out names are asked for, among which candidates, and how an answer is ranked.

names.parquet -> candidates, questions with their answers, training names, what is left out; scores -> ranks.

Shapes: Q questions, C candidates, B questions of one chunk.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from f2llm.errors import F2Error

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

ENGLISH = "eng"
MIN_QUERIES = 3  # a language with fewer questions has no figure of its own and no part in the means
SETS = {"pairs": "pair", "things": "thing"}  # name in the scores -> value of the split column


@dataclass(frozen=True)
class Questions:
    """Held-out names: text, language and the index of the right candidate of each."""

    texts: list[str]
    langs: list[str]
    answers_Q: Integers


@dataclass(frozen=True)
class Exam:
    """Everything that is scored; `train` are the training names whose thing has an English name."""

    candidates: list[str]
    questions: dict[str, Questions]
    train: Questions
    left_out: dict[str, dict[str, int]]


def read_exam(path: Path) -> Exam:
    """The exam in a names.parquet (columns thing, lang, text, split).

    Candidates are the distinct English names of all things. Left out, and counted: a held-out pair whose
    exact string names the same thing in training, and a name of a thing that has no English name.
    Raises F2Error if the file is missing or asks too little of every language.
    """
    if not path.is_file():
        raise F2Error(f"{path} is missing; run the names stage again.")
    columns = pq.read_table(path, columns=["thing", "lang", "text", "split"]).to_pydict()
    names = list(zip(columns["thing"], columns["lang"], columns["text"], columns["split"], strict=True))

    english = {thing: text for thing, lang, text, _ in names if lang == ENGLISH}
    candidates = sorted(set(english.values()))
    index = {text: number for number, text in enumerate(candidates)}
    answer = {thing: index[text] for thing, text in english.items()}
    trained = {(thing, text) for thing, _, text, split in names if split == "train"}

    questions, left_out = {}, {}
    for name, split in SETS.items():
        asked = [(thing, lang, text) for thing, lang, text, s in names if s == split and lang != ENGLISH]
        answerable = [row for row in asked if row[0] in answer]
        unseen = [(thing, lang, text) for thing, lang, text in answerable if (thing, text) not in trained]
        questions[name] = _questions(unseen, answer)
        left_out[name] = {
            "no_english_name": len(asked) - len(answerable),
            "string_seen_in_training": len(answerable) - len(unseen),
        }
    if max(Counter(questions["pairs"].langs).values(), default=0) < MIN_QUERIES:
        raise F2Error(
            f"{path} has no language with {MIN_QUERIES} held-out names to ask for; "
            "raise held_out_pairs in the names stage or take more languages."
        )
    train = [
        (thing, lang, text) for thing, lang, text, split in names if split == "train" and thing in answer
    ]
    return Exam(candidates, questions, _questions(train, answer), left_out)


def _questions(rows: list[tuple[str, str, str]], answer: dict[str, int]) -> Questions:
    answers_Q = np.array([answer[thing] for thing, _, _ in rows], dtype=np.int64)
    return Questions([text for _, _, text in rows], [lang for _, lang, _ in rows], answers_Q)


def ranks(scores_BC: Floats, answers_B: Integers) -> Integers:
    """Rank of each answer, from 1; candidates that tie with it count as better than it."""
    right_B1 = np.take_along_axis(scores_BC, answers_B[:, None], axis=1)
    ranks_B: Integers = np.count_nonzero(scores_BC >= right_B1, axis=1)
    return ranks_B


def chunks(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover range(total) in order."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
