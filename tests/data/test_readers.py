"""Files to chunks: whatever the kind and the compression, the same records; broken ones by number, memory bounded."""

import bz2
import csv
import gzip
import json
import lzma
import random
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm.data import readers, text_files
from f2llm.data.opening import PACKED, find_files, kind
from f2llm.data.readers import KINDS, Chunk, count_records, read_chunks
from f2llm.errors import UsageError

RECORDS = [
    {"query": f"q{i} \N{GREEK SMALL LETTER ALPHA} \N{GRINNING FACE}", "note": 'say "x", y'} for i in range(7)
]


def as_jsonl(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("\n\n".join(json.dumps(r, ensure_ascii=i % 2 == 0) for i, r in enumerate(records)))


def as_json(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text(json.dumps(records, indent=3, ensure_ascii=False))


def as_csv(file: Path, records: list[dict[str, Any]]) -> None:
    with open(file, "w", newline="", encoding="utf-8-sig") as out:
        writer = csv.DictWriter(out, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def as_tsv(file: Path, records: list[dict[str, Any]]) -> None:
    lines = [list(records[0]), *(list(record.values()) for record in records)]
    file.write_text("".join("\t".join(line) + "\r\n" for line in lines), newline="")


def as_parquet(file: Path, records: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(records), file, row_group_size=3)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    ".jsonl": as_jsonl,
    ".json": as_json,
    ".csv": as_csv,
    ".tsv": as_tsv,
    ".parquet": as_parquet,
}


def packed(file: Path, ending: str) -> Path:
    target = file.with_name(file.name + ending)
    content = file.read_bytes()
    match ending:
        case ".gz":
            target.write_bytes(gzip.compress(content[:9]) + gzip.compress(content[9:]))
        case ".bz2":
            target.write_bytes(bz2.compress(content))
        case ".xz":
            target.write_bytes(lzma.compress(content))
        case ".zst":
            parts = (content[:9], content[9:])
            target.write_bytes(b"".join(pa.compress(part, "zstd", asbytes=True) for part in parts))
        case ".zip":
            with zipfile.ZipFile(target, "w") as archive:
                archive.write(file, "folder/any name")
    return target


def records_of(chunks: list[Chunk]) -> list[dict[str, Any]]:
    return [
        {name: chunk.columns[name][i] for name in chunk.columns}
        for chunk in chunks
        for i in range(len(chunk.numbers))
    ]


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("ending", WRITERS)
def test_every_kind_has_the_same_records(tmp_path: Path, ending: str, rows: int) -> None:
    file = tmp_path / f"a{ending}"
    WRITERS[ending](file, RECORDS)
    chunks = list(read_chunks(file, rows=rows))
    assert records_of(chunks) == RECORDS
    assert all(0 < len(chunk.numbers) <= rows and not chunk.faults for chunk in chunks)
    assert [set(chunk.names) for chunk in chunks] == [{"query", "note"}] * len(chunks)
    assert count_records(file) == len(RECORDS)


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".json"])
def test_compressed_files(tmp_path: Path, ending: str, packing: str) -> None:
    file = tmp_path / f"a{ending}"
    WRITERS[ending](file, RECORDS)
    file = packed(file, packing)
    assert kind(file) == ending
    assert records_of(list(read_chunks(file))) == RECORDS
    assert count_records(file) == len(RECORDS)


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst", ".zip"])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, packing: str) -> None:
    file = tmp_path / "a.jsonl"
    rng = random.Random(1)
    file.write_text("".join(json.dumps({"query": rng.random()}) + "\n" for _ in range(3000)))
    file = packed(file, packing)
    file.write_bytes(file.read_bytes()[:-9000])
    with pytest.raises(UsageError, match="cannot be read") as error:
        list(read_chunks(file))
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_an_archive_of_two_files_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        archive.writestr("a", "{}")
        archive.writestr("b", "{}")
    with pytest.raises(UsageError, match="holds 2 files, expected one"):
        list(read_chunks(tmp_path / "a.jsonl.zip"))


@pytest.mark.parametrize("ending", WRITERS)
def test_chosen_records_are_those_of_all(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a{ending}"
    WRITERS[ending](file, RECORDS)
    places = [number for chunk in read_chunks(file) for number in chunk.numbers]
    for seed in range(5):
        only = sorted(random.Random(seed).sample(range(len(RECORDS)), 3))
        chunks = list(read_chunks(file, rows=2, only=frozenset(only)))
        assert records_of(chunks) == [RECORDS[i] for i in only]
        assert [number for chunk in chunks for number in chunk.numbers] == [places[i] for i in only]


def test_broken_lines_of_json_are_faults_and_the_others_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"query": "a"}\n\n{"query": \nm\xfcde\n[1]\n{"query": "\\ud800"}\n' + b"[" * 100_000
    )
    (chunk,) = read_chunks(file)
    assert (chunk.numbers, chunk.columns) == ([1, 6], {"query": ["a", "\ud800"]})
    assert [(fault.number, fault.reason, fault.raw[:20]) for fault in chunk.faults] == [
        (3, "broken JSON", '{"query":'),
        (4, "not UTF-8", "m\\xfcde"),
        (5, "not a JSON object", "[1]"),
        (7, "broken JSON", "[" * 20),
    ]
    assert chunk.read == count_records(file) == 6
    # The byte that the sentence names is the one that is wrong.
    place = int(chunk.faults[1].problem.partition("at byte ")[2].rstrip(")"))
    assert file.read_bytes()[place] == 0xFC


def test_broken_records_of_csv_are_faults_and_the_others_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(
        b'query,positive\n"two\nlines",p\nq\n\nq,m\xfcde\n"a"b,c\nlast,"one, two"\n"never closed,p\nq,p\n'
    )
    (chunk,) = read_chunks(file)
    assert records_of([chunk]) == [
        {"query": "two\nlines", "positive": "p"},
        {"query": "last", "positive": "one, two"},
    ]
    assert chunk.numbers == [2, 8]
    assert [(fault.number, fault.reason) for fault in chunk.faults] == [
        (4, "wrong number of fields"),
        (6, "not UTF-8"),
        (7, "broken quotation marks"),
        (9, "broken quotation marks"),
    ]
    assert count_records(file) == 6


def test_a_header_that_cannot_be_read_refuses_the_table(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"qu\xfcry,positive\nq,p\n")
    with pytest.raises(UsageError, match="line 1: is not UTF-8"):
        list(read_chunks(file))


@pytest.mark.parametrize("seed", range(6))
def test_arrays_of_json_are_those_of_the_json_library(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks so small that every token is cut somewhere."""
    rng = random.Random(seed)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1 + seed * 3)
    letters = 'ab"\\\n é中😀[]{},:'

    def text() -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randrange(9)))

    items = [
        {text(): rng.choice([text(), 12.5, None, [{"x": text()}], True])} for _ in range(rng.randrange(9))
    ]
    file = tmp_path / "a.json"
    file.write_text(
        rng.choice(["", "\n \t"]) + json.dumps(items, indent=rng.choice([None, 2]), ensure_ascii=False)
    )
    chunks = list(read_chunks(file, [], rows=4))
    assert sum(len(chunk.numbers) for chunk in chunks) == len(items)
    for name in {name for item in items for name in item}:
        read = [value for chunk in read_chunks(file, [name]) for value in chunk.columns[name]]
        assert read == [item.get(name) for item in items]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}, {"a": ]', "is not a JSON array"),
        (b'[{"a": 1} {"a": 2}]', "expected , or ], got {"),
        (b'[{"a": 1},', "Expecting value"),
        (b'"text"', r"expected \[, got \""),
        (b"", r"expected \[, got the end"),
    ],
)
def test_broken_arrays_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        list(read_chunks(tmp_path / "a.json"))
    assert "\n" not in str(error.value)


def test_items_of_an_array_that_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'[{"query": "a"}, 12, {"query": "m\xfcde"}, {"query": "\\udcfc"}]')
    (chunk,) = read_chunks(file)
    assert (chunk.numbers, chunk.columns) == ([1, 4], {"query": ["a", "\udcfc"]})
    assert [(fault.number, fault.reason) for fault in chunk.faults] == [
        (2, "not a JSON object"),
        (3, "not UTF-8"),
    ]


def test_lines_of_json_may_be_called_json(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"query": "a"}\n{"query": "b"}\n')
    assert [chunk.columns for chunk in read_chunks(file)] == [{"query": ["a", "b"]}]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_names_with_dots_go_into_structures(tmp_path: Path, ending: str) -> None:
    records: list[dict[str, Any]] = [
        {"answers": {"text": ["a", "b"]}, "hits": [{"text": "x"}, {"text": "y"}], "a.b": "c"},
        {"answers": None, "hits": [], "a.b": "d"},
    ]
    file = tmp_path / f"a{ending}"
    WRITERS[ending](file, records)
    wanted = ["answers.text", "hits.text", "a.b", "no.such"]
    assert [chunk.columns for chunk in read_chunks(file, wanted)] == [
        {
            "answers.text": [["a", "b"], None],
            "hits.text": [["x", "y"], []],
            "a.b": ["c", "d"],
            "no.such": [None] * 2,
        }
    ]


def test_types_of_parquet(tmp_path: Path) -> None:
    raw = pa.array([b"ok", b"m\xfcde", None], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    columns = {
        "broken": broken,
        "lists": pa.ListArray.from_arrays(pa.array([0, 1, 2, 3]), broken),
        "coded": pa.array(["x", "y", "x"]).dictionary_encode(),
        "large": pa.array(["x", None, "z"], pa.large_string()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (chunk,) = read_chunks(tmp_path / "a.parquet")
    assert chunk.columns == {
        "broken": [b"ok", b"m\xfcde", None],
        "lists": [[b"ok"], [b"m\xfcde"], [None]],
        "coded": ["x", "y", "x"],
        "large": ["x", None, "z"],
    }


@pytest.mark.parametrize("ending", WRITERS)
def test_chunks_of_long_texts_are_short(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BYTES", 10_000)
    records = [{"query": f"{i} " + "x" * 998} for i in range(100)]
    file = tmp_path / f"a{ending}"
    WRITERS[ending](file, records)
    chunks = list(read_chunks(file, ["query"]))
    assert records_of(chunks) == records
    assert max(len(chunk.numbers) for chunk in chunks) <= 11


def test_repeated_texts_that_parquet_holds_once_are_cut_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BYTES", 10_000)
    pq.write_table(pa.table({"query": ["x" * 1000] * 500}), tmp_path / "a.parquet")
    chunks = list(read_chunks(tmp_path / "a.parquet"))
    assert sum(len(chunk.numbers) for chunk in chunks) == 500
    assert max(len(chunk.numbers) for chunk in chunks) <= 10


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / name.removesuffix(".gz")
    WRITERS[file.suffix](file, [{"query": f"{i} " + "x" * 2000} for i in range(16_000)])  # 32 MB
    if name.endswith(".gz"):
        file = packed(file, ".gz")
    tracemalloc.start()
    try:
        assert sum(chunk.read for chunk in read_chunks(file, rows=200)) == 16_000
        assert tracemalloc.get_traced_memory()[1] < 1e7
    finally:
        tracemalloc.stop()


def test_memory_of_arrow_does_not_grow_with_the_file(tmp_path: Path) -> None:
    rng = random.Random(0)
    table = pa.table(
        {"query": [rng.randbytes(500).hex() for _ in range(32_000)]}
    )  # 32 MB that do not compress
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    del table
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read_chunks(tmp_path / "a.parquet", rows=1000)]
    assert len(held) >= 32 and max(held) < 6e6


# --- Which files are meant


def test_files_are_found(tmp_path: Path) -> None:
    names = [
        "b/2.csv",
        "b/1.csv.gz",
        "b/deep/3.parquet",
        "b/.hidden/4.csv",
        "b/notes.md",
        "a.jsonl",
        "c.JSONL",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(*patterns: str) -> list[str]:
        files = find_files(patterns, tmp_path, KINDS)
        return [str(file.relative_to(tmp_path)) for file in files]

    assert found("b") == ["b/1.csv.gz", "b/2.csv", "b/deep/3.parquet"]
    assert found("a.jsonl", "b/*.csv", "b") == ["a.jsonl", "b/2.csv", "b/1.csv.gz", "b/deep/3.parquet"]
    assert found("**/*.csv*") == ["b/1.csv.gz", "b/2.csv"]
    assert found("b/notes.md") == ["b/notes.md"]  # named, so it is read, or refused by name
    assert found(str(tmp_path / "a.jsonl")) == ["a.jsonl"]
    for missing in ("x.jsonl", "*.parquet", "b/.hidden/deep"):
        with pytest.raises(UsageError, match="means no file"):
            found(missing)
