"""Which column is what: guesses on schemas as public data sets have them, and no guess where one would be wrong."""

import pyarrow as pa
import pytest

from f2llm.data.propose import propose
from f2llm.recipe_fields import Format

TEXT, TEXTS, NUMBER = pa.string(), pa.list_(pa.string()), pa.int64()


def struct(**fields: pa.DataType) -> pa.DataType:
    return pa.struct(list(fields.items()))


PASSAGES = pa.list_(struct(docid=TEXT, title=TEXT, text=TEXT))

PAIRS: dict[str, tuple[dict[str, pa.DataType], dict[str, str | None]]] = {
    "question and passage, answers inside": (
        {
            "id": TEXT,
            "title": TEXT,
            "context": TEXT,
            "question": TEXT,
            "answers": struct(text=TEXTS, answer_start=pa.list_(NUMBER)),
        },
        {"query": "question", "positive": "context"},
    ),
    "triplets": (
        {"anchor": TEXT, "positive": TEXT, "negative": TEXT},
        {"query": "anchor", "positive": "positive", "negatives": "negative"},
    ),
    "lists of passages": (
        {"query_id": TEXT, "query": TEXT, "positive_passages": PASSAGES, "negative_passages": PASSAGES},
        {
            "query": "query",
            "positive": "positive_passages.text",
            "negatives": "negative_passages.text",
        },
    ),
    "instructions, with the language": (
        {"inputs": TEXT, "targets": TEXT, "language": TEXT, "output": TEXT},
        {"query": "inputs", "positive": "output", "lang": "language"},
    ),
    "a summary finds its document": (
        {"document": TEXT, "summary": TEXT, "id": TEXT},
        {"query": "summary", "positive": "document"},
    ),
    "capital letters and long strings": (
        {"Question": pa.large_string(), "Answer": pa.large_string()},
        {"query": "Question", "positive": "Answer"},
    ),
    "several answers": ({"question": TEXT, "answers": TEXTS}, {"query": "question", "positive": "answers"}),
    "numbers are no texts": (
        {"query": NUMBER, "question": TEXT, "passage": NUMBER, "text": TEXT},
        {"query": "question", "positive": "text"},
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(case: str) -> None:
    columns, expected = PAIRS[case]
    proposal = propose(pa.schema(columns), "retrieval")
    assert proposal
    assert proposal.layout == "retrieval"
    got = proposal.columns.model_dump(exclude_unset=True)
    assert got == {"negatives": None, "lang": None} | expected


@pytest.mark.parametrize(
    "columns",
    [
        {"premise": TEXT, "hypothesis": TEXT, "label": NUMBER},  # a contradiction is no positive
        {"query": TEXT, "passage": TEXT, "relevance": NUMBER},
        {"question": TEXT, "context": TEXT, "is_impossible": pa.bool_()},
        {"sentence1": TEXT, "sentence2": TEXT, "gold_label": TEXT},
        {"_id": TEXT, "title": TEXT, "url": TEXT},
        {"text": TEXT},
        {"question": NUMBER, "answer": TEXT},
    ],
)
def test_no_guess_where_it_would_be_wrong(columns: dict[str, pa.DataType]) -> None:
    assert propose(pa.schema(columns), "retrieval") is None


@pytest.mark.parametrize("score", ["score", "similarity_score", "label"])
def test_scored_pairs(score: str) -> None:
    columns = {"sentence1": TEXT, "sentence2": TEXT, score: pa.float32()}
    proposal = propose(pa.schema(columns), "retrieval")
    assert proposal
    assert proposal.layout == "sts"
    assert proposal.uses() == {"sentence1": "sentence1", "sentence2": "sentence2", score: "score"}
    assert "at_least" in proposal.note


def test_translations_are_named_by_their_languages() -> None:
    proposal = propose(pa.schema({"translation": struct(ar=TEXT, zh=TEXT)}), "retrieval")
    assert proposal
    assert proposal.uses() == {"translation.ar": "query", "translation.zh": "positive"}
    assert (proposal.query_lang, proposal.positive_lang) == ("ara", "zho")
    assert propose(pa.schema({"translation": struct(ar=TEXT, notes=TEXT)}), "retrieval") is None


@pytest.mark.parametrize("form", ["clustering", "classification"])
@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        ({"text": TEXT, "label": NUMBER}, "text", "label"),
        ({"text": TEXT, "label": NUMBER, "label_text": TEXT}, "text", "label_text"),
        ({"title": TEXT, "category": TEXT, "id": NUMBER}, "title", "category"),
        ({"sentences": TEXT, "labels": pa.bool_()}, "sentences", "labels"),
    ],
)
def test_labelled_texts(form: Format, columns: dict[str, pa.DataType], text: str, label: str) -> None:
    proposal = propose(pa.schema(columns), form)
    assert proposal
    assert proposal.layout == form
    assert proposal.uses() == {text: "text", label: "label"}
    assert propose(pa.schema({"query": TEXT, "answer": TEXT}), form) is None
