"""A user's files: every format gives the same rows, and every slip one sentence with its place."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm.data.rows import Source, read_rows
from f2llm.data.user_files import files_stage, import_files
from f2llm.errors import UsageError
from f2llm.recipe_data import FilesStage

FACTS: dict[str, Any] = {"task": "t", "symmetric": False, "instruction": "i", "licence": "CC0-1.0"}
PAIRS = Source(name="pairs", format="retrieval", **FACTS)
TOPICS = Source(name="topics", format="clustering", **FACTS)

ROWS: list[dict[str, Any]] = [
    {"query": 'say "hi"', "positives": ["one", "zwei\ttabs"], "negatives": ["no"]},
    {"query": "e\u0301", "positives": ["x, y"], "negatives": []},
]


def write(file: Path, records: list[dict[str, Any]]) -> Path:
    """Write records as the ending of `file` says; lists as JSON where a cell must be a text."""
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    else:
        flat = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in records]
        with open(file, "w", newline="", encoding="utf-8-sig") as out:
            rows = [list(flat[0]), *(list(record.values()) for record in flat)]
            if file.suffix == ".csv":
                csv.writer(out).writerows(rows)
            else:
                out.writelines("\t".join(map(str, row)) + "\n" for row in rows)
    return file


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    rows = import_files([write(tmp_path / f"a.{ending}", ROWS)], PAIRS, query_lang="de").to_pylist()
    assert [row["query"] for row in rows] == ['say "hi"', "é"]
    assert [row["positives"] for row in rows] == [["one", "zwei\ttabs"], ["x, y"]]
    assert [row["negatives"] for row in rows] == [["no"], []]
    assert {(row["query_lang"], row["positive_lang"], row["label"]) for row in rows} == {("deu", "und", None)}


def test_one_text_or_a_list_and_other_columns_left_out(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"id": 1, "query": "q", "positive": "a"},
        {"query": "q", "positive": "a", "positives": ["b"], "negative": "n", "positive_id": "7"},
        {"query": "q", "positive": None, "positives": ["b"], "negative": "", "negatives": None},
    ]
    rows = import_files([write(tmp_path / "a.jsonl", records)], PAIRS).to_pylist()
    assert [(row["positives"], row["negatives"]) for row in rows] == [
        (["a"], []),
        (["a", "b"], ["n"]),
        (["b"], []),
    ]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_text_and_label(tmp_path: Path, ending: str) -> None:
    labelled = [{"text": "apple", "label": 3}, {"text": "oak", "label": 4}]
    rows = import_files([write(tmp_path / f"a.{ending}", labelled)], TOPICS).to_pylist()
    assert [(row["query"], row["label"], row["positives"]) for row in rows] == [
        ("apple", "3", []),
        ("oak", "4", []),
    ]


def test_files_follow_one_another_and_lone_surrogates_are_mended(tmp_path: Path) -> None:
    first = tmp_path / "a.jsonl"
    first.write_text('{"query": "\\ud83d", "positive": "\\ud83d\\ude00"}\n\n')
    second = write(tmp_path / "b.csv", [{"query": "q", "positive": "x" * 200_000}])
    rows = import_files([first, second], PAIRS).to_pylist()
    assert [(row["query"], row["positives"]) for row in rows] == [("\ufffd", ["😀"]), ("q", ["x" * 200_000])]


JSONL_SLIPS = [
    ('{"query": "q", "positive": "p"}\n{"query": ', "line 2, column 11: not valid JSON"),
    ('["q", "p"]', r"line 1: expected a JSON object, got \[\"q\""),
    (
        '{"query": "q", "positive": "p"}\n\n{"positive": "p"}',
        "line 3, column 'query': expected a text, got nothing",
    ),
    ('{"query": "  ", "positive": "p"}', "line 1, column 'query': expected a text, got '  '"),
    ('{"query": 5, "positive": "p"}', "line 1, column 'query': expected a text, got 5"),
    (
        '{"query": "q", "answer": "p"}',
        "line 1, column 'positive': expected .* got nothing .*'query', 'answer'",
    ),
    ('{"query": "q", "positives": []}', "line 1, column 'positive': expected .* got nothing"),
    ('{"query": "q", "positives": ["p", null]}', "line 1, column 'positives': expected a text, got nothing"),
    ('{"query": "q", "positives": "p"}', "line 1, column 'positives': expected a list in JSON"),
    ('{"query": "q", "positives": {"a": 1}}', "line 1, column 'positives': expected a list of texts"),
    (
        '{"query": "q", "positive": "p", "negatvies": []}',
        "line 1: unknown column 'negatvies'; .* 'negatives'",
    ),
    ("\n", "has no rows"),
]
CSV_SLIPS = [
    ("query,positive\nq,p\nq\n", "line 3: expected 2 columns as in the first line, got 1"),
    ("query,positive\nq,p,r\n", "line 2: expected 2 columns as in the first line, got 3"),
    ('query,positive\nq,"p\n', "line 2: unexpected end of data; check the quotation marks"),
    ("query,positives\nq,p\n", "line 2, column 'positives': expected a list in JSON"),
    ("query,positive\n,p\n", "line 2, column 'query': expected a text, got nothing"),
    ("query,positive\n", "has no rows"),
    ("", "has no rows"),
]


@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [("jsonl", *slip) for slip in JSONL_SLIPS] + [("csv", *slip) for slip in CSV_SLIPS],
)
def test_slips_in_pairs(tmp_path: Path, ending: str, content: str, message: str) -> None:
    file = tmp_path / f"a.{ending}"
    file.write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        import_files([file], PAIRS)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a", "label": "x"}\n{"text": "b"}',
            "line 2, column 'label': expected a text, got nothing",
        ),
        ('{"text": "", "label": "x"}', "line 1, column 'text': expected a text, got nothing"),
        ('{"texts": "a", "label": "x"}', "unknown column 'texts'; the nearest known one is 'text'"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}', "all rows of topics have the label 'x'"),
    ],
)
def test_slips_in_labelled_texts(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(UsageError, match=message):
        import_files([file], TOPICS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.docx", b"q", "files of the kind '.docx' are not read; give one of .jsonl, .csv, .tsv, .parquet"),
        ("a.jsonl", None, "is missing; check the path"),
        ("a.parquet", None, "is missing; check the path"),
        ("a.csv", "query,positive\nm\xfcde,p\n".encode("latin-1"), "is not UTF-8 .* at byte 16"),
        ("a.parquet", b"not parquet", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        import_files([file], PAIRS)


def test_the_stage(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ROWS)
    facts: dict[str, Any] = {"task": "t", "instruction": "i", "query_lang": "zh-Hant", "positive_lang": "eng"}
    config = FilesStage(stage="files", files=[str(file)], format="retrieval", **facts)
    assert files_stage(config, "mine", tmp_path / "out") == {"rows": {"mine": 2}}
    rows, (source,) = read_rows(tmp_path / "out")
    assert (source.name, source.rows, source.languages, source.licence) == (
        "mine",
        2,
        ["zho_Hant"],
        "unknown",
    )
    assert set(rows["positive_lang"].to_pylist()) == {"eng"}
