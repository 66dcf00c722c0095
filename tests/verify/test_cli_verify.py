"""`f2llm verify` as scripts and people call it: exit codes, JSON, the table."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.verify.broken_server import KEY, serving_model
from typer.testing import CliRunner, Result

from f2llm.cli_verify import app
from f2llm.embed.embedder import Embedder
from f2llm.errors import UsageError


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def judged(result: Result) -> dict[str, Any]:
    """What is printed for scripts, and nothing else is."""
    report: dict[str, Any] = json.loads(result.stdout)
    assert report["passed"] == (not any(one["status"] == "fail" for one in report["checks"]))
    return report


def test_exit_codes_of_folders(folder: Path) -> None:
    done = verify(folder, "--json")
    assert done.exit_code == 0 and judged(done)["passed"]
    (folder / "1_Pooling" / "config.json").unlink()
    done = verify(folder, "--json")
    (pooling,) = [one for one in judged(done)["checks"] if one["check"] == "pooling"]
    assert done.exit_code == 1 and "has no 1_Pooling/config.json" in pooling["why"] and pooling["fix"]


def test_exit_codes_of_servers(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERIFY_KEY", KEY)
    embedder = Embedder(model_folder)
    with serving_model(embedder, key=KEY, models=("tiny", "large")) as server:
        options = ("--model", "large", "--api-key-env", "VERIFY_KEY", "--json")
        done = verify(server.address, *options)
        assert done.exit_code == 0 and judged(done)["target"] == server.address
        server.fault = "reversed"
        done = verify(server.address, *options)
    assert done.exit_code == 1
    assert [one["check"] for one in judged(done)["checks"] if one["status"] == "fail"] == ["order"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["FOLDER", "--model", "x"], "--model and --api-key-env are for servers"),
        (["FOLDER", "--api-key-env", "X"], "--model and --api-key-env are for servers"),
        (["FOLDER", "--golden", "nowhere.json"], "--golden is nowhere.json, which is no file"),
        (["FOLDER", "--write-golden", "--golden", __file__], "give one of them"),
        (["http://localhost:1/v1", "--peer"], "need a model's folder"),
        (["http://localhost:1/v1", "--write-golden"], "need a model's folder"),
        (["http://localhost:1/v1", "--api-key-env", "NOT_SET_HERE"], "'NOT_SET_HERE' that holds the API key"),
        (["nowhere"], "nowhere is not a folder"),
    ],
)
def test_wrong_use_is_one_sentence(folder: Path, arguments: list[str], said: str) -> None:
    """The command line's own `main` turns it into exit code 2."""
    result = verify(*(str(folder) if argument == "FOLDER" else argument for argument in arguments))
    assert isinstance(result.exception, UsageError) and said in str(result.exception)


def test_unknown_options_are_refused(folder: Path) -> None:
    assert verify(folder, "--no-such").exit_code == 2
    assert verify().exit_code == 2


def test_golden_vectors_are_written_then_held(folder: Path) -> None:
    assert verify(folder, "--write-golden").exit_code == 0 and (folder / "golden.json").is_file()
    done = verify(folder, "--json")
    (golden,) = [one for one in judged(done)["checks"] if one["check"] == "golden"]
    assert done.exit_code == 0 and golden["status"] == "pass"


def test_the_table_shows_why_and_what_mends_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's own words, which may look like markup, stay as they are."""
    monkeypatch.setenv("COLUMNS", "200")
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": {"query": "[bold]Query: "}}))
    done = verify(folder)
    assert done.exit_code == 1
    lines = [line.strip() for line in done.stdout.splitlines()]
    (named,) = [line for line in lines if line.startswith("prompts-named")]
    assert "fail" in named and "puts '[bold]Query: ' in front of queries" in named
    assert lines[lines.index(named) + 1].startswith("-> Write the prompt")
    assert "2 failed, 1 skipped" in lines[-1]
