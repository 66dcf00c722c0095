"""The command as a user types it: exit codes, one sentence for each mistake, and output that scripts can read."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from f2llm.embed.embedder import Embedder

TEXTS = ["Germany", "", "Allemagne", "日本", "नमस्ते"]


def f2llm(*arguments: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from f2llm.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, text=True, encoding="utf-8", check=False)


@pytest.fixture(scope="module")
def lines_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("".join(text + "\n" for text in TEXTS), encoding="utf-8")
    return path


def wrong_uses(model: Path, folder: Path) -> dict[str, tuple[list[str | Path], int, str]]:
    """Command line, exit code, and what the sentence must say."""
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n', encoding="utf-8")
    (folder / "empty.yaml").write_text("name: x\noutput: y\nstagse: {}\n", encoding="utf-8")
    return {
        "no such verb": (["serch"], 2, "search"),
        "no such recipe": (["run", folder / "none.yaml"], 2, "none.yaml"),
        "a key that is not one": (["run", folder / "empty.yaml"], 2, "empty.yaml:3: unknown key 'stagse'"),
        "not a model": (["embed", folder, folder / "bad.jsonl"], 1, "config.json is missing"),
        "no such file": (["embed", model, folder / "none.txt"], 2, "none.txt is missing"),
        "a row without text": (["embed", model, folder / "bad.jsonl"], 2, "bad.jsonl, line 2, column 'text'"),
        "a size too large": (["embed", model, folder / "bad.jsonl", "--dim", "999"], 2, "dim is 999"),
        "a format nobody writes": (
            ["embed", model, folder / "bad.jsonl", "-o", "x.csv"],
            2,
            ".npy, .parquet, .lance",
        ),
        "not an index": (["search", folder, "x"], 2, "not a search index"),
    }


@pytest.mark.parametrize("case", range(9))
def test_wrong_use_is_one_sentence(case: int, model_folder: Path, tmp_path: Path) -> None:
    uses = list(wrong_uses(model_folder, tmp_path).values())
    assert len(uses) == 9
    arguments, code, says = uses[case]
    done = f2llm(*arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in f2llm("--debug", *arguments).stderr or arguments == ["serch"]


def test_embed_writes_the_vectors_of_the_library(
    model_folder: Path, lines_file: Path, tmp_path: Path
) -> None:
    expected_ND = Embedder(model_folder).encode(TEXTS, prompt="query", dim=8)
    asked = ("--prompt", "query", "--dim", "8")
    assert f2llm("embed", model_folder, lines_file, *asked, "-o", tmp_path / "v.npy").returncode == 0
    assert f2llm("embed", model_folder, lines_file, *asked, "-o", tmp_path / "v.parquet").returncode == 0
    printed = f2llm("embed", model_folder, "-", *asked, given=lines_file.read_text(encoding="utf-8")).stdout
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected_ND, atol=1e-6)
    table = pq.read_table(tmp_path / "v.parquet")
    np.testing.assert_allclose(np.array(table["vector"].to_pylist()), expected_ND, atol=1e-6)
    assert json.loads(table.schema.metadata[b"f2llm"])["identity"] == Embedder(model_folder).identity
    np.testing.assert_allclose([json.loads(line) for line in printed.splitlines()], expected_ND, atol=1e-6)


def test_index_and_search_find_a_text_by_itself(model_folder: Path, lines_file: Path, tmp_path: Path) -> None:
    assert f2llm("index", model_folder, lines_file, tmp_path / "index").returncode == 0
    hits = json.loads(f2llm("search", tmp_path / "index", "日本", "--limit", "3", "--json").stdout)
    assert len(hits) == 3
    assert {hit["text"] for hit in hits} <= set(TEXTS)
    assert hits == sorted(hits, key=lambda hit: -hit["score"])


def test_ctrl_c_is_one_sentence_and_exit_code_1(model_folder: Path) -> None:
    command = [sys.executable, "-c", "from f2llm.cli import main; main()", "embed", str(model_folder), "-"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin
    for _ in range(5000):  # more than are in memory at once, so that the first vectors are printed
        process.stdin.write("more to come\n")
    process.stdin.flush()
    assert process.stdout
    assert process.stdout.readline().startswith("[")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("interrupted; what was finished is kept")
    assert "Traceback" not in errors


def test_doctor_prints_json() -> None:
    facts = json.loads(f2llm("doctor", "--json").stdout)
    assert facts["torch"].startswith("2.")
    assert facts["threads"] >= 1
