"""Canonical rows: a round trip, stable hashes, and one clear sentence for everything that is wrong on disk."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm.data.rows import (
    ROWS_FILE,
    SCHEMA,
    SOURCES_FILE,
    Source,
    read_rows,
    row_hash,
    rows_table,
    write_rows,
)
from f2llm.errors import F2Error

FACTS: dict[str, Any] = {"task": "t", "symmetric": False, "instruction": "i", "licence": "CC0-1.0"}
PAIRS = Source(name="pairs", format="retrieval", **FACTS)
KINDS = Source(name="kinds", format="clustering", **FACTS)


def pairs() -> pa.Table:
    columns: dict[str, list[Any]] = {
        "query": ["q1", "q2"],
        "positives": [["p"], ["p", "r"]],
        "query_lang": ["deu", "eng"],
    }
    return rows_table(PAIRS, columns)


def kinds() -> pa.Table:
    return rows_table(KINDS, {"query": ["x"], "label": ["fruit"], "query_lang": ["fra"]})


def test_round_trip_and_counts(tmp_path: Path) -> None:
    table = pa.concat_tables([pairs(), kinds()])
    written = write_rows(tmp_path, table, [PAIRS, KINDS])
    rows, sources = read_rows(tmp_path)
    assert rows.equals(table)
    assert rows.schema.equals(SCHEMA)
    assert sources == written
    assert [(s.name, s.rows, s.languages) for s in sources] == [
        ("pairs", 2, ["deu", "eng"]),
        ("kinds", 1, ["fra"]),
    ]


def test_rows_are_filled_from_their_source() -> None:
    assert kinds().to_pylist() == [
        {
            "query": "x",
            "positives": [],
            "negatives": [],
            "label": "fruit",
            "source": "kinds",
            "query_lang": "fra",
            "positive_lang": "fra",
            "licence": "CC0-1.0",
            "task": "t",
            "hash": hashlib.sha256(b"x\x1f\x1f\x1ffruit\x1fkinds").hexdigest()[:16],
        }
    ]


def test_a_hash_tells_every_part_from_every_other() -> None:
    rows = [
        ("a", ["b"], [], None, "s"),
        ("a", [], ["b"], None, "s"),
        ("a", [], [], "b", "s"),
        ("a", ["b", "c"], [], None, "s"),
        ("a", ["bc"], [], None, "s"),
        ("a", ["b"], ["c"], None, "s"),
        ("ab", [], [], None, "s"),
        ("a", ["b"], [], None, "t"),
    ]
    assert len({row_hash(*row) for row in rows}) == len(rows)
    assert row_hash("é", ["ß"], ["中"], "l", "s") == row_hash("é", ["ß"], ["中"], "l", "s")


def with_column(name: str, values: list[object]) -> pa.Table:
    table = pairs()
    place = table.column_names.index(name)
    field = pa.field(name, SCHEMA.field(name).type)
    return table.set_column(place, field, pa.array(values, field.type))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pairs().slice(0, 0), "has no rows"),
        (with_column("query", ["q1", ""]), r"row 2 has no query \(query ''\)"),
        (with_column("query", [None, "q2"]), r"row 1 has no query \(query None\)"),
        (with_column("positives", [["p"], []]), r"row 2 has no positive \(query 'q2'\)"),
        (with_column("source", ["pairs", "other"]), "row 2 is of a source not in sources.json"),
        (with_column("source", ["pairs", "kinds"]), "row 2 has no label"),
        (pairs().drop_columns("label"), "column 'label': expected string, got no such column"),
        (
            pairs().set_column(0, "query", pa.array([1, 2])),
            "column 'query': expected string, got int64",
        ),
    ],
)
def test_wrong_rows_are_neither_written_nor_read(tmp_path: Path, table: pa.Table, message: str) -> None:
    with pytest.raises(F2Error, match=message):
        write_rows(tmp_path, table, [PAIRS, KINDS])
    assert not list(tmp_path.iterdir())

    write_rows(tmp_path, pairs(), [PAIRS, KINDS])
    pq.write_table(table, tmp_path / ROWS_FILE)
    with pytest.raises(F2Error, match=message) as error:
        read_rows(tmp_path)
    assert str(tmp_path / ROWS_FILE) in str(error.value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(F2Error, match=r"rows\.parquet is missing"):
        read_rows(tmp_path / "nowhere")
    write_rows(tmp_path, pairs(), [PAIRS])
    (tmp_path / SOURCES_FILE).write_text('[{"name": "pairs"}]')
    with pytest.raises(F2Error, match=r"sources\.json is not a list of sources: 0\.format: Field required"):
        read_rows(tmp_path)
    (tmp_path / SOURCES_FILE).unlink()
    with pytest.raises(F2Error, match=r"sources\.json is missing"):
        read_rows(tmp_path)
    (tmp_path / ROWS_FILE).write_bytes(b"PAR1 no")
    with pytest.raises(F2Error, match=r"rows\.parquet is not a readable Parquet file"):
        read_rows(tmp_path)
