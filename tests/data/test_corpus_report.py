"""The report of a corpus: of a run of all its stages, against counts that are made here from rows and rejects alone."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tests.data.naive_texts import SENTENCES

from f2llm import pipeline
from f2llm.data.corpus_report import corpus_report
from f2llm.data.token_store import open_store
from f2llm.engine import Engine, using
from f2llm.files import read_json, write_json
from f2llm.recipe import load

pytest.importorskip("py3langid", reason="py3langid is not installed")

Line = dict[str, Any]

RECORD = {"title": "T", "task": "answers", "symmetric": False, "instruction": "Find it", "licence": "CC0-1.0"}
STAGES = ("pairs", "own", "clean", "unseen", "mined", "store")
RECIPE = """\
name: small-corpus
seed: 1
output: {folder}/run
stages:
  pairs: {{stage: sources, records: [{folder}/records]}}
  own:
    stage: files
    files: [{folder}/own.jsonl]
    format: clustering
    task: topics
    instruction: Find texts about the same topic
    query_lang: und
  unused: {{stage: files, files: [{folder}/own.jsonl], format: clustering, task: t, instruction: i, query_lang: eng}}
  clean: {{stage: clean, data: [pairs, own], duplicates: exact, language_check: report, language_tags: individual}}
  unseen: {{stage: decontaminate, data: [clean], against: [{folder}/held.jsonl]}}
  mined: {{stage: mine, data: [unseen], model: {model}/, candidates: 3, relative_margin: null, samples: 0}}
  store: {{stage: tokenise, data: [mined], tokenizer: {model}/}}
"""
HELD = "a sentence that some examination asks for and that nobody is to have seen before it"


def write_lines(path: Path, lines: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def write_sources(folder: Path) -> None:
    """Two sources and a file of one's own: faults, repeats, test texts, wrong and unknown languages among them."""
    rng = random.Random(5)

    def words(count: int = 6) -> str:
        return " ".join("".join(rng.choices("abdefgiklmnoprstuvz", k=7)) for _ in range(count))

    faq: list[Any] = [{"question": f"{words()}?", "answer": words(), "lang": "eng"} for _ in range(20)]
    faq += [faq[3], faq[4], {"question": "no answer", "answer": "", "lang": "eng"}]
    faq += [{"question": words(), "answer": HELD, "lang": "eng"}]
    faq += [{"question": f" {words()}  ", "answer": words(), "lang": "zho", "wrong": [HELD, words()]}]
    faq += [{"question": SENTENCES["rus"], "answer": words(), "lang": "deu"}]
    faq += [{"question": SENTENCES["rus"][:-7], "answer": words(), "lang": "acu", "wrong": [words()]}]
    write_lines(folder / "records" / "faq.jsonl", faq)
    columns = {"query": "question", "positive": "answer", "negatives": "wrong", "query_lang": "lang"}
    record = {**RECORD, "name": "faq", "format": "retrieval", "files": ["faq.jsonl"], "columns": columns}
    (folder / "records" / "faq.yaml").write_text(json.dumps(record))

    tests = [{"query": f"{HELD} {word}", "positive": words(), "query_lang": "yor"} for word in ("one", "two")]
    write_lines(folder / "records" / "leaked.jsonl", tests)
    record = {**RECORD, "name": "leaked", "format": "retrieval", "files": ["leaked.jsonl"]}
    (folder / "records" / "leaked.yaml").write_text(json.dumps(record))

    own = [{"text": words(), "label": str(number % 2)} for number in range(6)]
    write_lines(folder / "own.jsonl", [*own, own[0]])
    write_lines(folder / "held.jsonl", [{"text": HELD}])


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_sources(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder, model=model_folder))
    with using(Engine(workers=1)):
        return pipeline.run(load(recipe), recipe)


def manifests(run: Path) -> list[dict[str, Any]]:
    return [read_json(run / name / "manifest.json") for name in load(run / "recipe.yaml").stages]


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    found = corpus_report(run, manifests(run))
    assert found is not None
    return found


# --- Counts made from rows and rejects


def table(path: Path) -> list[Line]:
    return pq.read_table(path).to_pylist() if path.exists() else []


def kept(run: Path, stage: str, **of: str) -> int:
    return sum(of.items() <= row.items() for row in table(run / stage / "rows.parquet"))


def rejected(run: Path, stage: str, **of: str) -> dict[str, int]:
    rows = table(run / stage / "rejects.parquet")
    return Counter(row["reason"] for row in rows if of.items() <= row.items())


def lines(report: dict[str, Any]) -> Iterator[tuple[Line, dict[str, str]]]:
    """Each line with what its rows have in common."""
    yield report["total"], {}
    yield from ((line, {"source": line["source"]}) for line in report["sources"])
    yield from ((line, {"query_lang": line["language"]}) for line in report["languages"])


def test_every_line_counts_the_rows_that_are_there(run: Path, report: dict[str, Any]) -> None:
    everything = kept(run, "mined")
    for line, of in lines(report):
        counted = {stage: kept(run, stage, **of) for stage in STAGES[:-1]}
        assert {**dict.fromkeys(counted, 0), **line["kept"]} == counted, of
        reasons = {stage: rejected(run, stage, **of) for stage in STAGES[:-1]}
        assert line["rejected"] == {stage: found for stage, found in reasons.items() if found}, of
        assert line["made"] == counted["pairs"] + counted["own"]
        assert line["rows"] == counted["mined"]
        assert line["share"] == pytest.approx(counted["mined"] / everything)
    assert report["last"] == ["mined"]
    assert {line["source"] for line in report["sources"]} == {"faq", "leaked", "own"}
    assert {line["language"] for line in report["languages"]} == {
        *("eng", "zho", "cmn", "deu", "acu", "yor", "und")
    }


def test_totals_are_those_that_the_stages_tell_of(run: Path, report: dict[str, Any]) -> None:
    facts = {manifest["name"]: manifest["facts"] for manifest in manifests(run)}
    for what in ("sources", "languages"):
        for stage in report["stages"]:
            name = stage["name"]
            assert sum(line["kept"].get(name, 0) for line in report[what]) == stage["kept"]
            reasons = sum((Counter(line["rejected"].get(name, {})) for line in report[what]), Counter[str]())
            assert reasons == stage["rejected"]
            assert stage["read"] == stage["kept"] + reasons.total()
        assert sum(line["tokens"] for line in report[what]) == facts["store"]["tokens"]
        assert sum(line["texts"] for line in report[what]) == facts["store"]["texts"]
    by_name = {stage["name"]: stage for stage in report["stages"]}
    assert facts["clean"] == {
        **{what: by_name["clean"][what] for what in ("read", "kept")},
        "dropped": by_name["clean"]["rejected"],
    }
    assert facts["unseen"]["rows"] == by_name["unseen"]["kept"]
    assert facts["unseen"]["contaminated"] == sum(by_name["unseen"]["rejected"].values()) == 3
    assert facts["mined"]["rows"] == by_name["mined"]["kept"]
    assert {name: found["read"] for name, found in facts["pairs"]["sources"].items()} == {
        line["source"]: line["records"] for line in report["sources"] if line["source"] != "own"
    }


def test_what_was_planted_is_told(run: Path, report: dict[str, Any]) -> None:
    sources = {line["source"]: line for line in report["sources"]}
    assert sources["faq"] | {"task": "answers", "format": "retrieval", "licence": "CC0-1.0"} == sources["faq"]
    assert sources["faq"]["records"] == 27
    assert sum(sources["faq"]["rejected"]["pairs"].values()) == 1
    assert sources["faq"]["rejected"]["clean"] == {"exact duplicate": 2}
    assert sources["faq"]["rejected"]["unseen"] == {"exact: held.jsonl": 1}
    assert sources["faq"]["changed"] == {
        "clean": {"text tidied": 1},
        "unseen": {"negative left out: exact: held.jsonl": 1},
    }
    assert sources["own"]["rejected"] == {"clean": {"exact duplicate": 1}}
    assert (sources["leaked"]["rows"], sources["leaked"]["languages"]) == (0, 0)
    assert [line["source"] for line in report["sources"]] == ["faq", "own", "leaked"]  # most rows first

    languages = {line["language"]: line for line in report["languages"]}
    assert (languages["zho"]["made"], languages["zho"]["rows"]) == (1, 0)  # a tag that cleaning renames
    assert (languages["cmn"]["made"], languages["cmn"]["rows"]) == (0, 1)
    assert (languages["deu"]["name"], languages["acu"]["language"]) == ("German", "acu")
    assert languages["deu"]["checked"]["written in another language than tagged: rus"] == 1
    assert languages["acu"]["checked"]["language not known to the detector"] >= 1
    assert languages["eng"]["sources"] == 1
    looked_at = [
        text for row in table(run / "pairs" / "rows.parquet") for text in (row["query"], row["positives"])
    ]
    assert sum(report["total"]["checked"].values()) == len(looked_at) + kept(run, "own")


def test_mined_negatives_are_those_that_rows_gained(run: Path, report: dict[str, Any]) -> None:
    before, after = (table(run / stage / "rows.parquet") for stage in ("unseen", "mined"))
    gained = [len(b["negatives"]) - len(a["negatives"]) for a, b in zip(before, after, strict=True)]
    for line, of in lines(report):
        ours = [n for n, row in zip(gained, after, strict=True) if of.items() <= row.items()]
        assert line["mined"]["negatives"] == sum(ours)
        assert line["mined"]["with_any"] == sum(n > 0 for n in ours)
    retrieval = kept(run, "mined", source="faq")
    assert report["total"]["mined"]["rows"] == retrieval and sum(gained) > retrieval


def test_tokens_are_those_of_the_store(run: Path, report: dict[str, Any]) -> None:
    store = open_store(run / "store")
    lengths = [len(tokens) for tokens in store.tokens(range(len(store)))]
    assert (report["total"]["texts"], report["total"]["tokens"]) == (len(lengths), sum(lengths))


def test_runs_without_a_corpus_tell_of_none(run: Path) -> None:
    found = manifests(run)
    assert corpus_report(run, [one for one in found if one["stage"] == "files"]) is None
    report = corpus_report(run, [one for one in found if one["name"] in ("pairs", "own", "clean")])
    assert report is not None and report["last"] == ["clean"] and report["total"]["tokens"] == 0


def test_rows_from_outside_the_run_are_counted_as_they_came(run: Path, tmp_path: Path) -> None:
    (mined,) = (one for one in manifests(run) if one["name"] == "mined")
    outside = str(run / "unseen")
    there = [{**mined, "config": {**mined["config"], "data": [outside]}}]
    report = corpus_report(run, there)
    assert report is not None
    assert report["total"]["kept"] == {outside: kept(run, "unseen"), "mined": kept(run, "mined")}
    assert report["total"]["made"] == kept(run, "unseen")


def test_each_corpus_that_is_left_counts(run: Path) -> None:
    found = [one for one in manifests(run) if one["name"] in ("pairs", "own", "clean", "unseen")]
    found[-1] = {**found[-1], "config": {**found[-1]["config"], "data": ["pairs"]}}
    report = corpus_report(run, found)
    assert report is not None
    assert report["last"] == ["clean", "unseen"]
    assert report["total"]["rows"] == kept(run, "clean") + kept(run, "unseen")


def test_a_stage_without_rows_is_no_corpus(run: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "pairs" / "tally.json", {"rows": {}, "changed": {}})
    write_json(tmp_path / "pairs" / "sources.json", [])
    (pairs,) = (one for one in manifests(run) if one["name"] == "pairs")
    assert corpus_report(tmp_path, [{**pairs, "facts": {"sources": {}}}]) is None
