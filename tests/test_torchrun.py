"""A whole run under torchrun, from rows to a model: as in one process, after kills too, and never a hang."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import LANGUAGES
from tests.train.gloo import end_of_ranks
from tests.train.runs import steps_of

from f2llm import pipeline
from f2llm.errors import UsageError
from f2llm.files import read_json
from f2llm.model.folder import load_model
from f2llm.recipe import load
from f2llm.train.ranks import Ranks, collect
from f2llm.train.watch import read_log

RECIPE = """\
name: ranks
seed: 3
output: run
stages:
  rows: {stage: files, files: [./rows.jsonl], format: retrieval, task: names, instruction: Find this name}
  tokens: {stage: tokenizer, data: rows, vocab_size: 400}
  base:
    stage: train
    data: rows
    tokenizer: tokens
    shape: {hidden_size: 24, intermediate_size: 40, layers: 2, heads: 4, kv_heads: 2, head_dim: 8}
    instructions: true
    steps: 20
    batch_size: 16
    max_length: 32
    learning_rate: 1e-3
    warmup_steps: 4
    checkpoint_every: 3
    tokens_per_microbatch: 100
"""
STAGES = ("rows", "tokens", "base")
MODULE = ["-m", "f2llm", "run", "recipe.yaml"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
# What torchrun would give, and CPUs alone.
NONE_OF_IT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in NONE_OF_IT},
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def start(folder: Path, world: int, what: list[str] = MODULE) -> "subprocess.Popen[str]":
    """The command in `folder`, in one process or under torchrun."""
    launcher = ["-m", *TORCHRUN, str(world)] if world > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, *what],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code, and what it said on standard error; it says nothing on standard output."""
    try:
        output, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        kill_with_its_ranks(process)
        raise
    assert output == ""
    return process.returncode, errors


def finish(folder: Path, world: int) -> str:
    """Run to the end; what it said."""
    code, errors = end(start(folder, world))
    assert code == 0, errors
    return errors


def kill_with_its_ranks(process: "subprocess.Popen[str]") -> None:
    """As if the machine lost its power. Ranks are in process groups of their own, so torchrun's is not enough."""
    lists = Path(f"/proc/{process.pid}/task").glob("*/children")
    for pid in [process.pid, *(int(child) for file in lists for child in file.read_text().split())]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


MakeFolder = Callable[[str], Path]


@pytest.fixture(scope="module")
def make_folder(things: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Makes a folder with the recipe and its rows, to run it in."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        pairs = [(thing[a], thing[b]) for thing in things for a, b in permutations(LANGUAGES, 2)]
        rows = [json.dumps({"query": query, "positive": positive}) for query, positive in pairs]
        (folder / "rows.jsonl").write_text("\n".join(rows))
        (folder / "recipe.yaml").write_text(RECIPE)
        return folder

    return make


@pytest.fixture(scope="module")
def one(make_folder: MakeFolder) -> Path:
    """The folder in which one process ran the recipe."""
    finish(folder := make_folder("one"), 1)
    return folder


@pytest.fixture(scope="module")
def two(make_folder: MakeFolder) -> tuple[Path, str]:
    """The folder in which two ranks ran it, and what they said."""
    return (folder := make_folder("two")), finish(folder, 2)


@pytest.fixture(scope="module")
def killed(make_folder: MakeFolder) -> Path:
    """The folder in which two ranks were killed while they trained, after a checkpoint."""
    folder = make_folder("killed")
    process = start(folder, 2)
    checkpoints = folder / "run/base/checkpoints"
    while not any(checkpoints.glob("step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    kill_with_its_ranks(process)
    assert not (folder / "run/base/manifest.json").exists()
    return folder


def manifest(folder: Path, stage: str = "base") -> dict[str, Any]:
    value = read_json(folder / "run" / stage / "manifest.json")
    assert isinstance(value, dict)
    return value


def check_same(got: Path, expected: Path) -> None:
    """The same losses and norms in the log, and the same weights, but for rounding."""
    got, expected = got / "run/base", expected / "run/base"
    assert [record["step"] for record in steps_of(got)] == list(range(20))
    for record, other in zip(steps_of(got), steps_of(expected), strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert record["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
    weights = load_model(got).decoder.state_dict()
    for name, weight in load_model(expected).decoder.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_leave_what_one_process_leaves(one: Path, two: tuple[Path, str]) -> None:
    folder, said = two
    check_same(folder, one)
    assert [manifest(path)["facts"]["ranks"] for path in (one, folder)] == [1, 2]
    for stage in ("rows", "tokens"):
        assert manifest(folder, stage)["content"] == manifest(one, stage)["content"]
    assert not (folder / "run/base/checkpoints").exists()
    # Rank 0 alone speaks, and nobody warns.
    assert [line.split(":")[0] for line in said.splitlines() if ": done in" in line] == list(STAGES)
    assert "error" not in said.lower() and "warning" not in said.lower()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 1])
def test_what_is_done_is_not_done_again_on_any_number_of_ranks(world: int, two: tuple[Path, str]) -> None:
    folder, _ = two
    before = [manifest(folder, stage) for stage in STAGES]
    assert finish(folder, world) == "".join(f"{stage}: done already\n" for stage in STAGES)
    assert [manifest(folder, stage) for stage in STAGES] == before


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 1])
def test_a_killed_run_goes_on_on_any_number_of_ranks(
    world: int, killed: Path, two: tuple[Path, str], tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    begun = list(read_log(killed / "run/base/log.jsonl"))
    said = finish(tmp_path, world)
    assert "base: going on after" in said
    check_same(tmp_path, two[0])
    # The clock tells which steps are the first start's: those up to the checkpoint, and they are the same to the byte.
    assert list(read_log(tmp_path / "run/base/log.jsonl"))[:3] == begun[:3]
    facts = [manifest(folder)["facts"] for folder in (tmp_path, two[0])]
    assert facts[0]["ranks"] == world
    if world == 2:
        assert facts[0]["identity"] == facts[1]["identity"]
    else:
        assert "ranks was 2 and is 1" in said


# --- What goes wrong

# A run in which one rank ends in its third step, as the system ends one that took too much memory.
DYING = """
import os, sys
from f2llm.train import trainer

step = trainer._step

def dying_step(run, number, *rest):
    if number == 2 and os.environ["RANK"] == "{rank}":
        os._exit(9)
    return step(run, number, *rest)

trainer._step = dying_step
sys.argv[1:] = ["run", "recipe.yaml"]
from f2llm.cli import main
main()
"""
# A run in which each rank has a recipe of its own.
OWN_RECIPES = """
import os, sys
sys.argv[1:] = ["run", "recipe" + os.environ["RANK"] + ".yaml"]
from f2llm.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run(rank: int, make_folder: MakeFolder) -> None:
    folder = make_folder("dying")
    (folder / "dying.py").write_text(DYING.format(rank=rank))
    code, errors = end(start(folder, 2, ["dying.py"]))
    assert code != 0
    assert "exitcode  : 9 (pid: " in errors
    assert "[rank" not in errors  # a traceback, which would bury the reason
    assert len(steps_of(folder / "run/base")) == 2


def meet_until_rank_1_ends(ranks: Ranks) -> None:
    while True:
        collect("still here", ranks)
        if ranks.rank == 1:
            os._exit(9)


def test_ranks_that_lose_another_say_so() -> None:
    """Without torchrun too, which would end them."""
    ended = end_of_ranks(3, meet_until_rank_1_ends, timeout=60)
    for rank in (0, 2):
        assert ended[rank].code == 1
        assert f"F2Error: rank {rank} of 3 lost the others (" in ended[rank].errors.splitlines()[-1]


@pytest.mark.slow
def test_a_stage_that_fails_on_rank_0_ends_the_run_in_one_sentence(make_folder: MakeFolder) -> None:
    folder = make_folder("failing")
    (folder / "rows.jsonl").write_text('{"query": "a"}')
    code, errors = end(start(folder, 2))
    assert code != 0
    assert errors.count("error: rows.jsonl, line 1, column 'positive': expected a text") == 1
    assert "[rank" not in errors


@pytest.mark.slow
def test_ranks_with_different_recipes_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("differing")
    (folder / "own.py").write_text(OWN_RECIPES)
    for rank in (0, 1):
        (folder / f"recipe{rank}.yaml").write_text(RECIPE.replace("steps: 20", f"steps: {20 + rank}"))
    code, errors = end(start(folder, 2, ["own.py"]))
    assert code != 0
    assert "error: the recipe's hash is " in errors and "give every rank the same code" in errors
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"WORLD_SIZE": "two"}, "says WORLD_SIZE='two', expected a number from 1 there"),
        ({"WORLD_SIZE": "0"}, "says WORLD_SIZE='0', expected a number from 1 there"),
        ({"WORLD_SIZE": "2"}, "says WORLD_SIZE=2 and RANK='', expected a number from 0 there"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2 and LOCAL_RANK='', expected a number from 0 there"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"},
            "WORLD_SIZE=2 and RANK='2', expected a number below 2 there",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
            "WORLD_SIZE=2 and MASTER_ADDR='', expected the host of rank 0 there",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "b"},
            "WORLD_SIZE=2 and MASTER_PORT='b', expected a number from 1 there",
        ),
    ],
)
def test_half_an_environment_is_refused(
    environment: dict[str, str], sentence: str, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in NONE_OF_IT:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder := make_folder("half"))
    with pytest.raises(UsageError, match="start ranks with torchrun, or unset WORLD_SIZE") as refusal:
        pipeline.run(load(Path("recipe.yaml")), Path("recipe.yaml"))
    assert sentence in str(refusal.value)
    assert not (folder / "run").exists()
