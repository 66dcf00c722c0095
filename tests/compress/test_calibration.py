"""Calibration texts: the same for the same corpus, whatever its order, and few of a corpus that is large."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm.compress import calibration
from f2llm.compress.calibration import Row, draw_rows
from f2llm.data.rows import ROWS_FILE, Source, read_rows, rows_table, write_rows
from f2llm.errors import F2Error, UsageError
from f2llm.rng import generator


def a_folder(folder: Path, queries: Sequence[str], answers: Sequence[list[str]] | None = None) -> Path:
    """Rows: retrieval with `answers`, else clustering."""
    form: Any = "retrieval" if answers else "clustering"
    source = Source(name="s", format=form, task="t", symmetric=False, instruction="", licence="unknown")
    columns: dict[str, list[Any]] = {"query": list(queries), "query_lang": ["und"] * len(queries)}
    columns |= {"positives": list(answers)} if answers else {"label": [query[0] for query in queries]}
    write_rows(folder, rows_table(source, columns), [source])
    return folder


def texts_of(rows: Sequence[Row]) -> list[str]:
    return [row.query for row in rows]


def test_the_draw_is_a_permutation_of_the_sorted_distinct_queries(rows_folder: Path) -> None:
    distinct = sorted(set(read_rows(rows_folder)[0]["query"].to_pylist()))
    for seed in (0, 1):
        expected = [distinct[i] for i in generator(seed, "calibration").permutation(len(distinct))]
        assert texts_of(draw_rows([rows_folder], 10_000, seed)) == expected
        assert texts_of(draw_rows([rows_folder], 7, seed)) == expected[:7]


def test_neither_order_nor_repetition_of_rows_matters(tmp_path: Path) -> None:
    one = a_folder(tmp_path / "1", ["a", "b", "é", "c", "德", "b", "𐍈", "\uffff"])
    other = a_folder(tmp_path / "2", ["\uffff", "𐍈", "德", "a", "a", "c", "b", "é"])
    assert texts_of(draw_rows([one], 5, 0)) == texts_of(draw_rows([other], 5, 0))
    assert sorted(texts_of(draw_rows([one, other], 99, 0))) == sorted("abc德é𐍈\uffff")


def test_answered_rows_come_with_what_is_right_for_them(rows_folder: Path) -> None:
    table = read_rows(rows_folder)[0].to_pylist()
    known = [(row["query"], row["positives"], row["label"]) for row in table if row["positives"]]
    drawn = draw_rows([rows_folder], 10_000, 0, answered=True)
    assert len(drawn) == len({query for query, _, _ in known})
    assert all((row.query, row.positives, row.label) in known for row in drawn)


def test_files_of_texts_and_of_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("lion\nnyoka\n")
    (tmp_path / "b.jsonl").write_text('{"text": "simba"}\n')
    (tmp_path / "c.csv").write_text("query,positive\nchui,leopard\n")
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.csv")]
    assert sorted(texts_of(draw_rows(files, 9, 0))) == ["chui", "lion", "nyoka", "simba"]
    assert draw_rows(files[2:], 9, 0, answered=True) == [Row("chui", ["leopard"], None)]
    with pytest.raises(UsageError, match=r"a\.txt.*'query'"):
        draw_rows(files[:1], 9, 0, answered=True)


def test_of_a_large_corpus_some_row_groups_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_folder(tmp_path, [f"text {i}" for i in range(1000)])
    table = pq.read_table(folder / ROWS_FILE)
    pq.write_table(table, folder / ROWS_FILE, row_group_size=10)
    monkeypatch.setattr(calibration, "ENOUGH", table.slice(0, 50).select(["query"]).nbytes)
    groups = set()
    for seed in range(3):
        drawn = texts_of(draw_rows([folder], 1000, seed))
        assert 40 <= len(drawn) <= 80
        mine = {int(text.split()[1]) // 10 for text in drawn}
        assert len(drawn) == 10 * len(mine), "a group that was read is read whole"
        groups |= mine
    assert len(groups) > 10 and max(groups) > 50, "other groups for other seeds, from all over the file"


def test_what_has_no_texts_is_named(tmp_path: Path) -> None:
    with pytest.raises(F2Error, match=r"rows\.parquet is missing"):
        draw_rows([tmp_path], 1, 0)
    with pytest.raises(UsageError, match=r"absent\.txt"):
        draw_rows([tmp_path / "absent.txt"], 1, 0)
    labelled = a_folder(tmp_path / "labelled", ["a", "b"])
    with pytest.raises(UsageError, match="labelled has no row with a positive"):
        draw_rows([labelled], 1, 0, answered=True)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match=r"empty\.txt has no text"):
        draw_rows([tmp_path / "empty.txt"], 1, 0)
    other = tmp_path / "other"
    other.mkdir()
    pq.write_table(pa.table({"text": ["a"]}), other / ROWS_FILE)
    with pytest.raises(F2Error, match="has no columns query"):
        draw_rows([other], 1, 0)
