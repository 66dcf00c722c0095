"""What a stage's rows amount to, against hand-written rows counted by hand."""

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import Tokenizer

from f2llm.data.rows import Source, read_rows, rows_table, write_rows
from f2llm.data.token_store_build import build
from f2llm.errors import F2Error
from f2llm.files import write_text
from f2llm.model.prompts import query_prefix
from f2llm.plan.cost import Load
from f2llm.plan.survey import ROWS, survey
from f2llm.recipe_train import HardNegatives, TrainStage, Validation
from f2llm.train.sources import load_sources
from f2llm.train.stage import make_sampler

Settings = Callable[..., TrainStage]

TEXTS = [f"{i:021}" for i in range(20)]
HARD = HardNegatives(retrieval=1, clustering=3, classification=1)


def survey_rows(folder: Path) -> None:
    """Two languages, 30 and 10 rows, with two negatives each; 20 labelled texts."""
    facts = {"task": "t", "licence": "CC0-1.0"}
    pairs = Source(name="pairs", format="retrieval", symmetric=False, instruction="Find it", **facts)
    kinds = Source(name="kinds", format="clustering", symmetric=True, instruction="Say which", **facts)
    columns: dict[str, list[Any]] = {
        "query": [f"q{i}" for i in range(40)],
        "query_lang": ["deu"] * 30 + ["fra"] * 10,
        "positives": [["ab" * 35]] * 40,
        "negatives": [["n" * 35, "m" * 35]] * 40,
    }
    labels: dict[str, list[Any]] = {
        "query": TEXTS,
        "query_lang": ["deu"] * 20,
        "label": ["a", "b"] * 10,
    }
    table = pa.concat_tables([rows_table(pairs, columns), rows_table(kinds, labels)])
    write_rows(folder, table, [pairs, kinds])


def test_rows_are_counted_as_they_are_drawn(settings: Settings, tmp_path: Path) -> None:
    survey_rows(tmp_path / "rows")

    def rows(**changes: Any) -> tuple[int, int]:
        stage = settings(**changes)
        found = survey(stage, tmp_path / "rows", None, None, 1)
        return found.rows, found.held_out

    assert rows() == (60, 0)
    assert rows(formats=["retrieval"]) == (40, 0)
    assert rows(cap=15) == (15 + 15, 0)
    assert rows(cap=15, cap_by="language") == (15 + 10 + 15, 0)
    assert rows(validation=Validation(rows=3)) == (40 - 3 + 20 - 2, 5)


def test_texts_are_measured_in_bytes(settings: Settings, tmp_path: Path) -> None:
    """At 3.5 bytes a token and EOS, queries of 2 or 3 bytes have 2 tokens, 70 bytes 21 and 35 bytes 11."""
    survey_rows(tmp_path / "rows")
    stage = settings(formats=["retrieval"], hard_negatives=HARD, max_length=32, instructions=False)
    assert survey(stage, tmp_path / "rows", None, None, 1).query == Load.of([2, 21, 11])
    shorter = stage.model_copy(update={"max_length": 16})
    assert survey(shorter, tmp_path / "rows", None, None, 1).query == Load.of([2, 16, 11])


def test_texts_are_measured_with_a_tokenizer(
    settings: Settings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A query with its instruction, a text of its class and three of others, half of which carry it too."""
    survey_rows(tmp_path / "rows")
    path = tmp_path / "tokenizer.json"
    write_text(path, tokenizer.to_str())
    stage = settings(
        formats=["clustering"], hard_negatives=HARD, document_instruction_rate=0.5, max_length=64
    )
    found = survey(stage, tmp_path / "rows", path, None, 1).query

    def tokens(prefix: str) -> float:
        return sum(len(tokenizer.encode(prefix + text).ids) for text in TEXTS) / len(TEXTS)

    bare, prompted = tokens(""), tokens(query_prefix("Say which"))
    assert found.texts == pytest.approx(5)
    assert found.tokens == pytest.approx(prompted + 4 * (bare + prompted) / 2)


def test_sources_count_as_often_as_they_are_drawn(settings: Settings, tmp_path: Path) -> None:
    """40 rows of 3 texts and 20 of 5; then with the second source three times as often."""
    survey_rows(tmp_path / "rows")
    stage = settings(hard_negatives=HARD)
    assert survey(stage, tmp_path / "rows", None, None, 1).query.texts == pytest.approx(
        (40 * 3 + 20 * 5) / 60
    )
    weighted = stage.model_copy(update={"source_weights": {"kinds": 3.0}})
    assert survey(weighted, tmp_path / "rows", None, None, 1).query.texts == pytest.approx(
        (40 * 3 + 60 * 5) / 100
    )


def test_a_labels_text_is_computed_once_a_batch(settings: Settings, tmp_path: Path) -> None:
    """A batch of 12 two-way rows has 12 queries and 2 documents."""
    source = Source(
        name="s", format="classification", task="t", symmetric=False, instruction="", licence="CC0-1.0"
    )
    columns = {"query": TEXTS, "query_lang": ["eng"] * 20, "label": ["yes", "no"] * 10}
    write_rows(tmp_path / "rows", rows_table(source, columns), [source])
    found = survey(settings(), tmp_path / "rows", None, None, 1).query
    assert found.texts * 12 == pytest.approx(12 + 2)


def test_a_sample_stands_for_the_source(settings: Settings, tmp_path: Path) -> None:
    """1,000 rows of one to 100 tokens: the mean of the sample is near that of all."""
    source = Source(
        name="s", format="clustering", task="t", symmetric=True, instruction="", licence="CC0-1.0"
    )
    texts = [f"{i:0{7 * (i % 50) + 4}}" for i in range(1000)]
    columns = {"query": texts, "query_lang": ["und"] * 1000, "label": ["a", "b"] * 500}
    write_rows(tmp_path / "rows", rows_table(source, columns), [source])
    stage = settings(hard_negatives=HARD, max_length=512)
    found = survey(stage, tmp_path / "rows", None, None, 1).query
    everything = Load.of([1 + round(len(text) / 3.5) for text in texts]) * (1 / 1000)
    assert found.tokens / found.texts == pytest.approx(everything.tokens, rel=0.1)
    assert found.pairs / found.texts == pytest.approx(everything.pairs, rel=0.2)


def test_the_samplers_batches_have_the_surveyed_size(
    settings: Settings, tokenizer: Tokenizer, rows_folder: Path, tmp_path: Path
) -> None:
    """Tokens of 90 real batches: somewhat fewer, since texts are computed once each; 3 % more or less by chance."""
    path = tmp_path / "tokenizer.json"
    write_text(path, tokenizer.to_str())
    stage = settings(steps=90, batch_size=8, max_length=512)
    table, sources = read_rows(rows_folder)
    batches = make_sampler(stage, load_sources(table, sources, stage.formats), seed=1)
    real = [len(encoded.ids) for step in range(90) for encoded in tokenizer.encode_batch(batches[step].texts)]
    found = survey(stage, rows_folder, path, None, 1)
    assert found.rows == table.num_rows
    assert 0.85 * found.query.tokens < sum(real) / (90 * 8) < 1.03 * found.query.tokens
    assert 0.85 * found.query.texts < len(real) / (90 * 8) < 1.03 * found.query.texts


def test_what_is_not_there_is_assumed(settings: Settings, tmp_path: Path) -> None:
    stage = settings(max_length=100, hard_negatives=HARD)
    assumed = survey(stage, tmp_path / "rows", None, None, 60)
    assert (assumed.rows, assumed.query) == (ROWS, Load.of([60] * 3))
    assert survey(stage, tmp_path / "rows", None, 77, 600).query == Load.of([100] * 3)
    assert survey(stage, tmp_path / "rows", None, 77, 60).rows == 77
    assert survey(stage, tmp_path / "stage2", None, None, 60).rows == 18_000_000


def test_rows_of_other_formats_are_no_data(settings: Settings, tmp_path: Path) -> None:
    survey_rows(tmp_path / "rows")
    with pytest.raises(F2Error, match="has no rows to draw of the formats"):
        survey(settings(formats=["classification"]), tmp_path / "rows", None, None, 60)


def test_a_store_is_what_its_rows_are(settings: Settings, tokenizer: Tokenizer, tmp_path: Path) -> None:
    survey_rows(tmp_path / "rows")
    path = tmp_path / "tokenizer.json"
    write_text(path, tokenizer.to_str())
    sources = {source.name: source for source in read_rows(tmp_path / "rows")[1]}
    prefixes = {name: query_prefix(source.instruction) for name, source in sources.items()}
    build([tmp_path / "rows"], path, tmp_path / "store", prefixes)
    for changes in (
        {},
        {"formats": ["retrieval"], "max_length": 30, "cap": 15, "cap_by": "language"},
        {"instructions": False, "hard_negatives": HARD, "validation": Validation(rows=3)},
        {"formats": ["clustering"], "document_instruction_rate": 0.3, "hard_negatives": HARD},
    ):
        stage = settings(**changes)
        rows, stored = (
            survey(stage, tmp_path / name, tokenizer_file, None, 1)
            for name, tokenizer_file in (("rows", path), ("store", None))
        )
        assert (stored.rows, stored.held_out) == (rows.rows, rows.held_out)
        assert astuple(stored.query) == pytest.approx(astuple(rows.query))
