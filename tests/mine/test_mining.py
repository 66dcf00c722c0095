"""Mining as a stage: against loops over all pairs, for every setting; killed, cut and shared out; beside a peer."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.mine.test_search import product

from f2llm.data.parts import write_part
from f2llm.data.rows import Source, read_rows, row_hash, rows_table, write_rows
from f2llm.engine import Engine, using
from f2llm.errors import F2Error, UsageError
from f2llm.files import write_json
from f2llm.mine.mining import mine_stage
from f2llm.mine.search import Scores
from f2llm.mine.texts import embedder
from f2llm.recipe_corpus import MineStage

Things = list[dict[str, str]]
Row = dict[str, Any]
Columns = dict[str, list[Any]]


def settings(**changes: Any) -> MineStage:
    config = {
        "stage": "mine",
        "data": ["rows"],
        "model": "miner",
        "candidates": 5,
        "last_rank": 12,
        "samples": 2,
    }
    return MineStage(**{**config, "relative_margin": None, **changes})


@dataclass(frozen=True)
class Corpus:
    """Two folders of rows: three sources, the first two of retrieval, the first in two parts."""

    folders: list[Path]
    sources: dict[str, Source]
    parts: list[list[Row]]

    @property
    def rows(self) -> list[Row]:
        return [row for part in self.parts for row in part]


@pytest.fixture(scope="session")
def corpus(things: Things, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Names to be found in other languages, with duplicates, labels, and a query that several rows have."""
    facts = {"task": "names", "licence": "CC0-1.0", "symmetric": True}
    sources = [
        Source(name="french", format="retrieval", instruction="Find this name in French", **facts),
        Source(name="labelled", format="retrieval", instruction="", **facts),
        Source(name="kinds", format="classification", instruction="Say what kind of thing this is", **facts),
    ]
    french: Columns = {
        "query": [thing["eng"] for thing in things] + [things[0]["eng"]],
        "positives": [[thing["fra"]] for thing in things]
        + [[things[0]["rus"]]],  # right for the first row too
        "negatives": [[thing["zho"]] if number % 4 == 0 else [] for number, thing in enumerate(things)]
        + [[]],
        "query_lang": ["eng"] * (len(things) + 1),
        "positive_lang": ["fra"] * len(things) + ["rus"],
    }
    shouted: Columns = {
        "query": [thing["fra"] for thing in things[:6]],
        "positives": [
            [f"  {thing['fra'].upper()} "] for thing in things[3:9]
        ],  # the documents of others, said aloud
        "negatives": [[thing["eng"]] for thing in things[:6]],  # in French these are queries
        "query_lang": ["fra"] * 6,
        "positive_lang": ["fra"] * 6,
    }
    labelled: Columns = {
        "query": [thing[lang] for thing in things for lang in ("swa", "hin")],
        "positives": [[thing["rus"], thing["zho"]] for thing in things for _ in range(2)],
        "label": [
            thing["kind"] if number % 3 else None for number, thing in enumerate(things) for _ in range(2)
        ],
        "query_lang": ["swa", "hin"] * len(things),
        "positive_lang": ["rus"] * 2 * len(things),
    }
    kinds: Columns = {
        "query": [thing["eng"] for thing in things],
        "label": [thing["kind"] for thing in things],
        "query_lang": ["eng"] * len(things),
    }
    tables = [
        pa.concat_tables([rows_table(sources[0], french), rows_table(sources[1], labelled).slice(0, 10)]),
        rows_table(sources[0], shouted),
        pa.concat_tables([rows_table(sources[1], labelled).slice(10), rows_table(sources[2], kinds)]),
    ]
    base = tmp_path_factory.mktemp("corpus")
    folders = [base / "first", base / "second"]
    for number, table in enumerate(tables[:2]):
        write_part(folders[0], number, table)
    write_json(folders[0] / "sources.json", [source.model_dump() for source in sources[:2]])
    write_rows(folders[1], tables[2], sources[1:])
    return Corpus(
        folders, {source.name: source for source in sources}, [table.to_pylist() for table in tables]
    )


@dataclass(frozen=True)
class Mined:
    """What is expected of a row."""

    negatives: list[str]
    scores: list[float]


def folded(text: str) -> str:
    return " ".join(text.casefold().split())


@cache
def vector(model: Path, dim: int | None, text: str) -> np.ndarray:
    return embedder(model).encode(text, dim=dim, too_long="truncate")


@cache
def cosine(model: Path, dim: int | None, query: str, document: str) -> float:
    return product(vector(model, dim, query), vector(model, dim, document))


def known_right(row: Row, pool: list[Row]) -> set[str]:
    known = {folded(row["query"])}
    for other in pool:
        same_label = row["label"] and (row["source"], row["label"]) == (other["source"], other["label"])
        if folded(other["query"]) == folded(row["query"]) or same_label:
            known |= {folded(text) for text in other["positives"]}
    return known


def pool_of(row: Row, config: MineStage) -> str:
    return {"source": row["source"], "language": row["positive_lang"], "corpus": ""}[config.pool]


def reference(
    corpus: Corpus, model: Path, config: MineStage, rerank: Callable[[str, str], float] | None
) -> list[Mined]:
    """Loops over rows and documents; vectors are looked up one text at a time."""
    rows = corpus.rows
    retrieval = [row for row in rows if corpus.sources[row["source"]].format == "retrieval"]

    def asked(row: Row) -> str:
        instruction = corpus.sources[row["source"]].instruction
        return (
            f"Instruct: {instruction}\nQuery: {row['query']}"
            if config.instructions and instruction
            else row["query"]
        )

    def score(row: Row, document: str) -> float:
        return cosine(model, config.dim, asked(row), document)

    def judge(row: Row, document: str) -> float:
        return rerank(row["query"], document) if rerank else score(row, document)

    first_seen: dict[str, int] = {}
    for part in corpus.parts:
        of_part = [row for row in part if row in retrieval]
        for texts in (
            [asked(row) for row in of_part],
            [text for row in of_part for text in row["positives"]],
            [text for row in of_part for text in row["negatives"]],
        ):
            for text in texts:
                first_seen.setdefault(text, len(first_seen))
    mined = []
    for row in rows:
        if row not in retrieval:
            mined.append(Mined(row["negatives"], []))
            continue
        pool = [other for other in retrieval if pool_of(other, config) == pool_of(row, config)]
        documents: dict[str, str] = {}
        for text in sorted(
            {t for o in pool for t in o["positives"] + o["negatives"]}, key=first_seen.__getitem__
        ):
            documents.setdefault(folded(text), text)
        given = row["negatives"] if config.given_negatives == "keep" else []
        known = known_right(row, pool) | {folded(text) for text in given}
        ranked = sorted(
            (-score(row, text), first_seen[text], text) for key, text in documents.items() if key not in known
        )[config.skip_ranks : config.last_rank]
        ranked = sorted((-judge(row, text), seen, text) for _, seen, text in ranked)
        positive = min(judge(row, text) for text in row["positives"])
        kept = [
            (text, -negated)
            for negated, _, text in ranked
            if (config.absolute_margin is None or positive + negated >= config.absolute_margin)
            and (
                config.relative_margin is None or positive + negated >= config.relative_margin * abs(positive)
            )
            and (config.max_score is None or -negated <= config.max_score)
        ][: config.candidates]
        mined.append(Mined(given + [text for text, _ in kept], [score for _, score in kept]))
    return mined


def letters(query: str, document: str) -> float:
    """A cross-encoder: shared letters, fewer than none."""
    return float(len(set(query) & set(document)) - 6)


def letters_of_pairs(pairs: Sequence[tuple[str, str]]) -> Scores:
    return np.array([letters(*pair) for pair in pairs], np.float32)


def written(out: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()
    }


SETTINGS: list[dict[str, Any]] = [
    {},
    {"skip_ranks": 3},
    {"absolute_margin": 0.1},
    {"relative_margin": 0.2},
    {"max_score": 0.3, "candidates": 2},
    {"absolute_margin": 0.02, "relative_margin": 0.1, "max_score": 0.8, "skip_ranks": 1, "last_rank": 30},
    {"last_rank": 200, "candidates": 150},  # more than there are
    {"given_negatives": "replace"},
    {"instructions": False},
    {"dim": 8},
    {"pool": "language"},
    {"pool": "corpus", "skip_ranks": 2},
]


@pytest.mark.parametrize("changes", SETTINGS)
@pytest.mark.parametrize("rerank", [None, letters])
def test_mining(
    changes: dict[str, Any], rerank: Any, corpus: Corpus, model_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    for module in ("block", "mining", "rows_out"):
        monkeypatch.setattr(
            f"f2llm.mine.{module}.ROWS_AT_ONCE", 7
        )  # so that there are several blocks in a pool
    monkeypatch.setattr("f2llm.mine.rows_out.SLICE_ROWS", 8)
    if rerank and (changes.get("absolute_margin") or changes.get("max_score")):
        changes = {**changes, "absolute_margin": 1.0, "max_score": -1.0}
    config = settings(**changes)
    with using(Engine(workers=1)):
        facts = mine_stage(
            config, corpus.folders, model_folder, tmp_path, 0, letters_of_pairs if rerank else None
        )
    expected = reference(corpus, model_folder, config, rerank)
    table, sources = read_rows(tmp_path)
    got = table.to_pylist()
    assert [row["negatives"] for row in got] == [mined.negatives for mined in expected]
    for row, before in zip(got, corpus.rows, strict=True):
        hashed = (row["query"], row["positives"], row["negatives"], row["label"], row["source"])
        assert row == {**before, "negatives": row["negatives"], "hash": row_hash(*hashed)}
    assert {source.name: source.rows for source in sources} == {"french": 27, "labelled": 40, "kinds": 20}
    assert facts["candidates"] == sum(len(mined.scores) for mined in expected)
    assert facts["rows"] == len(expected)
    mined_for = [m for m, row in zip(expected, corpus.rows, strict=True) if row["source"] != "kinds"]
    assert facts["rows_without_candidates"] == sum(not mined.scores for mined in mined_for)


def test_report_and_sheet(corpus: Corpus, model_folder: Path, tmp_path: Path) -> None:
    config = settings(absolute_margin=0.02, max_score=0.8, last_rank=20)
    with using(Engine(workers=1)):
        facts = mine_stage(config, corpus.folders, model_folder, tmp_path, 0)
    counts = json.loads((tmp_path / "report.json").read_text())["counts"]
    by_key = {(one["source"], one["language"]): one for one in counts}
    assert {key: one["rows"] for key, one in by_key.items()} == {
        ("french", "eng"): 21,
        ("french", "fra"): 6,
        ("labelled", "hin"): 20,
        ("labelled", "swa"): 20,
    }
    for one in counts:
        assert sum(one["candidates"].values()) == one["rows"]
        assert sum(int(n) * rows for n, rows in one["candidates"].items()) == one["ranked"]["kept"]
        assert sum(one["margins"]) == one["ranked"]["kept"]
        assert one["margins"][0] == 0  # an absolute margin leaves none below 0
        assert sum(one["ranked"].values()) == one["rows"] * 20  # all pools have enough
    assert sum(one["ranked"]["kept"] for one in counts) == facts["candidates"]
    assert sum(one["passed_over"]["positive"] for one in counts) > 0
    assert by_key["french", "eng"]["passed_over"]["right_for_label"] == 0
    assert by_key["labelled", "hin"]["passed_over"]["right_for_label"] > 0
    page = (tmp_path / "report.md").read_text()
    assert page.count("| labelled | all | 40 |") == 1
    sheet = (tmp_path / "samples.md").read_text()
    mined = {row["query"]: row for row in read_rows(tmp_path)[0].to_pylist() if row["source"] != "kinds"}
    shown = [line.strip("*") for line in sheet.splitlines() if line.startswith("**")]
    assert len(shown) == 4 and set(shown) <= set(mined)
    for text in mined[shown[-1]]["positives"] + mined[shown[-1]]["negatives"]:
        assert text in sheet
    assert not (tmp_path / "work").exists()


def test_passed_over_are_those_that_would_be_among_the_ranks(
    corpus: Corpus, model_folder: Path, tmp_path: Path
) -> None:
    """Where all ranks are looked at, every document that is barred is counted, each by its first reason."""
    with using(Engine(workers=1)):
        mine_stage(settings(last_rank=1000), corpus.folders, model_folder, tmp_path, 0)
    counts = json.loads((tmp_path / "report.json").read_text())["counts"]
    french = [one["passed_over"] for one in counts if one["source"] == "french"]
    total = {reason: sum(one[reason] for one in french) for reason in french[0]}
    assert (
        total
        == {
            "positive": 27,
            "right_for_query": 2,  # two rows ask for the first thing, each with a positive
            "right_for_label": 0,
            "query_itself": 13,  # documents are the first six names in English, which seven rows ask for, and in French
            "given_negative": 11,
        }
    )


@pytest.mark.slow
def test_workers_change_nothing(corpus: Corpus, model_folder: Path, tmp_path: Path) -> None:
    config = settings(relative_margin=0.1)
    with using(Engine(workers=1)):
        mine_stage(config, corpus.folders, model_folder, tmp_path / "one", 0)
    with using(Engine(workers=2)):
        mine_stage(config, corpus.folders, model_folder, tmp_path / "two", 0, miners=Engine(workers=2))
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_killed_and_continued(
    corpus: Corpus, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before every seventh file gets its name, until it is through."""
    monkeypatch.setattr("f2llm.mine.texts.TEXTS_AT_ONCE", 50)
    config, replace, left = settings(relative_margin=0.1), os.replace, [7]

    def killed(source: Any, target: Any) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(source, target)

    with using(Engine(workers=1)):
        facts = mine_stage(config, corpus.folders, model_folder, tmp_path / "straight", 0)
        monkeypatch.setattr(os, "replace", killed)
        kills = 0
        while True:
            left[0] = 7 + kills  # pools are made at once: a run must get a little further each time
            try:
                assert mine_stage(config, corpus.folders, model_folder, tmp_path / "killed", 0) == facts
                break
            except KeyboardInterrupt:
                kills += 1
                assert kills < 60
        left[0] = -1
        assert kills > 5
        assert written(tmp_path / "straight") == written(tmp_path / "killed")
        assert mine_stage(config, corpus.folders, model_folder, tmp_path / "killed", 0) == facts


def test_a_model_that_is_not_ours_is_a_miner_too(corpus: Corpus, model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "other", ignore=shutil.ignore_patterns("f2llm.json"))
    with using(Engine(workers=1)):
        for model in (model_folder, tmp_path / "other"):
            mine_stage(settings(), corpus.folders, model, tmp_path / f"mined-{model.name}", 0)
    ours, other = (read_rows(tmp_path / f"mined-{name}")[0] for name in (model_folder.name, "other"))
    assert ours["negatives"].to_pylist() == other["negatives"].to_pylist()


def test_a_folder_is_of_one_job(
    corpus: Corpus, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("f2llm.mine.mining.make_pools", lambda *_: 1 / 0)
    with using(Engine(workers=1)):
        with pytest.raises(ZeroDivisionError):
            mine_stage(settings(), corpus.folders, model_folder, tmp_path, 0)
        with pytest.raises(F2Error, match="begun with other rows, settings or another model"):
            mine_stage(settings(candidates=2), corpus.folders, model_folder, tmp_path, 0)


def test_refusals(things: Things, corpus: Corpus, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dim is 25; .* gives 1 to 24"):
        mine_stage(settings(dim=25), corpus.folders, model_folder, tmp_path / "wide", 0)
    source = corpus.sources["kinds"]
    columns = {"query": ["a", "b"], "label": ["1", "2"], "query_lang": ["eng", "eng"]}
    write_rows(tmp_path / "rows", rows_table(source, columns), [source])
    with pytest.raises(F2Error, match="none of .* has a source of retrieval rows"):
        mine_stage(settings(), [tmp_path / "rows"], model_folder, tmp_path / "none", 0)
    with pytest.raises(ValueError, match="must leave at least 5 'candidates' after 'skip_ranks'"):
        settings(skip_ranks=8)


@pytest.mark.parametrize(
    "changes",
    [{}, {"absolute_margin": 0.05}, {"relative_margin": 0.1}, {"relative_margin": 0.1, "max_score": 0.7}],
)
@pytest.mark.slow
def test_sentence_transformers_mines_the_same(
    changes: dict[str, float], things: Things, model_folder: Path, tmp_path: Path
) -> None:
    """Where settings agree: one positive a query, no ranks skipped."""
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    pairs = [(thing[a], thing[b]) for a, b in (("eng", "rus"), ("swa", "zho")) for thing in things]
    pairs = list({query: (query, positive) for query, positive in pairs}.values())
    query, positive = ([pair[side] for pair in pairs] for side in (0, 1))
    peer = mine_hard_negatives(
        datasets.Dataset.from_dict({"query": query, "positive": positive}),
        SentenceTransformer(str(model_folder), device="cpu"),
        range_max=25,
        num_negatives=10,
        query_prompt="Instruct: Find it\nQuery: ",
        output_format="labeled-list",
        output_scores=True,
        verbose=False,
        **changes,
    )
    theirs = {row["query"]: row["positive"][1:] for row in peer}
    source = Source(
        name="pairs",
        format="retrieval",
        task="names",
        symmetric=False,
        instruction="Find it",
        licence="CC0-1.0",
    )
    columns: Columns = {
        "query": query,
        "positives": [[text] for text in positive],
        "query_lang": ["und"] * len(query),
    }
    write_rows(tmp_path / "rows", rows_table(source, columns), [source])
    mine_stage(
        settings(candidates=10, last_rank=25, **changes),
        [tmp_path / "rows"],
        model_folder,
        tmp_path / "out",
        0,
    )
    ours = {row["query"]: row["negatives"] for row in read_rows(tmp_path / "out")[0].to_pylist()}
    assert {query: texts for query, texts in ours.items() if texts} == theirs
    assert len(theirs) > 5
