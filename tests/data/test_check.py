"""`check_file`: every bad record with place, column and fix, counted; nothing wrong that is right."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm.data.check import FileReport, check_file
from f2llm.errors import UsageError


def write(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def check(file: Path, **options: Any) -> FileReport:
    (report,) = check_file(file, **options)
    return report


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"query": "q", "positive": "p", "negatives": ["n"], "id": 1}, "retrieval"),
        ({"query": "q", "positives": ["p"], "negative": "n", "lang": "de"}, "retrieval"),
        ({"text": "t", "label": 1}, "clustering"),
        ({"id": "a", "lang": "de", "text": "t"}, "parallel"),
        ({"sentence1": "a", "sentence2": "b", "score": 1.5}, "sts"),
    ],
)
def test_good_files_are_told_by_their_columns(tmp_path: Path, row: dict[str, Any], layout: str) -> None:
    report = check(write(tmp_path / "a.jsonl", [row] * 3))
    assert report.ok and (report.layout, report.read, report.good, report.bad) == (layout, 3, 3, 0)
    assert list(report.lines()) == [f"{tmp_path / 'a.jsonl'} ({layout}): 3 read, 3 good, 0 bad"]


def test_bad_records_are_counted_and_the_first_are_said(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    lines = ["query,positive", "q,p", ",p", "q", "q,p", *[",p"] * 20, "q,p"]
    file.write_text("\n".join(lines) + "\n")
    rejects = tmp_path / "rejects.jsonl"
    report = check(file, most=3, rejects=rejects)
    assert not report.ok
    assert (report.read, report.good, report.bad) == (25, 3, 22)
    assert report.reasons == {"query: no text": 21, "wrong number of fields": 1}
    assert report.first == [
        f"{file}, line 3, column 'query': expected a text, got nothing; mend the row or leave it out.",
        f"{file}, line 4: expected 2 columns as in the first line, got 1; check the separators and quotation marks.",
        f"{file}, line 6, column 'query': expected a text, got nothing; mend the row or leave it out.",
    ]
    assert list(report.lines())[-1] == "  bad by reason: query: no text 21, wrong number of fields 1"
    written = [json.loads(line) for line in rejects.read_text().splitlines()]
    bad_lines = [number for number, line in enumerate(lines, start=1) if line in (",p", "q")]
    assert [one["line"] for one in written] == bad_lines
    assert written[0]["reason"] == "query: no text" and json.loads(written[0]["raw"]) == {
        "query": "",
        "positive": "p",
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_misspelt_columns_name_the_nearest(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    row = {"query": "q", "positive": "p", "negatves": "n"}
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row] * 3), file)
    elif kind == "csv":
        file.write_text("query,positive,negatves\nq,p,n\nq,p,n\nq,p,n\n")
    else:
        write(file, [row] * 3)
    report = check(file)
    assert not report.ok and (report.good, report.bad) == (3, 0)
    assert len(report.first) == 1
    assert "unknown column 'negatves'; the nearest known one is 'negatives': rename it." in report.first[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"qury,positive\nq,p\n", "'qury' may mean 'query'"),
        ("a.csv", b"query,answer\nq,p\n", "has no column 'positive' or 'positives', only 'query', 'answer'"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"query,positive\n", "has no rows"),
        ("a.jsonl", b"{}\n", r"has the columns \(none\), expected 'query'"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.docx", b"", "files of the kind '.docx' are not read"),
        ("a.jsonl", b'{"query": "q", "positive": 1}\n', "line 1, column 'positive': expected a text, got 1"),
    ],
)
def test_what_is_wrong_with_a_whole_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    report = check(tmp_path / name)
    assert not report.ok
    assert re.search(message, report.first[0])
    assert all("\n" not in sentence for sentence in report.first)


def test_a_record_says_how_a_file_reads(tmp_path: Path) -> None:
    keys = {
        "name": "n",
        "title": "T",
        "task": "t",
        "format": "retrieval",
        "symmetric": True,
        "instruction": "i",
    }
    record = tmp_path / "n.yaml"
    columns = {"sentence1": "a", "sentence2": "b", "score": "s"}
    record.write_text(json.dumps({**keys, "layout": "sts", "at_least": 4, "columns": columns}))
    rows = [{"a": "x", "b": "y", "s": score} for score in (5, 4, 3, "?")]
    report = check(write(tmp_path / "a.jsonl", rows), record=record)
    assert (report.read, report.good, report.below, report.bad) == (4, 2, 1, 1)  # a low score is no mistake
    with pytest.raises(UsageError, match="a record and a format were both given"):
        check_file(tmp_path / "a.jsonl", record=record, layout="sts")


def test_all_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/b.jsonl", [{"query": "q", "positive": "p"}])
    write(tmp_path / "data/a.jsonl", [{"text": "t"}])
    reports = check_file(tmp_path / "data", layout="clustering")
    assert [(report.file.name, report.ok, report.bad) for report in reports] == [
        ("a.jsonl", False, 1),
        ("b.jsonl", False, 1),
    ]
    with pytest.raises(UsageError, match="means no file"):
        check_file(tmp_path / "nowhere")


def test_a_check_of_the_development_data(shared: Path) -> None:
    reports = check_file(shared / "data" / "retrieval" / "jnli_valid.parquet")
    assert [(report.ok, report.read, report.good) for report in reports] == [(True, 327, 327)]
