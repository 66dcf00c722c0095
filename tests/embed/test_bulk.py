"""Bulk encoding: each format has the library's vectors and says what made them; killed and started again it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm.embed import bulk
from f2llm.embed.bulk import Done, Job, embed_file
from f2llm.embed.embedder import Embedder
from f2llm.engine import Engine
from f2llm.errors import F2Error, UsageError

TEXTS = [f"text {n} " + "a " * (n % 3) for n in range(50)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PART_TEXTS", 8)


def read(output: Path) -> tuple[list[str] | None, np.ndarray, dict[str, object]]:
    """Texts, vectors and what made them."""
    if output.suffix == ".npy":
        return None, np.load(output), json.loads(Path(f"{output}.json").read_text(encoding="utf-8"))
    if output.suffix == ".lance":
        import lancedb

        table: pa.Table = lancedb.connect(output.parent).open_table(output.stem).to_arrow()
    else:
        table = pq.read_table(output)
    made = json.loads(table.schema.metadata[b"f2llm"])
    return table["text"].to_pylist(), np.array(table["vector"].to_pylist(), dtype=np.float32), made


@pytest.mark.parametrize("name", ["v.npy", "v.parquet", "v.lance"])
def test_every_format_has_the_vectors_of_the_library(name: str, model_folder: Path, tmp_path: Path) -> None:
    embedder = Embedder(model_folder)
    done = embed_file(Job(str(model_folder), prompt="query", dim=8), iter(TEXTS), tmp_path / name)
    texts, vectors_ND, made = read(tmp_path / name)
    assert done == Done(50, 0)
    assert texts in (None, TEXTS)
    np.testing.assert_allclose(vectors_ND, embedder.encode(TEXTS, prompt="query", dim=8), atol=1e-6)
    assert made["identity"] == embedder.identity
    assert made["prompt"] == embedder.prefix("query", None)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_parts_that_are_done_are_not_done_again(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails at its fourth part; then one text of the second part is another one."""
    computed: list[int] = []
    encode = Embedder.encode_part

    def failing(
        self: Embedder, texts: list[str], *, first: int = 0, **asked: object
    ) -> tuple[np.ndarray, int]:
        if first == 24 and not computed.count(24):
            computed.append(first)
            raise F2Error("no more")
        computed.append(first)
        return encode(self, texts, first=first, **asked)  # type: ignore[arg-type]

    monkeypatch.setattr(Embedder, "encode_part", failing)
    job, output = Job(str(model_folder)), tmp_path / "v.npy"
    with pytest.raises(F2Error, match="no more"):
        embed_file(job, TEXTS, output)
    assert not output.exists()
    changed = [*TEXTS[:9], "another one", *TEXTS[10:]]
    embed_file(job, changed, output)
    assert computed == [0, 8, 16, 24, 8, 24, 32, 40, 48]
    np.testing.assert_allclose(np.load(output), Embedder(model_folder).encode(changed), atol=1e-6)


def test_parts_of_another_model_or_size_are_not_used(model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "v.npy"

    def texts_that_end() -> list[str]:
        raise F2Error("stopped")

    with pytest.raises(UsageError, match="dim is 999"):
        embed_file(Job(str(model_folder), dim=999), texts_that_end, output)  # type: ignore[arg-type]
    work = tmp_path / ".v.npy.parts"
    parts = list(bulk._cut_into_parts(Job(str(model_folder)), TEXTS, _made(work), {"dim": 16}))
    again = list(bulk._cut_into_parts(Job(str(model_folder)), TEXTS, work, {"dim": 8}))
    assert not {part.name for part in parts} & {part.name for part in again}
    assert not [part for part in parts if part.texts.exists()]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_texts_that_are_cut_are_counted(model_folder: Path, tmp_path: Path) -> None:
    long = ["word " * 5000, *TEXTS, "word " * 5000]
    job = Job(str(model_folder), too_long="truncate")
    assert embed_file(job, long, tmp_path / "v.parquet") == Done(52, 2)
    with pytest.raises(UsageError, match="text 50"):
        embed_file(Job(str(model_folder)), long[1:], tmp_path / "w.parquet")


def test_what_is_there_or_cannot_be_written_is_told(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "v.lance").mkdir()
    job = Job(str(model_folder))
    for name, says in {"v.lance": "there already", "v.csv": "expected .npy, .parquet, .lance"}.items():
        with pytest.raises(UsageError, match=says):
            embed_file(job, TEXTS, tmp_path / name)
    with pytest.raises(UsageError, match="no texts"):
        embed_file(job, [], tmp_path / "v.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.lance"]


def test_a_damaged_part_is_named(model_folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "part.vectors"
    bulk._write(whole, pa.table({"text": ["a" * 1000]}))
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(F2Error, match=r"part\.vectors is damaged"):
        bulk._read(whole)


def test_worker_processes_give_the_same_vectors(model_folder: Path, tmp_path: Path) -> None:
    job = Job(str(model_folder))
    embed_file(job, TEXTS, tmp_path / "alone.npy")
    embed_file(job, TEXTS, tmp_path / "two.npy", Engine(workers=2))
    np.testing.assert_allclose(np.load(tmp_path / "alone.npy"), np.load(tmp_path / "two.npy"), atol=1e-6)


@pytest.mark.slow
def test_ray_gives_the_same_vectors(model_folder: Path, tmp_path: Path) -> None:
    job = Job(str(model_folder))
    embed_file(job, TEXTS, tmp_path / "alone.npy")
    embed_file(job, TEXTS, tmp_path / "ray.npy", Engine("ray", workers=2))
    np.testing.assert_allclose(np.load(tmp_path / "alone.npy"), np.load(tmp_path / "ray.npy"), atol=1e-6)


def test_killed_it_goes_on(model_folder: Path, tmp_path: Path) -> None:
    """Kill -9 after the first part is there; the second run keeps its file."""
    output, work = tmp_path / "v.npy", tmp_path / ".v.npy.parts"
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(f"{text} {n}" for n in range(400) for text in TEXTS), encoding="utf-8")
    command = [sys.executable, "-c", "from f2llm.cli import main; main()"]
    command += ["embed", str(model_folder), str(lines), "-o", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (kept := list(work.glob("000000-*.vectors"))) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    written = kept[0].stat().st_ino
    job = Job(str(model_folder))
    original = bulk.PART_TEXTS
    bulk.PART_TEXTS = 4096
    try:
        parts = list(
            bulk._cut_into_parts(job, lines.read_text(encoding="utf-8").split("\n"), work, bulk._made_by(job))
        )
        assert parts[0].vectors.stat().st_ino == written
    finally:
        bulk.PART_TEXTS = original
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert len(np.load(output)) == 20_000
