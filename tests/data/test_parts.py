"""Rows part by part: nothing lost, the same files however often it is stopped, folders of parts read as one table."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from f2llm.data.parts import (
    REJECT_SCHEMA,
    REJECTS,
    Part,
    Sifted,
    digits,
    parts,
    read_part,
    sift,
    write_part,
    write_sources,
)
from f2llm.data.rows import ROWS_FILE, SCHEMA, Source, iterate_rows, read_rows, rows_table, write_rows
from f2llm.engine import Engine, using
from f2llm.errors import F2Error
from f2llm.files import read_json, sha256_folder

FACTS: dict[str, Any] = {"format": "retrieval", "task": "t", "symmetric": False, "instruction": "i"}
SOURCES = [Source(name=name, licence="CC0-1.0", **FACTS) for name in ("one", "two")]


def rows_of(source: Source, numbers: range) -> pa.Table:
    return rows_table(
        source,
        {
            "query": [f"q{n}" for n in numbers],
            "positives": [["p"] for _ in numbers],
            "query_lang": ["deu" if n % 2 else "eng" for n in numbers],
        },
    )


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """One folder with a file of several row groups, one with a folder of parts, one of which is empty."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_rows(first, rows_of(SOURCES[0], range(100)), SOURCES[:1])
    pq.write_table(rows_of(SOURCES[0], range(100)), first / ROWS_FILE, row_group_size=30)
    write_part(second, 0, rows_of(SOURCES[1], range(7)))
    write_part(second, 1, rows_of(SOURCES[1], range(0)))
    write_part(second, (2, 5), rows_of(SOURCES[1], range(7, 20)))
    tally: Any = {"two": {"eng": Counter(kept=10), "deu": Counter(kept=10)}}
    write_sources(second, SOURCES[1:], tally)
    return [first, second]


def drop_some(rows: pa.Table, most: int, stop_at: str | None = None) -> Sifted:
    """Rejects queries of `most` letters and more, and stops at one query."""
    if stop_at in rows["query"].to_pylist():
        raise F2Error("stopped")
    long = pc.greater_equal(pc.utf8_length(rows["query"]), most)
    rejected = rows.filter(long)
    reasons = pa.array(["long"] * rejected.num_rows, pa.string())
    return Sifted(
        rows.filter(pc.invert(long)), rejected.append_column("reason", reasons), {"seen": rows.num_rows}
    )


def lose_one(rows: pa.Table) -> Sifted:
    return Sifted(rows.slice(1), REJECT_SCHEMA.empty_table())


def test_parts_are_row_groups_in_order(folders: list[Path]) -> None:
    found = [part for folder in folders for part in parts(folder)]
    assert [part.rows for part in found if part.rows] == [30, 30, 30, 10, 7, 13]
    queries = [query for part in found for query in read_part(part)["query"].to_pylist()]
    assert queries == [f"q{n}" for n in range(100)] + [f"q{n}" for n in range(20)]
    assert read_part(found[1], ["hash"]).column_names == ["hash"]


def test_names_of_parts_sort_as_their_numbers() -> None:
    numbers: list[int | tuple[int, ...]] = [(0, 2), (0, 10), (2, 0), (10, 0), (10, 99_999), (99_999, 0)]
    assert [digits(n) for n in numbers] == sorted(map(digits, numbers))
    assert digits(7) == "00007"


@pytest.mark.parametrize("workers", [1, 2])
def test_kept_and_rejected_are_what_was_read(folders: list[Path], tmp_path: Path, workers: int) -> None:
    with using(Engine(workers=workers)):
        tally = sift(folders, tmp_path / "out", partial(drop_some, most=3), "test")
    kept, sources = read_rows(tmp_path / "out")
    rejected = pq.read_table(tmp_path / "out" / REJECTS)
    before = pa.concat_tables([table for folder in folders for table in iterate_rows(folder)])
    assert kept["query"].to_pylist() == [q for q in before["query"].to_pylist() if len(q) < 3]
    assert set(kept["hash"].to_pylist()) | set(rejected["hash"].to_pylist()) == set(
        before["hash"].to_pylist()
    )
    assert kept.num_rows + rejected.num_rows == before.num_rows
    assert kept.schema.equals(SCHEMA) and rejected.column_names == REJECT_SCHEMA.names
    assert tally == {
        "one": {lang: {"kept": 5, "long": 45} for lang in ("eng", "deu")},
        "two": {lang: {"kept": 5, "long": 5} for lang in ("eng", "deu")},
    }
    assert read_json(tmp_path / "out" / "tally.json") == {"rows": tally, "changed": {"seen": 120}}
    counted = {source.name: (source.rows, source.languages) for source in sources}
    assert counted == dict.fromkeys(("one", "two"), (10, ["deu", "eng"]))


@pytest.mark.parametrize("stop_at", ["q0", "q45", "q99"])
def test_stopped_and_gone_on_is_the_same(folders: list[Path], tmp_path: Path, stop_at: str) -> None:
    with using(Engine(workers=1)):
        sift(folders, tmp_path / "whole", partial(drop_some, most=3), "test")
    with using(Engine(workers=1)), pytest.raises(F2Error, match="stopped"):
        sift(folders, tmp_path / "out", partial(drop_some, most=3, stop_at=stop_at), "test")
    assert not (tmp_path / "out" / "tally.json").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("part-*")}
    with using(Engine(workers=1)):
        sift(folders, tmp_path / "out", partial(drop_some, most=3), "test")
    assert sha256_folder(tmp_path / "out") == sha256_folder(tmp_path / "whole")
    finished = len(list((tmp_path / "out" / "done").iterdir())) - 1
    again = [path for path, time in done.items() if path.stat().st_mtime_ns != time]
    assert finished and not again  # what was finished is not made again


def test_a_step_that_loses_a_row_is_refused(folders: list[Path], tmp_path: Path) -> None:
    with (
        using(Engine(workers=1)),
        pytest.raises(F2Error, match=r"30 rows went in, 29 were kept and 0 rejected"),
    ):
        sift(folders, tmp_path / "out", lose_one, "test")


def test_a_source_without_rows_left_is_left_out(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_sources(out, SOURCES, {"one": {"eng": Counter(long=4)}, "two": {"eng": Counter(kept=2, long=4)}})
    assert [(one["name"], one["rows"]) for one in read_json(out / "sources.json")] == [("two", 2)]


def test_rows_in_parts_are_checked_where_they_stand(folders: list[Path]) -> None:
    _, second = folders
    bad = rows_of(SOURCES[1], range(3))
    bad = bad.set_column(1, SCHEMA.field("positives"), pa.array([["p"], [], ["p"]]))
    pq.write_table(
        pa.concat_tables([rows_of(SOURCES[1], range(4)), bad]), second / ROWS_FILE / "part-00001.parquet"
    )
    with pytest.raises(F2Error, match=r"part-00001\.parquet, row 6 has no positive \(query 'q1'\)"):
        read_rows(second)


def test_rows_are_checked_over_row_groups(folders: list[Path]) -> None:
    first, _ = folders
    table = rows_of(SOURCES[0], range(100))
    query = table["query"].to_pylist()
    query[77] = ""
    pq.write_table(table.set_column(0, "query", pa.array(query)), first / ROWS_FILE, row_group_size=30)
    with pytest.raises(F2Error, match=r"row 78 has no query"):
        read_rows(first)


def test_a_missing_part_and_no_parts(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(F2Error, match=r"rows\.parquet is missing"):
        parts(tmp_path / "nowhere")
    with pytest.raises(F2Error, match="is missing"):
        read_part(Part(str(tmp_path / "gone.parquet"), 0, 1))
    _, second = folders
    for file in (second / ROWS_FILE).iterdir():
        file.unlink()
    with pytest.raises(F2Error, match="has no rows"):
        read_rows(second)
