"""A corpus from its sources to a token store, by the real command: every row accounted for, whatever interrupts it."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from tests.corpus_folder import MOST_CHARACTERS, Corpus, make_corpus
from tokenizers import Tokenizer

from f2llm import pipeline
from f2llm.data.rows import read_rows
from f2llm.data.token_store import open_store
from f2llm.data.token_store_format import NO_LABEL
from f2llm.engine import Engine, using
from f2llm.files import read_json, sha256_file
from f2llm.recipe import load

pytest.importorskip("py3langid", reason="py3langid is not installed")

Row = dict[str, Any]

RECIPE = """\
name: corpus
seed: 1
output: {out}
stages:
  rows: {{stage: sources, records: [{folder}/records], root: {folder}/data}}
  clean: {{stage: clean, data: [rows], duplicates: near, language_check: report, max_characters: {most}}}
  unseen: {{stage: decontaminate, data: [clean], against: [{folder}/held_out]}}
  mined: {{stage: mine, data: [unseen], model: {model}/, candidates: 4, relative_margin: null, samples: 2}}
  store: {{stage: tokenise, data: [mined], tokenizer: {model}/}}
"""
STAGES = ("rows", "clean", "unseen", "mined", "store")
CANDIDATES = 4
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
TIMES = ("seconds", "peak_memory_gb", "finished")  # of a manifest


class Run(NamedTuple):
    """A recipe, and the folder of its run."""

    recipe: Path
    out: Path

    def start(self, *options: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "f2llm", "run", str(self.recipe), *options]
        return subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)

    def finish(self, *options: str) -> str:
        """Run it to the end; what it said."""
        process = self.start(*options)
        said = process.communicate()[1]
        assert process.returncode == 0, said
        return said

    def contents(self, *stages: str) -> dict[str, Any]:
        """All files of these stages: their hashes, and what manifests say but for times."""
        found: dict[str, Any] = {}
        for stage in stages or STAGES:
            for path in sorted((self.out / stage).rglob("*")):
                if path.name == "manifest.json":
                    manifest = read_json(path)
                    found[str(path.relative_to(self.out))] = {
                        name: manifest[name] for name in manifest if name not in TIMES
                    }
                elif path.is_file():
                    found[str(path.relative_to(self.out))] = sha256_file(path)
        return found


def make_run(corpus: Corpus, model: Path, folder: Path) -> Run:
    """The recipe for a corpus, to be run into a folder."""
    text = RECIPE.format(out=folder / "run", folder=corpus.folder, model=model, most=MOST_CHARACTERS)
    (folder / "recipe.yaml").write_text(text)
    return Run(folder / "recipe.yaml", folder / "run")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(corpus: Corpus, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupted."""
    run = make_run(corpus, model_folder, tmp_path_factory.mktemp("straight"))
    run.finish("--workers", "1")
    return run


@pytest.fixture
def another(corpus: Corpus, model_folder: Path, tmp_path: Path) -> Run:
    """The same recipe for a folder that nothing is in yet."""
    return make_run(corpus, model_folder, tmp_path)


# --- The whole


def rows_of(folder: Path) -> list[Row]:
    rows: list[Row] = read_rows(folder)[0].to_pylist()
    return rows


def rejects_of(folder: Path) -> list[Row]:
    rejects: list[Row] = pq.read_table(folder / "rejects.parquet").to_pylist()
    return rejects


@pytest.mark.parametrize("stage", STAGES[:4])
def test_every_row_is_accounted_for(corpus: Corpus, straight: Run, stage: str) -> None:
    folder, kept = straight.out / stage, corpus.kept_after(*STAGES[: STAGES.index(stage) + 1])
    rejected = Counter(
        (row.source, row.lang, row.fate.reason) for row in corpus.rejected_by(stage) if row.fate
    )
    assert Counter((row["source"], row["query_lang"]) for row in rows_of(folder)) == kept
    if rejected:
        found = Counter((row["source"], row["query_lang"], row["reason"]) for row in rejects_of(folder))
        assert found == rejected
    tally = {
        (source, lang, fate): rows
        for source, languages in read_json(folder / "tally.json")["rows"].items()
        for lang, fates in languages.items()
        for fate, rows in fates.items()
        if rows
    }
    assert tally == rejected | {(*key, "kept"): rows for key, rows in kept.items()}


def test_records_read_are_those_of_the_files(corpus: Corpus, straight: Run) -> None:
    sources = read_json(straight.out / "rows" / "manifest.json")["facts"]["sources"]
    assert {name: facts["read"] for name, facts in sources.items()} == corpus.records
    for facts in sources.values():
        assert facts["read"] == facts["kept"] + sum(facts["rejected"].values())


def told(row: Row) -> tuple[Any, ...]:
    return row["source"], row["query_lang"], row["query"], tuple(row["positives"]), row["label"]


def test_the_rows_left_are_those_that_nothing_is_wrong_with(corpus: Corpus, straight: Run) -> None:
    planned = [row for row in corpus.rows if not row.fate]
    mined = rows_of(straight.out / "mined")
    assert Counter(map(told, mined)) == Counter(
        (row.source, row.lang, row.query, row.positives, row.label) for row in planned
    )
    for stage in ("clean", "unseen"):
        found = Counter((*told(row)[:4], row["reason"]) for row in rejects_of(straight.out / stage))
        assert found == Counter(
            (row.source, row.lang, row.query, row.positives, row.fate.reason)
            for row in corpus.rejected_by(stage)
            if row.fate
        )


def test_mined_negatives_are_other_documents_of_the_source(corpus: Corpus, straight: Run) -> None:
    planned = {(row.query, row.positives): row.negatives for row in corpus.rows if not row.fate}
    unseen, mined = (rows_of(straight.out / stage) for stage in ("unseen", "mined"))
    documents: defaultdict[str, set[str]] = defaultdict(set)
    right: defaultdict[tuple[str, str, str | None], set[str]] = defaultdict(set)
    for row in unseen:
        if row["positives"]:
            documents[row["source"]].update(row["positives"], row["negatives"])
        for key in ("query", "label"):
            right[row["source"], key, row[key]].update(row["positives"])
    for before, row in zip(unseen, mined, strict=True):
        given = list(planned[row["query"], tuple(row["positives"])])
        assert before["negatives"] == given == row["negatives"][: len(given)]
        found = row["negatives"][len(given) :]
        source, query, label = row["source"], row["query"], row["label"]
        others = documents[source] - {query, *given} - right[source, "query", query]
        others -= right[source, "label", label] if label else set()
        assert others.issuperset(found)
        assert len(set(found)) == len(found) == min(CANDIDATES, len(others))


def test_the_store_says_what_the_mined_rows_say(straight: Run, model_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    store = open_store(straight.out / "store")
    store.verify()
    ids = store.tokens(range(len(store)))
    # The tokenizer puts a space before every text.
    texts = [tokenizer.decode(text.tolist(), skip_special_tokens=True).removeprefix(" ") for text in ids]
    assert len(set(texts)) == len(texts)
    instructions = {source.name: source.instruction for source in store.sources}
    mined = rows_of(straight.out / "mined")
    assert store.row_count == len(mined)
    rows = store.rows(range(store.row_count))
    for place, row in enumerate(mined):
        assert texts[rows.query[place]] == row["query"]
        asked = f"Instruct: {instructions[row['source']]}\nQuery: {row['query']}"
        assert texts[rows.query_asked[place]] == asked
        assert [texts[number] for number in rows.positives[place]] == row["positives"]
        assert [texts[number] for number in rows.negatives[place]] == row["negatives"]
        label = rows.label[place]
        assert (None if label == NO_LABEL else texts[label]) == row["label"]
        assert store.sources[rows.source[place]].name == row["source"]
        assert store.languages[rows.query_lang[place]] == row["query_lang"]
        assert f"{rows.hash[place]:016x}" == row["hash"]


def test_nothing_is_left_of_the_work(straight: Run) -> None:
    names = {path.name for path in straight.out.rglob("*")}
    assert not names & {"work", "spool", "held_out", "started.json"}
    assert not [name for name in names if name.endswith(".tmp") or name.startswith("numbering")]
    assert all("done already" in line for line in straight.finish().splitlines())


# --- Who works on it


@pytest.mark.slow
def test_workers_change_nothing(straight: Run, another: Run) -> None:
    another.finish("--workers", "2")
    assert another.contents() == straight.contents()


@pytest.mark.slow
def test_ray_changes_nothing(straight: Run, another: Run) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    another.finish("--engine", "ray", "--workers", "2")
    assert another.contents() == straight.contents()


# --- Kills

MOMENTS = (
    "rows/done/00002-00001.json",
    "rows/spool/*/text",
    "clean/work/cleaned/done/00003.json",
    "clean/work/duplicates/parts/00002/starts.npy",
    "clean/rows.parquet/part-00001.parquet",
    "unseen/held_out/*",
    "unseen/done/00002.json",
    "mined/work/parts/00001/facts.json",
    "mined/work/done/vectors-000000.json",
    "mined/work/pools/00001/found-000000.npz",
    "mined/done/00001.json",
    "store/hashes/00002.json",
    "store/part-00003.bin",
    "store/store.json",
)
"""Files of a run, each of which appears in the midst of the work of a stage."""


@pytest.mark.slow
def test_kills_with_workers_change_nothing(straight: Run, another: Run) -> None:
    killed = 0
    for moment in MOMENTS:
        process = another.start("--workers", "2")
        while process.poll() is None and not any(another.out.glob(moment)):
            time.sleep(0.001)
        process.kill()
        said = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), said
        killed += process.returncode != 0
    assert killed > len(MOMENTS) // 2  # the others came too late
    another.finish("--workers", "2")
    assert another.contents() == straight.contents()


CHANGES = ("replace", "rename", "unlink", "rmdir")  # functions of `os` by which a folder changes
MOST_CHANGES = 64  # from one kill to the next; what is made as a whole takes about 30


def run_until(recipe: Path, changes: int) -> None:
    """Run a recipe in this process, which dies before it makes the last of so many changes to folders."""
    left = changes

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def change(*args: Any, **keywords: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            function(*args, **keywords)

        return change

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    with using(Engine(workers=1)):
        pipeline.run(load(recipe), recipe)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_kills_before_any_change_change_nothing(
    straight: Run, another: Run, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Children are forks of a process that has imported all this and done nothing, so a start takes no time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_corpus", "f2llm.mine.mining", "f2llm.data.token_store_build"])
    rng = random.Random(seed)
    killed: list[str] = []
    while not killed or killed[-1]:
        child = context.Process(target=run_until, args=(another.recipe, rng.randrange(1, MOST_CHANGES)))
        child.start()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        at_work = (stage for stage in STAGES if (another.out / stage / "started.json").exists())
        killed.append(next(at_work, "between stages") if child.exitcode else "")
    assert set(STAGES).issubset(killed) and len(killed) > 12
    assert another.contents() == straight.contents()
