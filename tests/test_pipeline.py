"""The pipeline with small fake stages: what is done again, what is not, and what survives kills and full disks."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from f2llm import pipeline, stages
from f2llm.errors import F2Error, UsageError
from f2llm.files import read_json
from f2llm.recipe import Recipe, load, recipe_hash
from f2llm.stages import Context, Inputs

RECIPE = """\
name: fake
seed: 3
output: {output}
stages:
  names: {{stage: names}}
  words: {{stage: tokenizer, data: names, vocab_size: 300}}
  other: {{stage: tokenizer, data: names, vocab_size: 400}}
  base:
    stage: train
    data: names
    tokenizer: words
    shape: {{hidden_size: 8, intermediate_size: 8, layers: 1, heads: 1, kv_heads: 1, head_dim: 2}}
    instructions: false
    steps: 5
    batch_size: 2
    learning_rate: 1
"""


class Factory:
    """Fake stages that write a little text made of their config and inputs, and remember that they ran."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.ran: list[str] = []
        self.text = RECIPE.format(output=folder / "run")
        for kind in ("names", "files", "tokenizer", "train"):
            monkeypatch.setitem(stages.STAGES, kind, self.stage)

    def stage(self, config: Any, given: Inputs, out: Path, context: Context) -> dict[str, Any]:
        self.ran.append(out.name)
        read = [(path / "text").read_text() if path.is_dir() else path.read_text() for path in given.values()]
        size = getattr(config, "vocab_size", None) or getattr(config, "steps", None)
        (out / "text").write_text(f"{context.seed} {size} {read}")
        return {"size": size}

    def run(self, old: str = "", new: str = "") -> list[str]:
        """Run the recipe with `old` replaced for good; the stages that ran."""
        assert self.text.count(old) == 1 or not old
        self.text = self.text.replace(old, new) if old else self.text
        path = self.folder / "recipe.yaml"
        path.write_text(self.text)
        self.ran = []
        pipeline.run(load(path), path)
        return self.ran

    def manifest(self, name: str) -> dict[str, Any]:
        value = read_json(self.folder / "run" / name / "manifest.json")
        assert isinstance(value, dict)
        return value


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Factory:
    return Factory(tmp_path, monkeypatch)


def test_all_stages_run_once_in_order(factory: Factory, capsys: pytest.CaptureFixture[str]) -> None:
    assert factory.run() == ["names", "words", "other", "base"]
    capsys.readouterr()
    assert factory.run() == []
    assert capsys.readouterr().err.split("\n")[:4] == [
        f"{n}: done already" for n in ("names", "words", "other", "base")
    ]


def test_manifest_tells_how_the_folder_came_about(factory: Factory) -> None:
    factory.run()
    manifest, names = factory.manifest("base"), factory.manifest("names")
    assert manifest["inputs"] == {"names": names["content"], "words": factory.manifest("words")["content"]}
    assert (manifest["stage"], manifest["name"], manifest["seed"]) == ("train", "base", 3)
    assert (manifest["config"]["steps"], manifest["facts"]) == (5, {"size": 5})
    assert set(manifest["versions"]) == {"f2llm", "python", "torch", "numpy", "tokenizers", "babel"}
    assert 0 <= manifest["seconds"] < 10 and 0.01 < manifest["peak_memory_gb"] < 100
    assert not (factory.folder / "run/base/started.json").exists()
    assert (factory.folder / "run/recipe.yaml").read_text() == factory.text


@pytest.mark.parametrize(
    ("old", "new", "again"),
    [
        (
            "vocab_size: 300",
            "vocab_size: 301",
            ["words", "base"],
        ),  # and neither its sibling nor what it reads
        ("steps: 5", "steps: 6", ["base"]),
        ("seed: 3", "seed: 4", ["names", "words", "other", "base"]),
        ("stage: names}", "stage: names, positives: 2}", ["names"]),  # the same names came out of it
        ("tokenizer: words", "tokenizer: other", ["base"]),
        ("name: fake", "name: renamed", []),
        (
            "learning_rate: 1\n",
            "learning_rate: 1\n  late: {stage: tokenizer, data: names, vocab_size: 500}\n",
            ["late"],
        ),
    ],
)
def test_a_change_redoes_what_depends_on_it_and_nothing_else(
    factory: Factory, old: str, new: str, again: list[str]
) -> None:
    factory.run()
    assert factory.run(old, new) == again
    assert factory.run() == []


def test_user_files_are_inputs_by_content(factory: Factory) -> None:
    rows = factory.folder / "names"  # also the name of another stage
    rows.write_text("one")
    stage = f"  rows: {{stage: files, files: [{rows}], format: retrieval, task: t, instruction: i}}\n"
    factory.run("  words:", stage + "  words:")
    os.utime(rows, (1, 1))
    assert factory.run() == []
    rows.write_text("two")
    assert factory.run() == ["rows"]
    rows.unlink()
    with pytest.raises(UsageError, match=r"stage 'rows' \(files\) reads .*/names, which does not exist"):
        factory.run()


@pytest.mark.parametrize("damage", ["change", "remove", "add"])
def test_damage_is_seen_and_mended(factory: Factory, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    factory.run()
    before = factory.manifest("words")["content"]
    text = factory.folder / "run/words/text"
    if damage == "change":
        text.write_text("damaged")
    elif damage == "remove":
        text.unlink()
    else:
        text.with_name("stray").write_text("")
    assert factory.run() == ["words"]  # what comes out is as before, so `base` still holds
    assert "words: made again, since files in" in capsys.readouterr().err
    assert factory.manifest("words")["content"] == before
    assert not text.with_name("stray").exists()


def test_log_is_no_content_since_it_tells_times(factory: Factory) -> None:
    factory.run()
    (factory.folder / "run/words/log.jsonl").write_text('{"tokens_per_second": 5}')
    assert factory.run() == []


def test_old_results_do_not_stay_in_a_folder_done_again(factory: Factory) -> None:
    factory.run()
    (factory.folder / "run/base/old").write_text("of an older version")
    (factory.folder / "run/base/started.json").write_text(
        json.dumps({"fingerprint": factory.manifest("base")["fingerprint"], "seconds_spent": 0})
    )  # as a kill between the manifest and the end of the stage leaves it
    factory.run()
    assert sorted(path.name for path in (factory.folder / "run/base").iterdir()) == ["manifest.json", "text"]


def test_leftover_of_a_kill_while_emptying_goes(factory: Factory) -> None:
    factory.run()
    leftover = factory.folder / "run/.words.old/text"
    leftover.parent.mkdir()
    leftover.write_text("older still")
    assert factory.run("vocab_size: 300", "vocab_size: 301") == ["words", "base"]
    assert not leftover.parent.exists()


def test_folder_of_somebody_else_is_not_emptied(factory: Factory) -> None:
    thesis = factory.folder / "run/words/thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("three years of work")
    with pytest.raises(F2Error, match="run/words holds files that f2llm did not make"):
        factory.run()
    (thesis.parent / "manifest.json").write_text('{"name": "a browser extension"}')
    with pytest.raises(F2Error, match="run/words holds files that f2llm did not make"):
        factory.run()
    assert thesis.read_text() == "three years of work"


def test_failed_stage_leaves_the_finished_ones(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Any, given: Inputs, out: Path, context: Context) -> dict[str, Any]:
        raise F2Error("the names have no letters.")

    working = stages.STAGES["train"]
    monkeypatch.setitem(stages.STAGES, "train", fail)
    with pytest.raises(F2Error, match=r"^the names have no letters\.$"):
        factory.run()
    assert not (factory.folder / "run/base/manifest.json").exists()
    monkeypatch.setitem(stages.STAGES, "train", working)
    assert factory.run() == ["base"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "the disk that holds {out} is full; free some space",
        ),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            "the disk that holds {out} is full; free",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            "stage 'base' stopped (Permission denied: /x); mend",
        ),
    ],
)
def test_refusal_of_the_system_is_one_sentence(
    factory: Factory, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def fail(config: Any, given: Inputs, out: Path, context: Context) -> dict[str, Any]:
        raise error

    monkeypatch.setitem(stages.STAGES, "train", fail)
    with pytest.raises(F2Error) as caught:
        factory.run()
    assert sentence.format(out=factory.folder / "run/base") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_in_the_program_are_not_dressed_up(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stages.STAGES, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        factory.run()


def test_output_that_is_a_file(factory: Factory) -> None:
    (factory.folder / "run").write_text("")
    with pytest.raises(F2Error, match=r"the run stopped \(File exists: .*/run\)"):
        factory.run()


# --- Kills. The child trains in steps that leave a checkpoint each, and says on standard output what it does.

CHILD = """
import sys, time
from pathlib import Path
from f2llm import pipeline, stages
from f2llm.recipe import load

def names(config, given, out, context):
    (out / "text").write_text("names")
    return {}

def train(config, given, out, context):
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    done = sorted(int(path.name) for path in checkpoints.glob("[0-9]*"))
    for step in range(len(done), config.steps):
        (out / f".weights.{step}.tmp").write_text("half-written")
        (checkpoints / str(step)).write_text("x")
        print("step", step, flush=True)
        time.sleep(float(sys.argv[2]))
    (out / "text").write_text("".join(path.read_text() for path in checkpoints.glob("*")))
    for path in [*checkpoints.glob("*"), *out.glob(".*.tmp")]:
        path.unlink()
    checkpoints.rmdir()
    return {}

stages.STAGES.update(names=names, tokenizer=names, train=train)
try:
    pipeline.run(load(Path(sys.argv[1])), Path(sys.argv[1]))
except pipeline.F2Error as error:
    sys.exit(str(error))
"""


class Child:
    """Runs of the fake recipe in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "run/base"
        self.path = folder / "recipe.yaml"
        self.path.write_text(RECIPE.format(output=folder / "run"))

    def start(self, seconds_per_step: float) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", CHILD, str(self.path), str(seconds_per_step)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def start_and_wait_for(self, line: str, seconds_per_step: float = 0.2) -> "subprocess.Popen[str]":
        child = self.start(seconds_per_step)
        assert child.stdout is not None
        while (said := child.stdout.readline()) != line:
            assert said, child.communicate()
        return child

    def killed_after(self, line: str) -> None:
        child = self.start_and_wait_for(line)
        child.send_signal(signal.SIGKILL)
        child.communicate()

    def steps(self) -> list[int]:
        """Run to the end; the training steps it took."""
        output, errors = (child := self.start(seconds_per_step=0)).communicate(timeout=60)
        assert child.returncode == 0, errors
        return [int(line.split()[1]) for line in output.splitlines()]


@pytest.fixture
def child(tmp_path: Path) -> Child:
    return Child(tmp_path)


def test_killed_stage_goes_on_from_its_checkpoints(child: Child) -> None:
    child.killed_after("step 1\n")
    assert not (child.out / "manifest.json").exists()
    child.killed_after("step 2\n")  # it took one step in this start
    spent = read_json(child.out / "started.json")["seconds_spent"]
    assert child.steps() == [3, 4]
    manifest = read_json(child.out / "manifest.json")
    assert (child.out / "text").read_text() == "xxxxx"
    assert sorted(path.name for path in child.out.iterdir()) == ["manifest.json", "text"]
    # The sleep between two checkpoints of the first start counts, and is carried on.
    assert 0.2 <= spent <= manifest["seconds"]


def test_killed_run_ends_like_one_that_was_not(child: Child, tmp_path: Path) -> None:
    child.killed_after("step 3\n")
    child.steps()
    (tmp_path / "straight").mkdir()
    straight = Child(tmp_path / "straight")
    assert straight.steps() == [0, 1, 2, 3, 4]
    for stage in ("names", "words", "base"):
        contents = [
            read_json(out.parent / stage / "manifest.json")["content"] for out in (child.out, straight.out)
        ]
        assert contents[0] == contents[1]


def test_checkpoints_of_other_work_are_not_used(child: Child) -> None:
    child.killed_after("step 1\n")
    child.path.write_text(child.path.read_text().replace("learning_rate: 1", "learning_rate: 2"))
    assert child.steps() == [0, 1, 2, 3, 4]


def test_folder_in_use_is_refused(child: Child) -> None:
    first = child.start_and_wait_for("step 0\n", seconds_per_step=60)
    second = child.start(seconds_per_step=0)
    output, errors = second.communicate(timeout=60)
    assert (second.returncode, output) == (1, "")
    run = child.out.parent
    assert errors == (
        f"{run} is in use by another run (process {first.pid}); wait until it ends or give another output.\n"
    )
    first.kill()
    first.communicate()
    assert child.steps()[-1] == 4  # the lock went with its holder


def test_hash_of_the_recipe_reaches_the_stages(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Context] = []

    def look(config: Any, given: Inputs, out: Path, context: Context) -> dict[str, Any]:
        seen.append(context)
        return {}

    monkeypatch.setitem(stages.STAGES, "train", look)
    factory.run()
    recipe: Recipe = load(factory.folder / "recipe.yaml")
    (context,) = seen
    assert context == Context(3, recipe_hash(recipe), context.hashes, force=False, ranks=None)
    assert context.hashes == factory.manifest("base")["inputs"] != {}
