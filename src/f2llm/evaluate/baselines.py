"""Three baselines that need no training, on the exam and by the ranking rule that the models are held to.

- tfidf: cosine of character n-grams between a question and the English candidates;
- tfidf_nearest: the same between a question and the training names of every language, and from the nearest one
  to its thing and so to its English name;
- lookup: the training names that are exactly the question's string; most names win.

A name of a thing that is held out altogether can be found by the last two through homonyms alone.

Shapes: Q questions, C candidates, N training names, F n-grams, B questions of one chunk.
"""

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np

from f2llm.errors import F2Error
from f2llm.evaluate.exam import Exam, Integers, Questions, chunks, ranks
from f2llm.progress import progress

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

CHUNK = 256  # questions whose scores against all training names are dense at one time: 130 MB


def baseline_ranks(exam: Exam) -> dict[str, dict[str, Integers]]:
    """Baseline -> set of questions -> rank of each answer [Q]. Raises F2Error without scikit-learn."""
    baselines = {"tfidf": tfidf_ranks, "tfidf_nearest": nearest_ranks, "lookup": lookup_ranks}
    return {
        name: {which: ranks_of(exam, questions) for which, questions in exam.questions.items()}
        for name, ranks_of in baselines.items()
    }


def tfidf_ranks(exam: Exam, questions: Questions) -> Integers:
    """Ranks [Q] of the English candidates by cosine of their n-grams with the question's."""
    vectorizer = _vectorizer()
    candidates_FC = vectorizer.fit_transform(exam.candidates).T.tocsr()
    ranks_Q = np.empty(len(questions.texts), dtype=np.int64)
    for chunk in chunks(len(questions.texts), CHUNK):
        questions_BF = vectorizer.transform(questions.texts[chunk])
        ranks_Q[chunk] = ranks((questions_BF @ candidates_FC).toarray(), questions.answers_Q[chunk])
    return ranks_Q


def nearest_ranks(exam: Exam, questions: Questions) -> Integers:
    """Ranks [Q] where the score of a candidate is that of its nearest training name, in any language."""
    distinct = sorted(set(zip(exam.train.answers_Q.tolist(), exam.train.texts, strict=True)))
    candidate_N = np.array([candidate for candidate, _ in distinct])
    # Training names stand in order of their candidate, so that the best of each is a maximum over a stretch.
    named, starts = np.unique(candidate_N, return_index=True)
    vectorizer = _vectorizer()
    names_FN = vectorizer.fit_transform([text for _, text in distinct]).T.tocsr()

    # An answer without a training name scores 0 like everything else and is last, whatever is nearest.
    ranks_Q = np.full(len(questions.texts), len(exam.candidates), dtype=np.int64)
    findable = np.flatnonzero(np.isin(questions.answers_Q, named))
    with progress(total=len(findable), what="score the nearest name", unit="name") as bar:
        for chunk in chunks(len(findable), CHUNK):
            asked = findable[chunk]
            questions_BF = vectorizer.transform([questions.texts[i] for i in asked])
            scores_BC = np.zeros((len(asked), len(exam.candidates)), dtype=np.float32)
            scores_BC[:, named] = np.maximum.reduceat((questions_BF @ names_FN).toarray(), starts, axis=1)
            ranks_Q[asked] = ranks(scores_BC, questions.answers_Q[asked])
            bar.advance(len(asked))
    return ranks_Q


def lookup_ranks(exam: Exam, questions: Questions) -> Integers:
    """Ranks [Q] where the score of a candidate is how many of its training names are exactly the question."""
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for text, candidate in zip(exam.train.texts, exam.train.answers_Q.tolist(), strict=True):
        votes[text][candidate] += 1

    def rank(text: str, answer: int) -> int:
        counts: dict[int, int] = votes.get(text, {})
        if answer not in counts:
            return len(exam.candidates)
        return sum(count >= counts[answer] for count in counts.values())

    pairs = zip(questions.texts, questions.answers_Q.tolist(), strict=True)
    return np.fromiter(
        (rank(text, answer) for text, answer in pairs), dtype=np.int64, count=len(questions.texts)
    )


def _vectorizer() -> "TfidfVectorizer":
    """Character 2- and 3-grams inside words, without accents: the best of those tried for both baselines."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise F2Error(
            "the baselines need scikit-learn, which is missing; install f2llm[eval] or set baselines: false."
        ) from None
    return TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 3), strip_accents="unicode", sublinear_tf=True, dtype=np.float32
    )
