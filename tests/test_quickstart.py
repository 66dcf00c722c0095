"""The whole factory, small: every stage of recipes/tiny.yaml through the real command, once, again, and killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from f2llm.files import read_json
from f2llm.recipe import EvaluateStage, load

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"
# Nothing that a run does may need a network: every connection is refused.
OFFLINE = """
import socket

def refuse(*_):
    raise OSError("a run tried to open a connection")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from f2llm.cli import main

main()
"""
RUN = [sys.executable, "-c", OFFLINE, "run", str(RECIPE)]


def finish(folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(RUN, cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done


def outcome(run: Path) -> dict[str, Any]:
    """What must not depend on interruptions: every model's identity, and the scores."""
    identities = {path.parent.name: read_json(path)["identity"] for path in run.glob("*/f2llm.json")}
    return {"identities": identities, "scores": read_json(run / "scores" / "scores.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder in which the recipe was run, and what the command said."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, finish(folder)


def test_the_report_has_what_it_promises(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, said = finished
    report = json.loads((folder / "runs" / "tiny" / "report.json").read_text(encoding="utf-8"))
    promised = {"seconds", "peak_memory_gb", "languages", "names", "models", "baseline", "schema_version"}
    assert promised <= report.keys()
    (scored,) = (s.models for s in load(RECIPE).stages.values() if isinstance(s, EvaluateStage))
    assert [model["name"] for model in report["models"]] == scored
    for model in report["models"]:
        assert {"name", "parameters", "dim", "tokens_per_second", "accuracy_at_1"} <= model.keys()
        assert list(model["accuracy_at_1"])[-1] == str(model["dim"])
        assert all(scores.keys() >= {"mean", "median", "p10"} for scores in model["accuracy_at_1"].values())
    for name in ("tfidf", "tfidf_nearest", "lookup"):
        assert 0 <= report["baseline"][name]["full"]["mean"] <= 1
    assert 0 < report["seconds"] < 3600
    assert 0.1 < report["peak_memory_gb"] < 4
    assert all(model["name"] in said.stdout for model in report["models"])
    assert "report.html" in said.stdout


def test_even_half_a_minute_of_training_learns_names(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """In scripts that share no letters with English, where n-grams find 2 in 100 and chance one in 1,600."""
    scripts = read_json(finished[0] / "runs" / "tiny" / "report.json")["scripts"]
    others = [row for script, row in scripts.items() if script != "Latn"]
    assert len(others) >= 3
    ours = sum(row["accuracy_at_1"] for row in others) / len(others)
    assert ours > 0.05 + sum(row["tfidf"] for row in others) / len(others)


def test_a_second_run_does_nothing(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs" / "tiny").glob("*/manifest.json")}
    again = finish(folder)
    stages = load(RECIPE).stages
    assert all(f"{name}: done already" in again.stderr for name in stages)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(before) == len(stages)


@pytest.mark.slow
def test_killed_three_times_it_ends_in_the_same_weights_and_scores(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    rng = random.Random(int.from_bytes(os.urandom(8)))
    straight = outcome(finished[0] / "runs" / "tiny")
    seconds = read_json(finished[0] / "runs" / "tiny" / "report.json")["seconds"]
    kills = 0
    while kills < 3:
        process = subprocess.Popen(RUN, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(4, 4 + seconds / 2))
        if process.poll() is not None:  # it was faster than we: begin once more
            assert process.returncode == 0
            shutil.rmtree(tmp_path / "runs")
            kills = 0
            continue
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    finish(tmp_path)
    assert outcome(tmp_path / "runs" / "tiny") == straight
