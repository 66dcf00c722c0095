"""The exam and the scores of a model, against small cases worked out by hand and a naive ranking."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm.errors import F2Error
from f2llm.evaluate import names as scoring
from f2llm.evaluate.exam import Exam, Questions, chunks, ranks, read_exam
from f2llm.evaluate.names import evaluate_stage, score_model, summarise, vector_ranks
from f2llm.files import read_json
from f2llm.recipe import EvaluateStage

# thing, lang, text, split
NAMES = [
    ("territory:DE", "eng", "Germany", "train"),
    ("territory:DE", "deu", "Deutschland", "train"),
    ("territory:DE", "nds", "Deutschland", "pair"),  # the same string names the same thing in training
    ("territory:DE", "swa", "Ujerumani", "pair"),
    ("territory:FR", "eng", "France", "train"),
    ("territory:FR", "fra", "France", "pair"),  # likewise, as in English
    ("territory:FR", "swa", "Ufaransa", "pair"),
    ("territory:FR", "rus", "Франция", "pair"),
    (
        "language:fr",
        "swa",
        "Deutschland",
        "pair",
    ),  # seen for another thing; but no English name
    ("currency:EUR", "eng", "Euro", "thing"),
    ("currency:EUR", "deu", "Euro", "thing"),
    ("currency:EUR", "rus", "евро", "thing"),
    ("month:1", "eng", "January", "train"),
    ("month:1", "swa", "Januari", "pair"),
    ("unit:x", "rus", "икс", "thing"),
]


def write_names(folder: Path, rows: list[tuple[str, str, str, str]]) -> Path:
    columns = dict(zip(("thing", "lang", "text", "split"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({**columns, "kind": ["k"] * len(rows)}), folder / "names.parquet")
    return folder / "names.parquet"


class FakeModel:
    """Vectors looked up in a table; keeps what it was asked."""

    parameters, dim, sizes = 12, 4, [2, 4]

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.vectors = vectors
        self.asked: dict[str | None, list[str]] = {}

    def encode(self, texts: list[str], *, prompt: str | None, normalize: bool, too_long: str) -> np.ndarray:
        assert not normalize  # sizes are cut from raw vectors
        self.asked.setdefault(prompt, []).extend(texts)
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)

    def tokens(self, texts: list[str], prompt: str | None) -> int:
        return len(texts) * (3 if prompt == "query" else 1)


def test_exam_asks_for_unseen_strings_with_an_english_answer(tmp_path: Path) -> None:
    exam = read_exam(write_names(tmp_path, NAMES))
    assert exam.candidates == ["Euro", "France", "Germany", "January"]
    assert exam.questions["pairs"].texts == ["Ujerumani", "Ufaransa", "Франция", "Januari"]
    assert exam.questions["pairs"].langs == ["swa", "swa", "rus", "swa"]
    assert exam.questions["pairs"].answers_Q.tolist() == [2, 1, 1, 3]
    assert exam.questions["things"].texts == ["Euro", "евро"]  # English names are candidates, never questions
    assert exam.left_out == {
        "pairs": {"no_english_name": 1, "string_seen_in_training": 2},
        "things": {"no_english_name": 1, "string_seen_in_training": 0},
    }
    assert "Euro" not in exam.train.texts
    assert exam.train.texts == ["Germany", "Deutschland", "France", "January"]


def test_exam_that_asks_too_little_is_refused(tmp_path: Path) -> None:
    rows = [row for row in NAMES if row[1] != "swa"]
    with pytest.raises(F2Error, match="no language with 3 held-out names.*held_out_pairs"):
        read_exam(write_names(tmp_path, rows))
    with pytest.raises(F2Error, match="nothing/names.parquet is missing"):
        read_exam(tmp_path / "nothing" / "names.parquet")


def test_ranks_count_ties_against_the_answer() -> None:
    scores_BC = np.array(
        [[0.9, 0.5, 0.1], [0.5, 0.5, 0.1], [0.0, 0.0, 0.0], [0.1, 0.2, 0.3]], dtype=np.float32
    )
    assert ranks(scores_BC, np.array([0, 0, 2, 0])).tolist() == [1, 2, 3, 3]


def test_vector_ranks_are_those_of_sorting_cosines_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK", 7)
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(23, 16)).astype(np.float32) * rng.uniform(0.1, 9, size=(23, 1)).astype(
        np.float32
    )
    candidates = rng.normal(size=(11, 16)).astype(np.float32) * rng.uniform(0.1, 9, size=(11, 1)).astype(
        np.float32
    )
    answers = rng.integers(0, 11, size=23)
    for size in (3, 16):
        expected = []
        for query, answer in zip(queries[:, :size], answers, strict=True):
            cosines = [query @ c / np.linalg.norm(query) / np.linalg.norm(c) for c in candidates[:, :size]]
            expected.append(sorted(cosines, reverse=True).index(cosines[answer]) + 1)
        assert vector_ranks(queries, candidates, answers, size).tolist() == expected
    # The lengths of the vectors differ, so ranking by inner product would have been another ranking.
    assert ranks(queries @ candidates.T, answers).tolist() != expected


def test_chunks_cover_everything_once() -> None:
    assert [list(range(10))[chunk] for chunk in chunks(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(chunks(0, 4)) == []


def test_summary_is_over_languages_not_questions() -> None:
    langs = ["deu"] * 4 + ["rus"] * 3 + ["fra"] * 3 + ["swa"] * 2  # swa has too few questions
    found = np.array([1, 1, 1, 2, 1, 4, 2, 1, 1, 1, 1, 1])
    summary = summarise(langs, found)
    assert (summary["languages"], summary["queries"]) == (3, 10)
    assert summary["per_language"]["deu"] == {"accuracy_at_1": 0.75, "mrr": 0.875, "queries": 4}
    accuracies = [0.75, 0.3333, 1.0]
    assert summary["accuracy_at_1"]["mean"] == pytest.approx(np.mean(accuracies), abs=1e-4)
    assert summary["accuracy_at_1"]["median"] == 0.75
    assert summary["accuracy_at_1"]["p10"] == pytest.approx(0.3333 + 0.2 * (0.75 - 0.3333), abs=1e-4)
    assert [row["language"] for row in summary["worst"]] == ["rus", "deu", "fra"]
    assert summary["scripts"] == {
        "Latn": {"languages": 2, "accuracy_at_1": 0.875},
        "Cyrl": {"languages": 1, "accuracy_at_1": 0.3333},
    }


def test_summary_of_too_few_questions_is_empty() -> None:
    assert summarise([], np.array([], dtype=np.int64)) == {}
    assert summarise(["deu", "rus"], np.array([1, 1])) == {}


def fake_exam() -> Exam:
    pairs = Questions(["a", "b", "b"], ["deu", "deu", "deu"], np.array([0, 1, 0]))
    nothing = Questions([], [], np.array([], dtype=np.int64))
    return Exam(["A", "B"], {"pairs": pairs, "things": nothing}, nothing, {})


def test_score_model_cuts_every_size_from_one_encoding() -> None:
    model = FakeModel({"A": [1, 0, 0, 0], "B": [0, 1, 0, 0], "a": [2, 0, 0, 9], "b": [3, 2, 0, 0]})
    scores, speed = score_model("base", model, fake_exam())
    # In two dimensions a finds A; b finds A too, right once of two. In four nothing changes.
    for size in ("2", "4"):
        assert scores["pairs"][size]["per_language"]["deu"]["accuracy_at_1"] == pytest.approx(2 / 3, abs=1e-4)
    assert scores["things"] == {"2": {}, "4": {}}
    assert {key: scores[key] for key in ("name", "parameters", "dim", "sizes")} == {
        "name": "base",
        "parameters": 12,
        "dim": 4,
        "sizes": [2, 4],
    }
    assert model.asked == {"query": ["a", "b"], "document": ["A", "B"]}  # equal texts once
    assert speed > 0


def test_numbers_that_are_not_finite_name_the_model() -> None:
    model = FakeModel({"A": [1, 0, 0, 0], "B": [0, 1, 0, 0], "a": [np.nan, 0, 0, 9], "b": [3, 2, 0, 0]})
    with pytest.raises(F2Error, match="model 'tiny' gives numbers that are not finite"):
        score_model("tiny", model, fake_exam())


def test_stage_writes_scores_that_know_no_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {text for _, _, text, _ in NAMES}
    rng = np.random.default_rng(1)
    vectors = {text: rng.normal(size=4).tolist() for text in sorted(texts)}
    vectors |= {"Ujerumani": vectors["Germany"], "Januari": vectors["January"]}
    monkeypatch.setattr(scoring, "Embedder", lambda path: FakeModel(vectors))
    write_names(tmp_path, NAMES)

    config = EvaluateStage(stage="evaluate", data="names", models=["base"], baselines=False)
    written = []
    for attempt in ("one", "two"):
        facts = evaluate_stage(config, data=tmp_path, models={"base": tmp_path}, out=tmp_path / attempt)
        written.append((tmp_path / attempt / "scores.json").read_bytes())
    assert written[0] == written[1]
    scores = read_json(tmp_path / "one" / "scores.json")
    assert scores["models"][0]["pairs"]["4"]["per_language"]["swa"]["accuracy_at_1"] >= 0.6667
    assert scores["baseline"] == {}
    assert facts["questions"] == {"pairs": 4, "things": 2}
    assert facts["spelt_as_in_english"] == {"pairs": 0, "things": 1}
    assert facts["tokens_per_second"]["base"] > 0
