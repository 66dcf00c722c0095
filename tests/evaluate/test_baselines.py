"""Each baseline against a naive ranking, one question and one name at a time, on names in several scripts."""

import builtins
import math
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from f2llm.errors import F2Error
from f2llm.evaluate import baselines
from f2llm.evaluate.exam import Exam, Questions

CANDIDATES = ["Austria", "Australia", "Brazil", "Germany", "Guinea", "Niger", "Nigeria", "Norwegian Krone"]
TRAIN = [
    ("Austria", 0), ("Österreich", 0), ("Autriche", 0), ("Австрия", 0), ("النمسا", 0),
    ("Australia", 1), ("Australien", 1), ("Австралия", 1),
    ("Brazil", 2), ("Brasil", 2), ("Бразилия", 2), ("巴西", 2),
    ("Germany", 3), ("Deutschland", 3), ("Tyskland", 3), ("ألمانيا", 3),
    ("Guinea", 4), ("Guinée", 4), ("Гвинея", 4),
    ("Niger", 5), ("Níger", 5), ("النيجر", 5),
    ("Nigeria", 6), ("Nigéria", 6), ("Нигерия", 6), ("Niger", 6),
]  # fmt: skip
ASKED = [
    ("Austrija", 0), ("Аўстрыя", 0), ("Australie", 1), ("Brésil", 2), ("Бразілія", 2), ("Duitsland", 3),
    ("ألمانيا الاتحادية", 3), ("Gini", 4), ("Niger", 5), ("Niger", 6), ("Nigeriya", 6), ("นอร์เวย์", 7), ("", 2),
    ("Norske kroner", 7),
]  # fmt: skip


def questions(rows: list[tuple[str, int]]) -> Questions:
    return Questions(
        [text for text, _ in rows], ["und"] * len(rows), np.array([answer for _, answer in rows])
    )


@pytest.fixture
def exam() -> Exam:
    return Exam(CANDIDATES, {"pairs": questions(ASKED), "things": questions([])}, questions(TRAIN), {})


def grams(text: str) -> Counter[str]:
    """Character 2- and 3-grams of each word with a blank at either end, lower case, no accents."""
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    found: Counter[str] = Counter()
    for word in plain.split():
        padded = f" {word} "
        found.update(padded[i : i + n] for n in (2, 3) for i in range(len(padded) - n + 1))
    return found


def naive_cosines(documents: list[str], query: str) -> list[float]:
    frequency = Counter(gram for document in documents for gram in grams(document))

    def weigh(text: str) -> dict[str, float]:
        weights = {
            gram: (1 + math.log(count)) * (1 + math.log((1 + len(documents)) / (1 + frequency[gram])))
            for gram, count in grams(text).items()
            if gram in frequency
        }
        length = math.sqrt(sum(w * w for w in weights.values())) or 1.0
        return {gram: w / length for gram, w in weights.items()}

    asked = weigh(query)
    return [sum(w * asked.get(gram, 0.0) for gram, w in weigh(document).items()) for document in documents]


def naive_rank(scores: list[float], answer: int) -> int:
    return sum(score >= scores[answer] - 1e-6 for score in scores)


def naive_tfidf(text: str, answer: int) -> int:
    return naive_rank(naive_cosines(CANDIDATES, text), answer)


def naive_nearest(text: str, answer: int) -> int:
    cosines = naive_cosines([name for name, _ in TRAIN], text)
    best = [0.0] * len(CANDIDATES)
    for (_, candidate), cosine in zip(TRAIN, cosines, strict=True):
        best[candidate] = max(best[candidate], cosine)
    return naive_rank(best, answer)


def naive_lookup(text: str, answer: int) -> int:
    votes = [float(sum(row == (text, c) for row in TRAIN)) for c in range(len(CANDIDATES))]
    return naive_rank(votes, answer)


@pytest.mark.parametrize(
    ("name", "naive"), [("tfidf", naive_tfidf), ("tfidf_nearest", naive_nearest), ("lookup", naive_lookup)]
)
def test_ranks_equal_naive_ones(
    name: str, naive: Callable[[str, int], int], exam: Exam, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "CHUNK", 3)
    found = baselines.baseline_ranks(exam)[name]
    assert found["pairs"].tolist() == [naive(text, answer) for text, answer in ASKED]
    assert found["things"].tolist() == []


def test_nearest_name_bridges_scripts_that_tfidf_cannot(exam: Exam) -> None:
    found = baselines.baseline_ranks(exam)
    belarusian = [text for text, _ in ASKED].index("Бразілія")
    assert found["tfidf"]["pairs"][belarusian] == len(CANDIDATES)  # no n-gram in common: behind everything
    assert found["tfidf_nearest"]["pairs"][belarusian] == 1


def test_homonyms_tie_against_both_things(exam: Exam) -> None:
    found = baselines.baseline_ranks(exam)["lookup"]["pairs"]
    asked = [text for text, _ in ASKED]
    assert found[asked.index("Niger") : asked.index("Niger") + 2].tolist() == [2, 2]


def test_missing_scikit_learn_says_what_to_install(exam: Exam, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(F2Error, match=r"install f2llm\[eval\]"):
        baselines.baseline_ranks(exam)
