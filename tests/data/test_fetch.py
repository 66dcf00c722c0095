"""Fetching: however often it is stopped, the raw rows are the source's, each once, in order, of one revision."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.hub_server import Hub, serving_hub

from f2llm.data import fetch as fetching
from f2llm.data import hub
from f2llm.data.fetch import fetch, settle
from f2llm.data.hub import Rows
from f2llm.data.importing import sources_stage
from f2llm.data.propose import propose
from f2llm.data.records import UNKNOWN, Columns, SourceRecord, read_record, write_record
from f2llm.data.rows import read_rows
from f2llm.errors import F2Error, UsageError
from f2llm.recipe_corpus import SourcesStage

REVISIONS = ("a" * 40, "b" * 40)
CARD = """\
---
license: cc-by-4.0
configs:
- config_name: {configs[0]}
  data_files: [{{split: train, path: "data/train-*.parquet"}}]
- config_name: {configs[1]}
  data_files: [{{split: test, path: "data/train-*.parquet"}}]
---
"""


def record(**changes: Any) -> SourceRecord:
    facts = {
        "name": "pairs",
        "title": "Pairs",
        "task": "question answering",
        "format": "retrieval",
        "symmetric": False,
        "instruction": "Find it",
        "columns": UNKNOWN,
        "languages": ["eng"],
        "location": "huggingface.co/datasets/own/pairs",
    }
    return SourceRecord.model_validate(facts | changes)


def rows(first: int, count: int) -> pa.Table:
    numbers = range(first, first + count)
    columns = {
        "id": list(numbers),
        "question": [f"q{n}" for n in numbers],
        "answer": [f"a{n}" for n in numbers],
    }
    return pa.table(columns)


ALL = rows(0, 1000)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset as the hub has them: files of unequal size, in groups."""
    folder = tmp_path_factory.mktemp("dataset")
    for number, (first, count) in enumerate([(0, 333), (333, 1), (334, 666)]):
        pq.write_table(rows(first, count), folder / f"train-{number:05}.parquet", row_group_size=70)
    return folder


class Local:
    """Stands in for the hub: opens local files with the library, and notes which revision was asked for."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.revisions: list[str | None] = []
        self.breaks_after: int | None = None

    def open(self, record: SourceRecord, name: str, revision: str | None) -> Rows:
        self.revisions.append(revision)
        stream = datasets.load_dataset(
            str(self.folder), split=record.split, streaming=True, cache_dir=str(self.cache)
        )
        if self.breaks_after is not None:
            stream = stream.map(self.breaking, features=stream.features)
        names = {"answer": {"0": "no"}}
        return Rows(stream, revision or f"revision {len(self.revisions)}", "cc0-1.0", None, names)

    def breaking(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == self.breaks_after:
            raise ConnectionError("the line is dead")
        return row


@pytest.fixture
def local(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Local:
    """A hub without a network; parts have 100 rows."""
    local = Local(dataset, tmp_path / "cache")
    monkeypatch.setattr(fetching, "open_rows", local.open)
    monkeypatch.setattr(hub, "ROWS_IN_A_GROUP", 100)
    monkeypatch.setattr(hub, "BATCH", 10)
    return local


def raw(folder: Path) -> pa.Table:
    """All raw rows in the order of the parts."""
    files = sorted((folder / "raw").glob("*.parquet"))
    assert [file.name for file in files] == [f"part-{number:05}.parquet" for number in range(len(files))]
    return pa.concat_tables([pq.read_table(file) for file in files])


def test_rows_come_as_they_are_in_parts(local: Local, tmp_path: Path) -> None:
    fetched = fetch(record(), tmp_path)
    assert raw(tmp_path / "pairs").equals(ALL)
    sizes = [pq.read_metadata(file).num_rows for file in sorted((tmp_path / "pairs/raw").iterdir())]
    assert sizes == [100] * 10
    assert fetched.sample.equals(ALL.slice(0, 3))
    fetch(record(), tmp_path)
    assert local.revisions == [None]  # all is here, so nobody is asked


class Killed(BaseException):
    pass


@pytest.mark.parametrize("writer", ["write_table", "write_json"])
def test_killed_at_any_write_and_started_again(
    local: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    real: Callable[..., None] = getattr(fetching, writer)
    calls = 0

    def write(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise Killed
        real(*arguments)

    monkeypatch.setattr(fetching, writer, write)
    kills = 0
    while True:
        try:
            fetch(record(), tmp_path)
            break
        except Killed:
            kills += 1
    assert kills >= 9
    assert raw(tmp_path / "pairs").equals(ALL)
    # What was begun in one revision is gone on with in that.
    assert local.revisions == [None] + ["revision 1"] * kills


def test_a_part_that_the_state_does_not_know_is_not_kept(local: Local, tmp_path: Path) -> None:
    fetch(record(), tmp_path, limit=100)
    stray = tmp_path / "pairs" / "raw" / "part-00007.parquet"
    pq.write_table(rows(5000, 5), stray)
    fetch(record(), tmp_path, limit=150)
    assert not stray.exists()
    assert raw(tmp_path / "pairs").equals(ALL.slice(0, 150))


def test_limits_are_gone_beyond(local: Local, tmp_path: Path) -> None:
    for limit, expected in [(30, 30), (20, 30), (345, 345), (1000, 1000), (None, 1000), (2000, 1000)]:
        fetch(record(), tmp_path, limit=limit)
        assert raw(tmp_path / "pairs").equals(ALL.slice(0, expected)), limit


def test_a_broken_connection_is_one_sentence_and_costs_no_finished_part(local: Local, tmp_path: Path) -> None:
    local.breaks_after = 456
    with pytest.raises(
        F2Error, match=r"pairs stopped after 400 rows \(ConnectionError: the line is dead\), which are kept"
    ):
        fetch(record(), tmp_path)
    assert raw(tmp_path / "pairs").equals(ALL.slice(0, 400))
    local.breaks_after = None
    fetch(record(), tmp_path)
    assert raw(tmp_path / "pairs").equals(ALL)


def test_long_rows_make_short_parts(local: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PART_BYTES", rows(0, 40).nbytes)
    fetch(record(), tmp_path)
    assert len(list((tmp_path / "pairs" / "raw").iterdir())) > 20
    assert raw(tmp_path / "pairs").equals(ALL)


def test_files_that_differ_in_types_are_one_sentence(tmp_path: Path, local: Local) -> None:
    local.folder = tmp_path / "csv"
    local.folder.mkdir()
    (local.folder / "train-0.csv").write_text("question,answer\nq,1\n")
    (local.folder / "train-1.csv").write_text("question,answer\nq,one\n")
    with pytest.raises(UsageError, match="rows differ in the types of their columns; download it by hand"):
        fetch(record(), tmp_path)


def test_one_folder_holds_one_thing(local: Local, tmp_path: Path) -> None:
    fetch(record(), tmp_path, limit=5)
    with pytest.raises(
        UsageError, match="holds rows of the location 'huggingface.co/datasets/own/pairs', not"
    ):
        fetch(record(location="huggingface.co/datasets/own/other"), tmp_path)
    with pytest.raises(
        UsageError, match="holds rows of the split 'train', not of 'test'; give another folder"
    ):
        fetch(record(), tmp_path, split="test")
    assert fetch(record(), tmp_path, config="En/de", limit=5).folder.name == "pairs.en-de"


# --- The record


def test_the_record_has_what_was_found_out(local: Local, tmp_path: Path) -> None:
    fetched = fetch(record(), tmp_path)
    settled = read_record(settle(fetched, fetched.proposal))
    assert settled.columns == Columns(query="question", positive="answer", negatives=None, lang=None)
    assert (settled.revision, settled.licence) == ("revision 1", "cc0-1.0")
    assert {"revision", "licence", "columns"} <= settled.from_.keys()
    assert (settled.query_lang, settled.positive_lang, settled.label_names) == ("eng", "eng", {})
    files = list((tmp_path / "pairs").glob(settled.files[0]))
    assert sorted(files) == sorted((tmp_path / "pairs" / "raw").iterdir())


def test_a_licence_that_is_known_stays(local: Local, tmp_path: Path) -> None:
    fetched = fetch(record(licence="MIT", **{"from": {"licence": "a lawyer"}}), tmp_path)
    settled = read_record(settle(fetched, None))
    assert (settled.licence, settled.from_["licence"]) == ("MIT", "a lawyer")


def test_label_names_are_those_of_the_column_that_is_read(local: Local, tmp_path: Path) -> None:
    labelled = record(format="clustering")
    fetched = fetch(labelled, tmp_path)
    assert fetched.proposal is None
    proposal = propose(pa.schema({"text": pa.string(), "label": pa.int64()}), "clustering")
    assert proposal
    fetched = fetched._replace(label_names={"label": {"0": "bad", "1": "good"}, "id": {"0": "x"}})
    assert read_record(settle(fetched, proposal)).label_names == {"0": "bad", "1": "good"}


def test_a_record_that_somebody_mended_is_left_alone(local: Local, tmp_path: Path) -> None:
    fetched = fetch(record(), tmp_path, limit=50)
    path = settle(fetched, None)
    assert read_record(path).columns == UNKNOWN
    mended = read_record(path).model_copy(update={"columns": Columns(query="answer", positive="question")})
    write_record(path, mended)
    path.write_text("# mine\n" + path.read_text())
    again = fetch(record(), tmp_path, limit=60)
    assert again.is_settled
    assert again.proposal is None
    assert settle(again, None).read_text().startswith("# mine\n")
    assert read_record(path) == mended


def test_what_is_fetched_can_be_imported(local: Local, tmp_path: Path) -> None:
    fetched = fetch(record(), tmp_path / "fetched", limit=250)
    settle(fetched, fetched.proposal)
    config = SourcesStage(stage="sources", records=[str(tmp_path / "fetched")])
    sources_stage(config, tmp_path / "rows", seed=0)
    table, (source,) = read_rows(tmp_path / "rows")
    assert sorted(table["query"].to_pylist()) == sorted(f"q{n}" for n in range(250))
    assert all(row["positives"] == [row["query"].replace("q", "a")] for row in table.to_pylist())
    assert (source.name, source.licence, source.languages) == ("pairs", "cc0-1.0", ["eng"])


# --- Other places


@pytest.mark.parametrize(
    "location",
    ["github.com/own/pairs", "https://example.org/page.html", "https://example.org/rows.tar.gz", None],
)
def test_pages_cannot_be_fetched(tmp_path: Path, location: str | None) -> None:
    with pytest.raises(UsageError, match="download it by hand and write a record of it with 'files'"):
        fetch(record(location=location), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_plain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the network may do to it is in test_download.py.
    def download(url: str, path: Path) -> None:
        assert url == "https://example.org/a/pairs.jsonl?download=1"
        path.parent.mkdir(parents=True)
        path.write_text('{"query": "q", "answer": "a"}\n')

    monkeypatch.setattr(fetching, "download", download)
    fetched = fetch(record(location="https://example.org/a/pairs.jsonl?download=1"), tmp_path)
    settled = read_record(settle(fetched, fetched.proposal))
    assert settled.files == ["raw/pairs.jsonl"]
    assert settled.columns == Columns(query="query", positive="answer", negatives=None, lang=None)
    digest = subprocess.run(
        ["sha256sum", tmp_path / "pairs/raw/pairs.jsonl"], capture_output=True, text=True, check=True
    )
    assert settled.revision == f"sha256:{digest.stdout.split()[0]}"


# --- The hub itself, as a server on this machine: the library reads its address once, when it is imported

SCRIPT = """
import sys
from pathlib import Path
from f2llm.data.fetch import fetch, settle
from f2llm.data.records import read_record
from f2llm.errors import F2Error

for arguments in sys.argv[2:]:
    name, config, split, limit = arguments.split(",")
    record = read_record(Path(name + ".yaml"))
    try:
        fetched = fetch(
            record, Path(sys.argv[1]), config=config or None, split=split or None, limit=int(limit) if limit else None
        )
        settle(fetched, fetched.proposal)
        print("done")
    except F2Error as error:
        print(type(error).__name__, error)
"""


def fetch_in_process(folder: Path, *calls: str, **environment: str) -> list[str]:
    """A line for each call: done, or the error."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "out", *calls],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_DOWNLOAD_TIMEOUT": "2", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def served(dataset: Path, tmp_path: Path) -> Iterator[Hub]:
    root = tmp_path / "hub"
    for name, configs in (
        ("pairs", ("default", "other")),
        ("many", ("ar-en", "ar-fr")),
        ("gated", ("a", "b")),
    ):
        for revision in REVISIONS:
            folder = root / "own" / name / revision
            (folder / "data").mkdir(parents=True)
            (folder / "README.md").write_text(CARD.format(configs=configs))
            for file in dataset.iterdir():
                table = pq.read_table(file)
                if revision == REVISIONS[1]:
                    table = table.set_column(0, "id", pa.array([-1] * len(table)))
                pq.write_table(table, folder / "data" / file.name, row_group_size=70)
    (root / "own" / "script" / REVISIONS[0]).mkdir(parents=True)
    (root / "own" / "script" / REVISIONS[0] / "README.md").write_text("---\nlicense: mit\n---\n")
    (root / "own" / "script" / REVISIONS[0] / "script.py").write_text(
        "raise SystemExit('a stranger ran this')\n"
    )
    for name in ("pairs", "many", "gated", "script", "none"):
        write_record(
            tmp_path / f"{name}.yaml", record(name=name, location=f"huggingface.co/datasets/own/{name}")
        )
    with serving_hub(root, REVISIONS[0]) as running:
        running.gated.add("own/gated")
        yield running


def test_a_fetch_from_a_hub_stays_with_its_revision(served: Hub, tmp_path: Path) -> None:
    assert fetch_in_process(tmp_path, "pairs,,,400", HF_ENDPOINT=served.address) == ["done"]
    served.newest = REVISIONS[1]
    assert (
        fetch_in_process(tmp_path, "pairs,,,", "many,ar-fr,test,5", HF_ENDPOINT=served.address)
        == ["done"] * 2
    )
    assert raw(tmp_path / "out" / "pairs").equals(ALL)
    settled = read_record(tmp_path / "out" / "pairs" / "record.yaml")
    assert (settled.revision, settled.licence) == (REVISIONS[0], "cc-by-4.0")
    newer = read_record(tmp_path / "out" / "many.ar-fr" / "record.yaml")
    assert (newer.revision, newer.config, newer.split) == (REVISIONS[1], "ar-fr", "test")
    assert raw(tmp_path / "out" / "many.ar-fr")["id"].to_pylist() == [-1] * 5


def test_what_a_hub_refuses_is_one_sentence(served: Hub, tmp_path: Path) -> None:
    calls = {
        "none,,,": "UsageError the hub has no public dataset own/none; correct 'location'",
        "many,,,": "UsageError own/many has no configuration 'of its own choice'; give one with --config: ar-en, ar-fr",
        "many,de-fr,,": "UsageError own/many has no configuration 'de-fr'; give one with --config: ar-en, ar-fr",
        "pairs,,validation,": "UsageError own/pairs has no split 'validation'; give one with --split: train",
        "gated,,,": "UsageError own/gated asks for an agreement; accept it at https://huggingface.co/",
        "script,,,": "UsageError own/script cannot be read as it is on the hub",
    }
    lines = fetch_in_process(tmp_path, *calls, HF_ENDPOINT=served.address)
    for line, says in zip(lines, calls.values(), strict=True):
        assert line.startswith(says)


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:1"}])
def test_offline_is_one_sentence(tmp_path: Path, environment: dict[str, str]) -> None:
    write_record(tmp_path / "pairs.yaml", record())
    (line,) = fetch_in_process(tmp_path, "pairs,,,", **environment)
    assert line.startswith("F2Error the hub, which has own/pairs, cannot be reached (")
    assert "mend the connection" in line
