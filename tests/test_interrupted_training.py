"""Training that a full disk ended when its model was to be written, in a real run: what its checkpoint allows."""

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest

from f2llm import pipeline
from f2llm.errors import F2Error, UsageError
from f2llm.files import read_json, sha256_folder
from f2llm.recipe import load

RECIPE = """\
name: real
seed: 3
output: {folder}/run
stages:
  rows: {{stage: files, files: [{folder}/rows.tsv], format: retrieval, task: names, instruction: Find this name}}
  words: {{stage: tokenizer, data: rows, vocab_size: 300}}
  base:
    stage: train
    data: rows
    tokenizer: words
    shape: {{hidden_size: 8, intermediate_size: 8, layers: 1, heads: 1, kv_heads: 1, head_dim: 2}}
    instructions: false
    steps: 4
    batch_size: 4
    learning_rate: 1e-3
    checkpoint_every: 3
    tokens_per_microbatch: 1000
"""


class Interrupted:
    """A run that has a checkpoint of three steps and no model."""

    def __init__(self, folder: Path, things: list[dict[str, str]]) -> None:
        self.base, self.rows, self.path = folder / "run/base", folder / "rows.tsv", folder / "recipe.yaml"
        lines = ["query\tpositive", *(f"{thing['eng']}\t{thing['swa']}" for thing in things)]
        self.rows.write_text("\n".join(lines))
        self.path.write_text(RECIPE.format(folder=folder))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("f2llm.train.stage.save_model", self.fail)
            with pytest.raises(F2Error, match="is full"):
                self.run()
        assert (self.base / "checkpoints/step-00000003/state.json").exists()

    def fail(self, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def run(self, force: bool = False) -> None:
        pipeline.run(load(self.path), self.path, force)

    def change(self, old: str, new: str) -> None:
        text = self.path.read_text()
        assert text.count(old) == 1
        self.path.write_text(text.replace(old, new))

    def first_steps(self) -> list[str]:
        """The log of the steps before the checkpoint, with times that are never the same twice."""
        return (self.base / "log.jsonl").read_text().splitlines()[:3]

    def checkpoints(self) -> str:
        return sha256_folder(self.base / "checkpoints")


@pytest.fixture
def interrupted(tmp_path: Path, things: list[dict[str, str]]) -> Interrupted:
    return Interrupted(tmp_path, things)


CHANGES = {
    "a setting": (
        "learning_rate: 1e-3",
        "learning_rate: 2e-3",
        r"recipe.learning_rate was 0.001 and is 0.002",
    ),
    "the seed": ("seed: 3", "seed: 4", "seed was 3 and is 4"),
    "the objective": (
        "    steps: 4\n",
        "    steps: 4\n    objective: joint\n",
        'recipe.objective was "f2llm-v2" and is "joint"',
    ),
    "what it reads": ("vocab_size: 300", "vocab_size: 290", "inputs.words was "),
}


@pytest.mark.parametrize(("old", "new", "difference"), CHANGES.values(), ids=CHANGES)
def test_interrupted_training_is_kept_for_the_recipe_it_began_with(
    interrupted: Interrupted, old: str, new: str, difference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log, checkpoints = interrupted.first_steps(), interrupted.checkpoints()
    interrupted.change(old, new)
    for _ in range(2):  # asking again is no consent
        with pytest.raises(UsageError, match="the run began otherwise: .*with --force") as refusal:
            interrupted.run()
        assert difference in str(refusal.value)
        assert (interrupted.first_steps(), interrupted.checkpoints()) == (log, checkpoints)
    interrupted.change(new, old)
    capsys.readouterr()
    interrupted.run()
    assert "base: going on after" in capsys.readouterr().err
    assert interrupted.first_steps() == log
    assert (interrupted.base / "manifest.json").exists()


def test_force_takes_a_change_and_goes_on_from_the_checkpoint(
    interrupted: Interrupted, capsys: pytest.CaptureFixture[str]
) -> None:
    log = interrupted.first_steps()
    interrupted.change("learning_rate: 1e-3", "learning_rate: 2e-3")
    capsys.readouterr()
    interrupted.run(force=True)
    warning = (
        "going on although the run began otherwise (--force): recipe.learning_rate was 0.001 and is 0.002."
    )
    assert warning in capsys.readouterr().err
    assert interrupted.first_steps() == log
    last = json.loads((interrupted.base / "log.jsonl").read_text().splitlines()[3])
    assert last["learning_rate"] == pytest.approx(2e-3 * (1 + math.cos(3 / 4 * math.pi)) / 2)
    assert read_json(interrupted.base / "manifest.json")["config"]["learning_rate"] == 2e-3
    interrupted.run()
    assert "base: done already" in capsys.readouterr().err


def test_force_does_not_read_a_checkpoint_of_another_shape(interrupted: Interrupted) -> None:
    checkpoints = interrupted.checkpoints()
    interrupted.change("hidden_size: 8", "hidden_size: 16")
    with pytest.raises(F2Error, match=r"is torch.float32 \[\d+, 8\] in .*, and torch.float32 \[\d+, 16\]"):
        interrupted.run(force=True)
    assert interrupted.checkpoints() == checkpoints


def test_what_is_kept_and_watched_may_change(interrupted: Interrupted) -> None:
    log = interrupted.first_steps()
    interrupted.change("checkpoint_every: 3", "checkpoint_every: 2")
    interrupted.run()
    assert interrupted.first_steps() == log
