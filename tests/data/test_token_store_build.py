"""Building a token store: against a dict of strings and plain tokenisation, cut short anywhere, added to, refused."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, processors

from f2llm.data import token_store_numbers
from f2llm.data.parts import parts, write_part
from f2llm.data.rows import SCHEMA, SOURCES_FILE, Source, read_rows, read_sources, rows_table, write_rows
from f2llm.data.token_store import open_store
from f2llm.data.token_store_build import build, tokenise_stage
from f2llm.data.token_store_format import NO_LABEL
from f2llm.data.token_store_numbers import HashFile, number_texts, text_hashes
from f2llm.engine import Engine, using
from f2llm.errors import F2Error
from f2llm.files import write_json
from f2llm.model.prompts import query_prefix
from f2llm.recipe_corpus import TokeniseStage
from f2llm.text import clean

Row = dict[str, Any]

ODD = [
    "",
    " ",
    "  two",
    "\n",
    "1 one",
    ".",
    "e\u0301",
    "\u0301a",
    "👩‍👩‍👧",
    "水山",
    "a",
    "A",
    "Ⅷ",
    "\u200fمرحبا",
    "x\ny",
]


@pytest.fixture(autouse=True)
def in_this_process() -> Iterator[None]:
    """Starting workers would take longer than the work; the test that compares both says otherwise."""
    with using(Engine(workers=1)):
        yield


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def folder_of_parts(folder: Path, sources: list[Source], tables: list[pa.Table]) -> Path:
    for number, table in enumerate(tables):
        write_part(folder, number, table)
    write_json(folder / SOURCES_FILE, [source.model_dump() for source in sources])
    return folder


def random_rows(folder: Path, seed: int, names: tuple[str, ...], counts: tuple[int, ...]) -> Path:
    """Parts of random rows of sources of all formats, whose texts come from a small pool and so stand in many rows."""
    rng = random.Random(seed)
    formats = ("retrieval", "clustering", "classification", "retrieval")
    sources = [
        Source(
            name=name,
            format=formats[number % 4],
            task="test",
            symmetric=number % 4 in (1, 2, 3),
            instruction="" if number == 1 else f"Do {number}",
            licence="CC0-1.0",
        )
        for number, name in enumerate(names)
    ]

    def text() -> str:
        return rng.choice(ODD) if rng.random() < 0.2 else f"text {rng.randrange(40)}"

    def table(source: Source, count: int) -> pa.Table:
        retrieval = source.format == "retrieval"
        columns: dict[str, list[Any]] = {
            "query": [text() or "q" for _ in range(count)],
            "query_lang": [rng.choice(("eng", "rus", "zho_Hant")) for _ in range(count)],
            "label": [None if retrieval and rng.random() < 0.7 else rng.choice("xyz") for _ in range(count)],
        }
        if retrieval:
            columns["positives"] = [[text() for _ in range(rng.randrange(1, 4))] for _ in range(count)]
            columns["negatives"] = [[text() for _ in range(rng.randrange(4))] for _ in range(count)]
            columns["positive_lang"] = [rng.choice(("fra", "eng")) for _ in range(count)]
        return rows_table(source, columns)

    tables = [
        pa.concat_tables([table(source, count) for source in sources]) if count else SCHEMA.empty_table()
        for count in counts
    ]
    return folder_of_parts(folder, sources, tables)


def prefixes(*folders: Path) -> dict[str, str]:
    return {
        source.name: query_prefix(source.instruction)
        for folder in folders
        for source in read_sources(folder)
        if source.instruction
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def naive_rows(folders: list[Path]) -> Iterator[Row]:
    """What a store must say of each row, with texts as strings."""
    for folder in folders:
        table, sources = read_rows(folder)
        by_name = {source.name: source for source in sources}
        for row in table.to_pylist():
            source = by_name[row["source"]]
            prefix = query_prefix(source.instruction) if source.instruction else ""
            before_documents = prefix if source.symmetric else ""
            before_label = "" if source.format == "retrieval" else before_documents
            label = row["label"]
            yield {
                **{name: row[name] for name in ("source", "query_lang", "positive_lang", "hash")},
                "query": clean(row["query"]),
                "query_asked": clean(prefix + row["query"]),
                "label": None if label is None else clean(label),
                "label_asked": None if label is None else clean(before_label + label),
                **{name: [clean(text) for text in row[name]] for name in ("positives", "negatives")},
                **{
                    f"{name}_asked": [clean(before_documents + text) for text in row[name]]
                    for name in ("positives", "negatives")
                },
            }


def texts_of(row: Row) -> list[str]:
    columns = ("query", "query_asked", "label", "label_asked")
    lists = ("positives", "positives_asked", "negatives", "negatives_asked")
    return [
        *(row[name] for name in columns if row[name] is not None),
        *chain.from_iterable(row[name] for name in lists),
    ]


def test_a_store_says_of_every_row_what_plain_tokenisation_says(
    tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path
) -> None:
    folders = [
        random_rows(tmp_path / "a", 1, ("a", "b", "c", "d"), (0, 9, 0, 5)),
        random_rows(tmp_path / "b", 2, ("a",), (7,)),
    ]
    build(folders, tokenizer_file, tmp_path / "store", prefixes(*folders))
    store = open_store(tmp_path / "store")
    ids = {n: tokens.tolist() for n, tokens in enumerate(store.tokens(range(len(store))))}
    rows = store.rows(range(store.row_count))
    expected = list(naive_rows(folders))
    assert store.row_count == len(expected)

    def stored(number: int) -> list[int] | None:
        return None if number == NO_LABEL else ids[number]

    for place, row in enumerate(expected):
        for name in ("query", "query_asked", "label", "label_asked"):
            plain = None if row[name] is None else tokenizer.encode(row[name]).ids
            assert stored(getattr(rows, name)[place]) == plain, (name, row)
        for name in ("positives", "positives_asked", "negatives", "negatives_asked"):
            found = [ids[number] for number in getattr(rows, name)[place].tolist()]
            assert found == [tokenizer.encode(text).ids for text in row[name]], (name, row)
        assert store.sources[rows.source[place]].name == row["source"]
        assert store.languages[rows.query_lang[place]] == row["query_lang"]
        assert store.languages[rows.positive_lang[place]] == row["positive_lang"]
        assert f"{rows.hash[place]:016x}" == row["hash"]
    assert (rows.query_key == [text_hashes([row["query"]])[0, 0] for row in expected]).all()

    distinct = dict.fromkeys(chain.from_iterable(map(texts_of, expected)))
    assert len(store) == len(distinct), "each distinct text once"


def test_numbers_follow_the_first_appearance(
    tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path
) -> None:
    source = Source(
        name="s", format="retrieval", task="t", symmetric=False, instruction="", licence="CC0-1.0"
    )
    tables = [
        rows_table(source, {"query": queries, "query_lang": ["eng"] * 2, "positives": positives})
        for queries, positives in [(["b", "a"], [["a"], ["c", "b"]]), (["c", "e"], [["d", "a"], ["f"]])]
    ]
    folder = folder_of_parts(tmp_path / "rows", [source], tables)
    build([folder], tokenizer_file, tmp_path / "store", {})
    store = open_store(tmp_path / "store")
    in_order = [tokenizer.encode(text).ids for text in "bacdef"]
    assert [tokens.tolist() for tokens in store.tokens(range(6))] == in_order
    assert store.rows([2, 0]).query.tolist() == [2, 0]
    assert [numbers.tolist() for numbers in store.rows([1, 2]).positives] == [[2, 0], [3, 1]]


def test_texts_that_differ_in_composition_alone_are_one(tokenizer_file: Path, tmp_path: Path) -> None:
    source = Source(
        name="s", format="retrieval", task="t", symmetric=False, instruction="", licence="CC0-1.0"
    )
    columns: dict[str, list[Any]] = {
        "query": ["e\u0301", "\u00e9"],
        "query_lang": ["fra"] * 2,
        "positives": [["x"], ["x"]],
    }
    write_rows(tmp_path / "rows", rows_table(source, columns), [source])
    build([tmp_path / "rows"], tokenizer_file, tmp_path / "store", {})
    store = open_store(tmp_path / "store")
    assert len(store) == 2
    assert store.rows([0, 1]).query.tolist() == [0, 0]


def test_labels_and_their_texts(tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path) -> None:
    folder = random_rows(tmp_path / "rows", 3, ("a", "b", "c", "d"), (20, 20))
    build([folder], tokenizer_file, tmp_path / "store", prefixes(folder))
    store = open_store(tmp_path / "store")
    assert {name: list(labels) for name, labels in store.labels.items()} == {
        "b": ["x", "y", "z"],
        "c": ["x", "y", "z"],
    }
    for labels in store.labels.values():
        found = [tokens.tolist() for tokens in store.tokens(list(labels.values()))]
        assert found == [tokenizer.encode(label).ids for label in labels]


def test_what_the_stage_reports_adds_up(tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path) -> None:
    folders = [random_rows(tmp_path / "a", 4, ("a", "b", "c", "d"), (6, 6))]
    config = TokeniseStage(stage="tokenise", data=["rows"], tokenizer="t")
    facts = tokenise_stage(
        config, folders=folders, tokenizer=tokenizer_file, out=tmp_path / "store", prompt=query_prefix
    )
    tally = [counts for languages in facts["sources"].values() for counts in languages.values()]
    distinct = set(chain.from_iterable(map(texts_of, naive_rows(folders))))
    assert facts["texts"] == len(distinct) == sum(counts["distinct"] for counts in tally)
    tokens = sum(len(tokenizer.encode(text).ids) for text in distinct)
    assert facts["tokens"] == tokens == sum(counts["tokens"] for counts in tally)
    named = sum(
        1 + (row["label"] is not None) + len(row["positives"]) + len(row["negatives"])
        for row in naive_rows(folders)
        if row["source"] == "b"  # the one without an instruction: nothing is named twice over
    )
    # Where a part has prompts, texts are named behind theirs too, be it empty.
    assert sum(counts["named"] for counts in facts["sources"]["b"].values()) == 2 * named
    assert facts["rows"] == sum(part.rows for part in parts(folders[0]))


def test_without_instructions_texts_stand_bare(
    tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path
) -> None:
    folder = random_rows(tmp_path / "rows", 4, ("a", "d"), (6,))
    config = TokeniseStage(stage="tokenise", data=["rows"], tokenizer="t", instructions=False)
    tokenise_stage(
        config, folders=[folder], tokenizer=tokenizer_file, out=tmp_path / "store", prompt=query_prefix
    )
    store = open_store(tmp_path / "store")
    rows = store.rows(range(store.row_count))
    plain = [tokenizer.encode(row["query"]).ids for row in naive_rows([folder])]
    assert [tokens.tolist() for tokens in store.tokens(rows.query_asked)] == plain


@pytest.mark.parametrize("range_texts", [1, 7, 1 << 20])
def test_numbering_equals_a_dict(range_texts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store_numbers, "RANGE_TEXTS", range_texts)
    rng = random.Random(0)
    corpus = [[f"text {rng.randrange(50)}" for _ in range(count)] for count in (20, 0, 1, 30)]
    files = []
    for part, texts in enumerate(corpus):
        path = tmp_path / f"{part}.bin"
        HashFile.write(path, text_hashes(texts))
        files.append(HashFile(path, len(texts)))
    numbers, starts = number_texts(files, tmp_path / "work")
    expected: dict[str, int] = {}
    for text in chain.from_iterable(corpus):
        expected.setdefault(text, len(expected))
    assert numbers.tolist() == [expected[text] for text in chain.from_iterable(corpus)]
    assert starts.tolist() == [0, 20, 20, 21, 51]


def test_hashes_at_the_edges_of_ranges_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store_numbers, "RANGE_TEXTS", 2)
    edges = [0, 1, 2**63 - 1, 2**63, 2**64 - 1]
    hashes = np.asarray([(high, low) for high in edges for low in edges], dtype=np.uint64)
    files = []
    for part in range(2):
        HashFile.write(tmp_path / f"{part}.bin", hashes[:: 1 - 2 * part])
        files.append(HashFile(tmp_path / f"{part}.bin", len(hashes)))
    numbers, _ = number_texts(files, tmp_path / "work")
    assert numbers.tolist() == [*range(25), *reversed(range(25))]


def test_worker_processes_write_the_same(tokenizer_file: Path, tmp_path: Path) -> None:
    folder = random_rows(tmp_path / "rows", 5, ("a", "b", "c", "d"), (9, 9, 9))
    for workers in (1, 2):
        with using(Engine(workers=workers)):
            build([folder], tokenizer_file, tmp_path / str(workers), prefixes(folder))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_killed_before_or_after_any_file_the_store_comes_out_the_same(
    tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_store_numbers, "RANGE_TEXTS", 40)
    folder = random_rows(tmp_path / "rows", 6, ("a", "b", "c", "d"), (6, 6))
    real, replaced = os.replace, 0

    def dying(at: int, late: bool) -> Callable[[Any, Any], None]:
        def replace(source: Any, target: Any) -> None:
            nonlocal replaced
            replaced += 1
            if replaced == at and not late:
                raise KeyboardInterrupt
            real(source, target)
            if replaced == at and late:
                raise KeyboardInterrupt

        return replace

    def run(out: Path) -> None:
        build([folder], tokenizer_file, out, prefixes(folder))

    monkeypatch.setattr(os, "replace", dying(-1, late=False))
    run(tmp_path / "whole")
    files, expected = replaced, contents(tmp_path / "whole")
    assert files > 10
    for at in range(1, files + 1):
        for late in (False, True):
            replaced, out = 0, tmp_path / "cut"
            monkeypatch.setattr(os, "replace", dying(at, late))
            with pytest.raises(KeyboardInterrupt):
                run(out)
            assert (late and at == files) or not (out / "store.json").exists()
            monkeypatch.setattr(os, "replace", real)
            run(out)
            assert contents(out) == expected, f"killed at file {at}, late={late}"
            shutil.rmtree(out)


def test_what_a_killed_process_was_writing_is_removed(tokenizer_file: Path, tmp_path: Path) -> None:
    folder = random_rows(tmp_path / "rows", 6, ("a",), (6,))
    build([folder], tokenizer_file, tmp_path / "whole", prefixes(folder))
    (tmp_path / "cut" / "done").mkdir(parents=True)
    for name in (".part-00000.bin.k3j.tmp", "done/.00000.json.x.tmp"):
        (tmp_path / "cut" / name).write_bytes(b"half")
    build([folder], tokenizer_file, tmp_path / "cut", prefixes(folder))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_added_folders_leave_the_others_alone(tokenizer_file: Path, tmp_path: Path) -> None:
    first = random_rows(tmp_path / "a", 7, ("a", "b"), (6, 6))
    second = random_rows(tmp_path / "b", 8, ("c", "b", "e"), (6,))
    # The source of both folders is the same in both.
    write_json(second / SOURCES_FILE, _with_source(read_sources(second), read_sources(first)[1]))
    both = prefixes(first, second)
    build([first, second], tokenizer_file, tmp_path / "at once", both)
    out = tmp_path / "added to"
    build([first], tokenizer_file, out, both)
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*.bin")}
    texts = len(open_store(out))
    build([first, second], tokenizer_file, out, both)
    assert contents(out) == contents(tmp_path / "at once")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(open_store(out)) > texts


def _with_source(sources: list[Source], other: Source) -> list[dict[str, Any]]:
    kept = [source for source in sources if source.name != other.name]
    return [source.model_dump() for source in (*kept, other)]


def test_a_store_of_other_things_is_refused(
    tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path
) -> None:
    first, second = (random_rows(tmp_path / name, seed, (name,), (6,)) for name, seed in (("a", 1), ("b", 2)))
    out, both = tmp_path / "store", prefixes(first, second)
    build([first, second], tokenizer_file, out, both)
    before = contents(out)
    with pytest.raises(F2Error, match="part 0 of the rows that the token store .* was built from"):
        build([second, first], tokenizer_file, out, both)
    with pytest.raises(F2Error, match="more rows than the 1 parts given"):
        build([first], tokenizer_file, out, both)
    with pytest.raises(F2Error, match="part 0 of the rows"):
        build([first, second], tokenizer_file, out, {**both, "a": "another prompt: "})
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens(["new"])
    other.save(str(tmp_path / "other.json"))
    with pytest.raises(F2Error, match="another tokenizer"):
        build([first, second], tmp_path / "other.json", out, both)
    assert contents(out) == before


def test_what_cannot_be_tokenised_is_refused(
    tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path
) -> None:
    folder = random_rows(tmp_path / "rows", 1, ("a",), (6,))
    bare = Tokenizer.from_str(tokenizer.to_str())
    bare.post_processor = processors.ByteLevel()
    bare.save(str(tmp_path / "bare.json"))
    with pytest.raises(F2Error, match="appends no EOS"):
        build([folder], tmp_path / "bare.json", tmp_path / "1", {})
    with pytest.raises(F2Error, match="is not a tokenizer file"):
        build([folder], folder / SOURCES_FILE, tmp_path / "2", {})
    empty = folder_of_parts(tmp_path / "empty", read_sources(folder), [SCHEMA.empty_table()])
    with pytest.raises(F2Error, match="no rows to tokenise"):
        build([empty], tokenizer_file, tmp_path / "3", {})
    changed = read_sources(folder)[0].model_copy(update={"symmetric": True})
    other = folder_of_parts(tmp_path / "other", [changed], [SCHEMA.empty_table()])
    with pytest.raises(F2Error, match="another source 'a'"):
        build([folder, other], tokenizer_file, tmp_path / "4", {})
    table = pq.read_table(folder / "rows.parquet")
    for column, value, message in (
        ("source", "nobody", "of the source nobody"),
        ("hash", "zz" * 8, "hexadecimal"),
    ):
        values = pa.array([value] * len(table), pa.string())
        wrong = table.set_column(table.column_names.index(column), SCHEMA.field(column), values)
        with pytest.raises(F2Error, match=message):
            build(
                [folder_of_parts(tmp_path / column, read_sources(folder), [wrong])],
                tokenizer_file,
                tmp_path / f"store {column}",
                {},
            )
