"""A corpus from its sources to a token store, by the real command: every row accounted for, whatever interrupts it."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tests.corpus_folder import MOST_CHARACTERS, Corpus, add_source, make_corpus
from tokenizers import Tokenizer

from f2llm import pipeline
from f2llm.data.importing import sources_stage
from f2llm.data.rows import read_rows
from f2llm.data.token_store import open_store
from f2llm.data.token_store_format import NO_LABEL
from f2llm.engine import Engine, using
from f2llm.files import read_json, sha256_file
from f2llm.recipe import load
from f2llm.recipe_corpus import SourcesStage

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

    def killed_at(self, moment: str, *options: str) -> str:
        """Run it until there is this file; what it said."""
        process = self.start(*options)
        while process.poll() is None and not (self.out / moment).exists():
            time.sleep(0.001)
        process.kill()
        said = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, f"{moment} did not come: {said}"
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
    by_source = Counter[str]()
    for (source, _), rows in kept.items():
        by_source[source] += rows
    assert {one["name"]: one["rows"] for one in read_json(folder / "sources.json")} == by_source
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


def test_what_the_stages_say_of_themselves_adds_up(corpus: Corpus, straight: Run) -> None:
    facts = {stage: read_json(straight.out / stage / "manifest.json")["facts"] for stage in STAGES}
    read, clean, unseen = (corpus.kept_after(*STAGES[:number]).total() for number in (1, 2, 3))
    assert (facts["clean"]["read"], facts["clean"]["kept"]) == (read, clean)
    assert sum(facts["clean"]["dropped"].values()) == read - clean
    assert (facts["unseen"]["rows"], facts["unseen"]["contaminated"]) == (unseen, clean - unseen)
    assert facts["mined"]["rows"] == facts["store"]["rows"] == unseen
    sources = facts["rows"]["sources"]
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


# --- One more source

MORE = """\
  rows2: {{stage: sources, records: [{folder}/more]}}
  clean2: {{stage: clean, data: [rows2], duplicates: near, language_check: report}}
  unseen2: {{stage: decontaminate, data: [clean2], against: [{folder}/held_out]}}
  mined2: {{stage: mine, data: [unseen2], model: {model}/, candidates: 4, relative_margin: null, samples: 2}}
  store: {{stage: tokenise, data: [mined, mined2], tokenizer: {model}/}}
"""


FIRST, GROWN = "part-00000.bin", "going on with more data"


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files these are, and when they were written."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("part-*.bin")}


SMALL = """\
name: small
output: {folder}/run
stages:
  a: {{stage: files, files: [{folder}/a.tsv], format: retrieval, task: t, instruction: Find it}}
  b: {{stage: files, files: [{folder}/b.tsv], format: retrieval, task: t, instruction: Find it}}
  store: {{stage: tokenise, data: [a], tokenizer: {model}/}}
"""


def test_a_store_is_kept_only_for_data_behind_its_own(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "summarise", lambda *_: None)  # the report says nothing of what is kept
    recipe, store = tmp_path / "recipe.yaml", tmp_path / "run" / "store"

    def run(change: Callable[[], object]) -> bool:
        """Whether a run after the change keeps the first part of the store."""
        change()
        before = states(store).get(FIRST)
        with using(Engine(workers=1)):
            pipeline.run(load(recipe), recipe)
        is_kept = states(store)[FIRST] == before
        assert (f"store: {GROWN}" in capsys.readouterr().err) == is_kept
        return is_kept

    def data(old: str, new: str) -> Callable[[], object]:
        return lambda: recipe.write_text(recipe.read_text().replace(f"data: [{old}]", f"data: [{new}]"))

    for name in "ab":
        (tmp_path / f"{name}.tsv").write_text(f"query\tpositive\n{name} one\t{name} two\n")
    recipe.write_text(SMALL.format(folder=tmp_path, model=model_folder))
    assert not run(lambda: None)
    assert run(data("a", "a, b"))
    assert not run(data("a, b", "b, a"))  # others first
    assert not run(data("b, a", "b"))  # less
    assert run(data("b", "b, a"))
    assert not run(lambda: (tmp_path / "b.tsv").write_text("query\tpositive\nnew\trows\n"))
    assert not run(data("b, a", "b"))
    assert not run(lambda: ((store / FIRST).write_bytes(b"damaged"), data("b", "b, a")()))
    assert [text.tolist() for text in open_store(store).tokens([0])] == [
        Tokenizer.from_file(str(model_folder / "tokenizer.json")).encode("new").ids
    ]


@pytest.mark.slow
def test_a_store_grows_by_a_source_and_keeps_what_it_has(
    corpus: Corpus, straight: Run, another: Run, model_folder: Path, tmp_path: Path
) -> None:
    add_source(corpus.folder / "more")
    recipe = another.recipe.read_text()
    more = MORE.format(folder=corpus.folder, model=model_folder)
    another.recipe.write_text(recipe[: recipe.index("  store:")] + more)
    shutil.copytree(straight.out, another.out)
    parts = states(another.out / "store")
    said = another.killed_at(f"store/hashes/{len(parts):05}.json")
    assert [stage for stage in STAGES if f"{stage}: done already" in said] == list(STAGES[:4])
    assert f"store: {GROWN}" in said
    another.finish("--workers", "1")
    now = states(another.out / "store")
    assert len(now) == len(parts) + 1 and parts.items() < now.items()

    (tmp_path / "at once").mkdir()
    fresh = Run(tmp_path / "at once" / "recipe.yaml", tmp_path / "at once" / "run")
    fresh.recipe.write_text(another.recipe.read_text().replace(str(another.out), str(fresh.out)))
    fresh.finish("--workers", "1")
    assert another.contents() == fresh.contents()


@pytest.mark.slow
def test_a_record_added_last_leaves_the_parts_of_the_others_as_they_are(
    corpus: Corpus, straight: Run, model_folder: Path, tmp_path: Path
) -> None:
    """What is made again for it comes out as it was: no row, text or number depends on what comes behind."""
    grown = Corpus(tmp_path / "corpus")
    shutil.copytree(corpus.folder, grown.folder)
    add_source(tmp_path / "more")
    (tmp_path / "more" / "more.yml").rename(grown.folder / "records" / "zulu.yml")
    (tmp_path / "more" / "more.jsonl").rename(grown.folder / "data" / "more.jsonl")
    run = make_run(grown, model_folder, tmp_path)
    run.finish("--workers", "1")
    before, now = straight.contents(), run.contents()
    parts = [path for path in before if Path(path).name.startswith("part-")]
    assert len(parts) > 6 * len(STAGES)
    assert {path: now[path] for path in parts} == {path: before[path] for path in parts}
    assert len(rows_of(run.out / "mined")) == len(rows_of(straight.out / "mined")) + 12


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
    "rows/done/00002-00000.json",
    "clean/work/cleaned/done/00003.json",
    "clean/rows.parquet/part-00001.parquet",
    "unseen/done/00002.json",
    "mined/work/parts/00001/facts.json",
    "mined/work/pools/00001/found-000000.npz",
    "store/hashes/00002.json",
    "store/part-00003.bin",
)
"""Files of a run, each of which appears in the midst of the work of a stage."""


@pytest.mark.slow
def test_kills_with_workers_change_nothing(straight: Run, another: Run) -> None:
    for moment in MOMENTS:
        another.killed_at(moment, "--workers", "2")
    another.finish("--workers", "2")
    assert another.contents() == straight.contents()


CHANGES = ("replace", "rename", "unlink", "rmdir")  # functions of `os` by which a folder changes
MOST_CHANGES = (16, 128)  # from one kill to the next; the largest thing that is made as a whole takes 80


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
        child = context.Process(
            target=run_until, args=(another.recipe, rng.randrange(1, rng.choice(MOST_CHANGES)))
        )
        child.start()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        at_work = (stage for stage in STAGES if (another.out / stage / "started.json").exists())
        killed.append(next(at_work, "between stages") if child.exitcode else "")
    assert len(set(STAGES).intersection(killed)) >= 3 and len(killed) > 5  # or it would be no test
    assert another.contents() == straight.contents()


# --- Real text

LIMIT = 40


@pytest.mark.slow
def test_records_of_the_demo_read_the_development_data(shared: Path, tmp_path: Path) -> None:
    """The texts of every row stand in one record of the source's file, whose columns are read here by their names."""
    demo = Path(__file__).parents[1] / "recipes" / "corpus-demo"
    config = SourcesStage(stage="sources", records=[str(demo)], root=str(shared / "data"), limit=LIMIT)
    with using(Engine(workers=1)):
        facts = sources_stage(config, tmp_path, 1)["sources"]
    rows: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows_of(tmp_path):
        rows[row["source"]].append(row)
    files = {
        source["name"]: shared / "data" / source["files"][0]
        for path in demo.glob("*.yml")
        for source in yaml.safe_load(path.read_text())["sources"]
    }
    assert facts.keys() == files.keys() == rows.keys()
    assert {str(file) for file in files.values()} == {
        str(path) for path in (shared / "data").rglob("*.parquet")
    }
    for name, file in files.items():
        read, kept, rejected = (facts[name][key] for key in ("read", "kept", "rejected"))
        table = pq.read_table(file)
        assert read == kept + sum(rejected.values()), name
        assert read == (table.num_rows if "id" in table.column_names else min(LIMIT, table.num_rows)), name
        assert 0 < len(rows[name]) == facts[name]["rows"] <= LIMIT, name
        left, right = (places(table, names) for names in LEFT_AND_RIGHT)
        for row in rows[name]:
            for text in row["positives"] or [row["label"]]:
                assert left[row["query"]] & right[text], name


LEFT_AND_RIGHT = (("query", "sentence1", "text"), ("positive", "sentence2", "label", "text"))


def places(table: pa.Table, names: tuple[str, ...]) -> dict[str, set[Any]]:
    """Of each text in the first of these columns, in which records it stands, by number or by id."""
    column = next(name for name in names if name in table.column_names)
    found = defaultdict(set)
    numbers = table["id"].to_pylist() if "id" in table.column_names else range(table.num_rows)
    for text, number in zip(table[column].to_pylist(), numbers, strict=True):
        found[text].add(number)
    return found
