"""Sources to canonical rows: every layout against naive counting, nothing lost in silence, the same after any kill."""

import csv
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from f2llm.data import import_item, importing
from f2llm.data.importing import sources_stage
from f2llm.data.parts import parts
from f2llm.data.records import read_records
from f2llm.data.rows import read_rows, row_hash
from f2llm.engine import Engine, using
from f2llm.errors import UsageError
from f2llm.files import read_json, sha256_folder
from f2llm.recipe_corpus import SourcesStage

CORPUS = Path(__file__).parents[2] / "recipes" / "corpus-demo"
ONE = Engine(workers=1)
HEAD = {"title": "T", "task": "t", "symmetric": False, "instruction": "i"}


def write(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def record(folder: Path, name: str = "mine", **keys: Any) -> Path:
    """A record in a file of its own; JSON is YAML."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({**HEAD, "name": name, "format": "retrieval", **keys}))
    return path


def run(
    *records: Path, out: Path, seed: int = 1, engine: Engine = ONE, **settings: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Facts of the stage, its rows and its rejects."""
    config = SourcesStage(stage="sources", records=list(map(str, records)), **settings)
    with using(engine):
        facts = sources_stage(config, out, seed)
    rejects = out / "rejects.parquet"
    rows = read_rows(out)[0].to_pylist()
    return facts, rows, pq.read_table(rejects).to_pylist() if rejects.exists() else []


# --- The development data, counted by pyarrow alone


def expected(path: Path, layout: str) -> tuple[int, Counter[str]]:
    """Records of a file, and the rows that come of them by language of the query."""
    table = pq.read_table(path)
    if layout == "parallel":
        english = pc.match_substring_regex(table["lang"], "^eng(_|$)")
        ours = table.filter(english).select(["id", "lang"]).rename_columns(["id", "english"])
        both = table.filter(pc.invert(english)).join(ours, "id", join_type="inner")
        langs = both["lang"].to_pylist() + both["english"].to_pylist()
    elif layout == "sts":
        langs = table.filter(pc.greater_equal(table["score"], 4))["lang"].to_pylist()
    else:
        langs = table["query_lang" if layout == "retrieval" else "lang"].to_pylist()
    return table.num_rows, Counter("grn" if lang == "gn" else lang for lang in langs)


def check_against_pyarrow(shared: Path, out: Path, names: list[str] | None, engine: Engine) -> None:
    config = SourcesStage(stage="sources", records=[str(CORPUS)], root=str(shared / "data"), sources=names)
    with using(engine):
        facts = sources_stage(config, out, 1)
    placed = [one for file in sorted(CORPUS.iterdir()) for one in read_records(file)]
    chosen = [one.record for one in placed if names is None or one.record.name in names]
    assert len(chosen) == len(names or range(43))
    rows = Counter[tuple[str, str]]()
    for part in parts(out):
        table = pq.ParquetFile(part.path).read_row_group(part.row_group, columns=["source", "query_lang"])
        rows.update(zip(table["source"].to_pylist(), table["query_lang"].to_pylist(), strict=True))
    rejects = Counter[str]()
    for file in (out / "rejects.parquet").glob("*") if (out / "rejects.parquet").exists() else ():
        rejects.update(pq.read_table(file)["source"].to_pylist())
    for source in chosen:
        read, counted = expected(shared / "data" / source.files[0], source.layout or source.format)
        assert {lang: n for (name, lang), n in rows.items() if name == source.name} == counted, source.name
        found = facts["sources"][source.name]
        assert found["read"] == read == found["kept"] + sum(found["rejected"].values())
        assert sum(found["rejected"].values()) == rejects[source.name]
        assert not set(found["rejected"]) - import_item.BY_CHOICE, "the data are clean"
        tally = read_json(out / "tally.json")["rows"][source.name]
        assert {lang: fates["kept"] for lang, fates in tally.items() if "kept" in fates} == counted


def test_some_sources_of_the_development_data(shared: Path, tmp_path: Path) -> None:
    names = ["arcd", "americasnli", "banking77", "fewclue-eprstmt", "nusax-parallel", "jsts"]
    check_against_pyarrow(shared, tmp_path, names, ONE)
    rows, sources = read_rows(tmp_path)
    assert {source.name for source in sources} == set(names)
    original = pq.read_table(shared / "data/retrieval/arcd.parquet").to_pylist()
    ours = rows.filter(pc.equal(rows["source"], "arcd")).to_pylist()
    assert [(row["query"], row["positives"]) for row in ours] == [
        (r["query"], [r["positive"]]) for r in original
    ]
    assert {(row["licence"], row["task"]) for row in ours} == {("MIT", "question answering")}


@pytest.mark.slow
def test_all_of_the_development_data(shared: Path, tmp_path: Path) -> None:
    check_against_pyarrow(shared, tmp_path, None, Engine(workers=2))
    items = [read_json(file) for file in (tmp_path / "done").glob("[0-9]" * 5 + ".json")]
    assert sum(item["read"] for item in items) == 1_604_285  # as the data's own README counts


# --- Layouts


def test_retrieval(tmp_path: Path) -> None:
    write(
        tmp_path / "a.jsonl",
        [
            {"q": "e\u0301", "a": {"text": ["p", "r"]}, "wrong": ["n"], "l": "de"},
            {"q": "x", "a": {"text": "p"}, "wrong": None, "l": None},
        ],
    )
    columns = {"query": "q", "positive": "a.text", "negatives": "wrong", "query_lang": "l"}
    path = record(
        tmp_path, files=["a.jsonl"], columns=columns, languages=["fra"], positive_lang="eng", licence="MIT"
    )
    facts, rows, _ = run(path, out=tmp_path / "out")
    common = {"label": None, "source": "mine", "positive_lang": "eng", "licence": "MIT", "task": "t"}
    assert rows == [
        {
            "query": "\u00e9",
            "positives": ["p", "r"],
            "negatives": ["n"],
            "query_lang": "deu",
            "hash": row_hash("\u00e9", ["p", "r"], ["n"], None, "mine"),
            **common,
        },
        {
            "query": "x",
            "positives": ["p"],
            "negatives": [],
            "query_lang": "fra",
            "hash": row_hash("x", ["p"], [], None, "mine"),
            **common,
        },
    ]
    assert facts["rows"] == {"mine": 2}


def test_labels_get_their_names(tmp_path: Path) -> None:
    write(
        tmp_path / "a.jsonl",
        [{"text": "a", "label": 0}, {"text": "b", "label": "1"}, {"text": "c", "label": 0}],
    )
    path = record(tmp_path, format="classification", files=["a.jsonl"], label_names={"0": "bad", "1": "good"})
    _, rows, _ = run(path, out=tmp_path / "out")
    assert [(row["query"], row["label"], row["positives"]) for row in rows] == [
        ("a", "bad", []),
        ("b", "good", []),
        ("c", "bad", []),
    ]


def test_scored_pairs(tmp_path: Path) -> None:
    scores: list[Any] = [5, 4.0, "4.5", 3.999, "high", float("nan"), True, None]
    pairs = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": score} for i, score in enumerate(scores)]
    pairs += [{"sentence1": "more", "sentence2": "more", "score": 4}] * 5
    write(tmp_path / "a.jsonl", pairs)
    path = record(tmp_path, layout="sts", files=["a.jsonl"], at_least=4)
    facts, rows, rejects = run(path, out=tmp_path / "out")
    assert [(row["query"], row["positives"]) for row in rows[:3]] == [(f"a{i}", [f"b{i}"]) for i in range(3)]
    assert facts["sources"]["mine"]["rejected"] == {"score below 'at_least'": 1, "score: not a number": 4}
    assert [one["number"] for one in rejects] == [4, 5, 6, 7, 8]


def naive_pairs(texts: list[tuple[str, str, str]], directions: Any) -> set[tuple[str, ...]]:
    """(id, lang, text) to (query, positive, their languages, id) of all texts with the same id."""
    first: dict[tuple[str, str], str] = {}
    for one, lang, text in texts:
        first.setdefault((one, lang), text)
    pairs: set[tuple[str, ...]] = set()
    for (a, query_lang), (b, positive_lang) in permutations(first, 2):
        english = [lang.split("_")[0] == "eng" for lang in (query_lang, positive_lang)]
        if isinstance(directions, list):
            asked = any([one, positive_lang] in directions for one in (query_lang, query_lang.split("_")[0]))
        else:
            asked = directions == "all" or sum(english) == 1
        if a == b and asked and query_lang != positive_lang:
            pairs.add((first[a, query_lang], first[b, positive_lang], query_lang, positive_lang, a))
    return pairs


@pytest.mark.parametrize("directions", ["all", "english", [["eng", "deu"], ["deu", "swa"]]])
@pytest.mark.parametrize("seed", range(3))
def test_parallel_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directions: Any, seed: int) -> None:
    monkeypatch.setattr(import_item, "ROWS", 17)
    rng = random.Random(seed)
    langs = ["eng_Latn", "deu", "swa", "zho_Hant", "bzd"]  # the last is in no table of languages
    texts = [(f"id{rng.randrange(40)}", rng.choice(langs), f"text {i}") for i in range(120)]
    # Ids go over files, and some come twice.
    for number in range(3):
        rows = [
            {"id": one, "lang": lang, "text": text}
            for one, lang, text in texts[number * 40 : number * 40 + 40]
        ]
        write(tmp_path / f"{number}.jsonl", rows)
    path = record(tmp_path, layout="parallel", files=["*.jsonl"], directions=directions)
    facts, rows, rejects = run(path, out=tmp_path / "out")
    made = [(r["query"], *r["positives"], r["query_lang"], r["positive_lang"], r["label"]) for r in rows]
    assert len(made) == len(set(made)) and set(made) == naive_pairs(texts, directions)
    used = {text for query, positive, *_ in made for text in (query, positive)}
    assert sorted(one["raw"] for one in rejects) == sorted(text for *_, text in texts if text not in used)
    again = Counter((one, lang) for one, lang, _ in texts)
    repeats = sum(count - 1 for count in again.values())
    assert facts["sources"]["mine"]["rejected"].get("id and language repeat", 0) == repeats
    assert facts["sources"]["mine"]["kept"] == len(used)
    for one in rejects:  # each says where it is
        line = (tmp_path / one["file"]).read_text().splitlines()[one["number"] - 1]
        assert json.loads(line)["text"] == one["raw"]
    assert not (tmp_path / "out" / "spool").exists()


def test_files_of_all_kinds_follow_one_another(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(8)]
    (tmp_path / "data").mkdir()
    with gzip.open(tmp_path / "data/b.jsonl.gz", "wt") as packed:
        packed.writelines(json.dumps(row) + "\n" for row in rows[2:4])
    pq.write_table(pa.Table.from_pylist(rows[4:6]), tmp_path / "data/c.parquet")
    with open(tmp_path / "data/a.csv", "w", newline="") as out:
        csv.writer(out).writerows([["query", "positive"], *(list(row.values()) for row in rows[:2])])
    (tmp_path / "z.json").write_text(json.dumps(rows[6:]))
    path = record(tmp_path, files=["data", "z.json"])
    _, made, _ = run(path, out=tmp_path / "out")
    assert [(row["query"], *row["positives"]) for row in made] == [tuple(row.values()) for row in rows]
    elsewhere = tmp_path / "records"
    elsewhere.mkdir()
    _, again, _ = run(path.rename(elsewhere / path.name), out=tmp_path / "out2", root=str(tmp_path))
    assert again == made


# --- What is not a row


BAD: list[tuple[str, str, str | None]] = [
    ('{"query": "", "positive": "p", "query_lang": "de"}', "query: no text", "query"),
    ('{"query": "q", "positive": []}', "positive: no text", "positive"),
    ('{"query": 5, "positive": "p"}', "query: not a text", "query"),
    ('{"query": "q", "positive": ["p", 5]}', "positive: not a text", "positive"),
    ('{"query": "q", "positive": "p", "negatives": ["n", " "]}', "negatives: no text", "negatives"),
    ('{"query": "q", "positive": "p", "query_lang": "German"}', "unknown language", "query_lang"),
    ('{"query": "q", "positive": ', "broken JSON", "28"),
    ('["q", "p"]', "not a JSON object", None),
    ("m\udcfcde", "not UTF-8", None),
]


def test_bad_rows_are_rejected_with_their_place(tmp_path: Path) -> None:
    good = '{"query": "q", "positive": "p", "query_lang": "zh-Hant"}\n'
    lines = [line for bad, _, _ in BAD for line in (bad + "\n", good)]
    (tmp_path / "a.jsonl").write_bytes("".join(lines).encode(errors="surrogateescape"))
    facts, rows, rejects = run(record(tmp_path, files=["a.jsonl"]), out=tmp_path / "out")
    assert [(one["number"], one["reason"], one["column"]) for one in rejects] == [
        (2 * i + 1, reason, column) for i, (_, reason, column) in enumerate(BAD)
    ]
    assert {(one["source"], one["file"], one["unit"]) for one in rejects} == {("mine", "a.jsonl", "line")}
    assert all(one["raw"] for one in rejects)
    found = facts["sources"]["mine"]
    assert (found["read"], found["kept"], len(rows)) == (2 * len(BAD), len(BAD), len(BAD))
    tally = read_json(tmp_path / "out" / "tally.json")["rows"]["mine"]
    assert tally["zho_Hant"] == {"kept": len(BAD)} and tally["deu"] == {"query: no text": 1}
    assert sum(n for fates in tally.values() for n in fates.values()) == found["read"]


def test_a_source_of_which_most_is_bad_names_the_first(tmp_path: Path) -> None:
    rows = [{"query": "q", "positive": "p"}] * 4 + [{"query": "q", "answer": "p"}] * 5
    path = record(tmp_path, files=[write(tmp_path / "a.jsonl", rows).name])
    with pytest.raises(
        UsageError, match=r"5 of 9 records of mine are not rows.*'columns'.*a\.jsonl, line 5, column"
    ) as e:
        run(path, out=tmp_path / "out")
    assert "\n" not in str(e.value)
    write(tmp_path / "a.jsonl", rows[:8])  # half may be bad
    assert run(path, out=tmp_path / "out2")[0]["sources"]["mine"]["rejected"] == {"positive: no text": 4}


def test_a_language_without_a_name_in_the_table_keeps_its_own(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "positive": "p", "query_lang": lang}
        for lang in ("bzd", "gn", "xx", "tzh_Latn", "de-AT")
    ]
    path = record(tmp_path, files=[write(tmp_path / "a.jsonl", rows).name])
    _, made, rejects = run(path, out=tmp_path / "out")
    assert [row["query_lang"] for row in made] == ["bzd", "grn", "tzh_Latn", "deu"]
    assert [one["number"] for one in rejects] == [3]


ROW = {"query": "q", "positive": "p"}


@pytest.mark.parametrize(
    ("keys", "content", "message"),
    [
        ({"layout": "sts"}, [ROW], "scored pairs and no 'at_least'; .* 4 of 5"),
        ({"columns": "unknown"}, [ROW], "the columns of mine are unknown"),
        ({"files": []}, [ROW], r"mine\.yaml:1: mine names no files"),
        ({"files": ["b*.csv"]}, [ROW], r"b\*\.csv means no file"),
        ({}, [], "the files of mine have no records"),
        ({"format": "clustering"}, [{"text": "a", "label": "x"}] * 3, "all rows of mine have the label 'x'"),
        (
            {"format": "classification"},
            [{"text": "a", "label": label} for label in "xyzw"],
            "more than two labels .*'w', 'x', 'y'",
        ),
        (
            {"layout": "sts", "at_least": 9},
            [{"sentence1": "a", "sentence2": "b", "score": 5}],
            r"no record of mine becomes a row: score below 'at_least' \(1\)",
        ),
        (
            {"layout": "parallel", "directions": [["eng", "deu"]]},
            [{"id": 1, "lang": "eng", "text": "a"}, {"id": 1, "lang": "fra", "text": "b"}],
            "mine has no texts for the direction eng -> deu, only eng, fra",
        ),
    ],
)
def test_what_a_record_lacks(tmp_path: Path, keys: dict[str, Any], content: list[Any], message: str) -> None:
    write(tmp_path / "a.jsonl", content)
    with pytest.raises(UsageError, match=message) as error:
        run(record(tmp_path, **{"files": ["a.jsonl"], **keys}), out=tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_without_a_column_is_refused_at_once(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.{ending}"
    if ending == "csv":
        file.write_text("qury,positive\nq,p\n")
    else:
        pq.write_table(pa.table({"qury": ["q"], "positive": ["p"]}), file)
    with pytest.raises(
        UsageError, match=rf"a\.{ending} has no column 'query', only 'qury', 'positive'; .*nearest is 'qury'"
    ):
        run(record(tmp_path, files=[file.name]), out=tmp_path / "out")
    named = record(tmp_path, files=[file.name], columns={"query": "qury", "negatives": "hard"})
    with pytest.raises(UsageError, match="has no column 'hard'"):  # somebody said that there is one
        run(named, out=tmp_path / "out")


def test_records_that_do_not_go_together(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [ROW])
    one = record(tmp_path, "one", files=["a.jsonl"])
    (tmp_path / "more").mkdir()
    two = record(tmp_path / "more", "one", files=["../a.jsonl"])
    with pytest.raises(UsageError, match=r"there is a source 'one' already, at .*one\.yaml:1"):
        run(one, two, out=tmp_path / "out")
    with pytest.raises(UsageError, match="no source 'ome' in .*; the nearest is 'one'"):
        run(one, out=tmp_path / "out", sources=["ome"])


# --- A limit


def numbered(folder: Path, counts: list[int]) -> Path:
    """A source of files with so many rows each, numbered from 0."""
    number = 0
    for place, count in enumerate(counts):
        rows = [{"query": f"{number + i}", "positive": "p"} for i in range(count)]
        write(folder / f"{place}.jsonl", rows)
        number += count
    return record(folder, files=["*.jsonl"])


def test_a_limit_draws_from_all_files_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "ITEM_BYTES", 100)  # so that a source is many items
    path = numbered(tmp_path, [40, 1, 59])
    drawn = []
    for seed in range(30):
        facts, rows, _ = run(path, out=tmp_path / f"out{seed}", seed=seed, limit=20)
        numbers = [int(row["query"]) for row in rows]
        assert len(numbers) == len(set(numbers)) == facts["sources"]["mine"]["read"] == 20
        assert numbers == sorted(numbers)
        drawn.append(numbers)
    assert len({tuple(numbers) for numbers in drawn}) == 30
    # 600 draws of 100 numbers: each third of them gets a third, give or take five deviations.
    thirds = Counter(number * 3 // 99 for numbers in drawn for number in numbers if number < 99)
    assert all(abs(thirds[third] - 200) < 58 for third in range(3))
    assert (
        run(path, out=tmp_path / "again", seed=7, limit=20)[1]
        == run(path, out=tmp_path / "b", seed=7, limit=20)[1]
    )
    assert len(run(path, out=tmp_path / "all", limit=100)[1]) == 100


def test_a_limit_of_parallel_texts_is_of_pairs(tmp_path: Path) -> None:
    texts = [
        {"id": i, "lang": lang, "text": f"{lang}{i}"} for lang in ("eng", "deu", "fra") for i in range(30)
    ]
    write(tmp_path / "a.jsonl", texts)
    path = record(tmp_path, layout="parallel", files=["a.jsonl"])
    everything = run(path, out=tmp_path / "all")[1]
    some = run(path, out=tmp_path / "some", limit=50)[1]
    assert (len(everything), len(some)) == (120, 50)
    assert {row["hash"] for row in some} < {row["hash"] for row in everything}
    assert len({(row["query_lang"], row["positive_lang"]) for row in some}) == 4


# --- Stopped and gone on


SCRIPT = """
import sys
from f2llm.data import import_item, importing
from f2llm.engine import Engine, using
import_item.ROWS = 50
if __name__ == "__main__":
    with using(Engine(workers=1)):
        config = importing.SourcesStage(stage="sources", records=sys.argv[2:])
        importing.sources_stage(config, importing.Path(sys.argv[1]), 1)
"""


def test_killed_at_any_time_it_ends_in_the_same_files(tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = [{"query": f"q{i}", "positive": "p"} if rng.random() < 0.8 else {"query": i} for i in range(3000)]
    write(tmp_path / "a.jsonl", lines)
    texts = [{"id": i // 3, "lang": ("eng", "deu", "fra")[i % 3], "text": f"t{i}"} for i in range(3000)]
    write(tmp_path / "b.jsonl", rng.sample(texts, 2500))
    records = [
        record(tmp_path, "one", files=["a.jsonl"]),
        record(tmp_path, "two", layout="parallel", files=["b.jsonl"]),
    ]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(script), str(out), *map(str, records)])

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start(whole).wait() == 0
    files = len(list(whole.rglob("*.*")))
    killed = 0
    for share in (0.1, 0.4, 0.7, 0.9):
        process = start(out)
        while process.poll() is None and len(list(out.rglob("*.*"))) < share * files:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 3, "the process was faster than the test"
    assert start(out).wait() == 0
    for leftover in out.rglob(".*.tmp"):  # as the pipeline does
        leftover.unlink()
    assert sha256_folder(out) == sha256_folder(whole)


def test_what_is_done_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_item, "ROWS", 10)
    path = numbered(tmp_path, [35])
    first = run(path, out=tmp_path / "out")
    (tmp_path / "0.jsonl").write_text('{"query": "other"}\n' * 35)
    assert run(path, out=tmp_path / "out") == first


def test_who_works_changes_nothing(tmp_path: Path) -> None:
    records = []
    for number in range(3):
        (tmp_path / f"{number}").mkdir()
        records.append(
            numbered(tmp_path / f"{number}", [20, 30]).rename(tmp_path / f"{number}/r{number}.yaml")
        )
        text = records[-1].read_text()
        records[-1].write_text(text.replace('"mine"', f'"r{number}"'))
    for workers in (1, 2):
        run(*records, out=tmp_path / f"out{workers}", engine=Engine(workers=workers), limit=30)
    assert sha256_folder(tmp_path / "out1") == sha256_folder(tmp_path / "out2")


def test_parts_hold_no_more_than_they_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And small files share one."""
    monkeypatch.setattr(import_item, "ROWS", 10)
    path = numbered(tmp_path, [3, 3, 3, 3, 25, 1])
    run(path, out=tmp_path / "out")
    assert [part.rows for part in parts(tmp_path / "out")] == [9, 3, 10, 10, 6]
