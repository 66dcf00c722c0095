"""A run that was cut goes on as if it had not been: the same bits and the same log, or a refusal."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import (
    MakeModel,
    Settings,
    Stopped,
    divided,
    interrupt,
    load_part,
    same_bits,
    steps_of,
    validations_of,
    weights,
    whole_log,
)
from tokenizers import Tokenizer
from torch import Tensor

from f2llm.errors import F2Error, UsageError
from f2llm.recipe_train import Lora, Shape, TrainStage, Validation
from f2llm.train import trainer
from f2llm.train.checkpoint import find_checkpoint
from f2llm.train.ranks import ALONE
from f2llm.train.sampler import Batch, Sampler
from f2llm.train.trainer import train

BASE, OTHER, TEACHER = 0, 99, 1  # seeds of models
Run = Callable[..., tuple[dict[str, Tensor], list[int]]]


@pytest.fixture
def run(make_model: MakeModel, rows_folder: Path) -> Run:
    """Trains in a folder, up to a Ctrl-C before step `cut`: the weights that are left, and the steps that were made."""

    def go(
        config: TrainStage,
        out: Path,
        cut: int | None = None,
        sampler: Callable[[Sampler], Sampler] = lambda batches: batches,
        **given: Any,
    ) -> tuple[dict[str, Tensor], list[int]]:
        there = find_checkpoint(out / "checkpoints", ALONE)
        model = make_model(
            seed=OTHER if there else BASE
        )  # a checkpoint's weights take the place of any others
        batches, held_out = divided(config, rows_folder)
        made = Stopped(sampler(batches), {} if cut is None else {cut: interrupt})
        teacher = make_model(seed=TEACHER) if config.teacher else None
        with suppress(KeyboardInterrupt):
            train(config, model, made, teacher, out, held_out=held_out, **given)
        return weights(model), made.made

    return go


# --- The same bits

HELD_OUT = {"rows": 12, "every": 2}
RUNS: dict[str, dict[str, Any]] = {
    "distilled": {"teacher": "teacher"},
    "through a projection": {
        "teacher": "teacher",
        "distillation": {"terms": {"mse": 1.0, "similarity": 1.0, "ranking": 0.5}, "target": "projection"},
    },
    "exits and ranks": {"exits": [1], "table_ranks": [4, 12], "tokens_per_microbatch": 300},
    "averaged": {"ema": 0.9},
    "adapters": {"lora": Lora(rank=2, alpha=4.0)},
    "exact rows": {"embedding_rows": "exact", "validation": Validation(**HELD_OUT)},
    "lazy rows": {"embedding_rows": "lazy"},
    "learnt temperature": {"objective": "joint", "both_directions": True, "learn_temperature": True},
    "epochs": {"steps": None, "epochs": 0.3},
    "micro-batches": {"tokens_per_microbatch": 300},
    "stops early": {
        "validation": Validation(**HELD_OUT, patience=2),
        "learning_rate": 0.03,
        "schedule": "constant",
        "steps": 12,
    },
    "everything": {
        "teacher": "teacher",
        "embedding_rows": "lazy",
        "ema": 0.8,
        "learn_temperature": True,
        "tokens_per_microbatch": 300,
        "validation": Validation(**HELD_OUT, patience=9),
        "keep_checkpoints": 2,
    },
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_run_that_is_cut_ends_in_the_same_bits(
    changes: dict[str, Any], settings: Settings, run: Run, tmp_path: Path
) -> None:
    """Cut before there is a checkpoint, right behind one, and later; and done once more at the end."""
    config = settings(**{"steps": 9, **changes})  # with checkpoints after 3 and 6 of them
    straight, cut = tmp_path / "run", tmp_path / "again" / "run"
    expected, steps = run(config, straight)
    made = [run(config, cut, cut=at)[1] for at in (2, 3, 5)]
    assert made == [[0, 1], [0, 1, 2], [3, 4]]
    # The second time, it is as if the end had come before the model was written.
    for ended in ([*range(3, len(steps))], [*range((len(steps) - 1) // 3 * 3, len(steps))]):
        got, rest = run(config, cut)
        assert rest == ended
        assert same_bits(got, expected)
        assert whole_log(cut) == whole_log(straight)


def test_it_goes_on_wherever_it_was_cut(settings: Settings, run: Run, tmp_path: Path) -> None:
    """Cut before each of its steps in turn, with a checkpoint after every one."""
    config = settings(steps=7, checkpoint_every=1, ema=0.9, learn_temperature=True, tokens_per_microbatch=300)
    expected, _ = run(config, tmp_path / "run")
    for at in range(1, 7):
        assert run(config, tmp_path / "again" / "run", cut=at)[1] == [at - 1]
    got, _ = run(config, tmp_path / "again" / "run")
    assert same_bits(got, expected)
    assert whole_log(tmp_path / "again" / "run") == whole_log(tmp_path / "run")


def test_a_run_stops_early_and_leaves_its_best_weights(settings: Settings, run: Run, tmp_path: Path) -> None:
    """Stopped where its own scores say, with the weights that a run without patience has at the best of them."""
    changes = {**RUNS["stops early"], "checkpoint_every": 1, "keep_checkpoints": 12}
    config = settings(**changes)
    left, _ = run(config, tmp_path / "stopped")
    score = {step: figures["score"] for step, figures in validations_of(tmp_path / "stopped").items()}
    best = max(score, key=lambda step: (score[step], -step))
    assert 0 < best < 8, "at the first or last of these weights there is nothing to see"
    assert list(score) == list(range(0, best + 5, 2)), "two validations without a better score"
    assert [record["step"] for record in steps_of(tmp_path / "stopped")] == list(range(best + 4))

    run(settings(**{**changes, "validation": Validation(**HELD_OUT)}), tmp_path / "endless")
    assert steps_of(tmp_path / "endless")[: best + 4] == steps_of(tmp_path / "stopped")
    then = {name: torch.empty_like(tensor) for name, tensor in left.items()}
    load_part(tmp_path / "endless" / "checkpoints" / f"step-{best:08d}", "model", then)
    assert same_bits(left, then)


def test_what_was_the_best_at_the_checkpoint_is_left_where_later_bests_are_not_met_again(
    settings: Settings, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on otherwise than it was (by force, or on other machines): step 6, once the best, is so no more."""
    config = settings(steps=9, checkpoint_every=4, validation=Validation(**HELD_OUT, patience=9))

    def scores(*given: float) -> None:
        coming = iter(given)
        monkeypatch.setattr(trainer, "validate", lambda *_: {"score": next(coming)})

    out, best = tmp_path / "run", tmp_path / "run" / "checkpoints" / "best"
    scores(0.1, 0.5, 0.4, 0.9)
    begun, _ = run(config, out, cut=7)
    assert sorted(path.name for path in best.iterdir()) == ["step-00000002", "step-00000006"]
    expected = {name: torch.empty_like(tensor) for name, tensor in begun.items()}
    load_part(best / "step-00000002", "model", expected)
    scores(0.4, 0.3, 0.2, 0.2)
    left, _ = run(config, out)
    assert same_bits(left, expected)


def test_what_was_learned_of_the_machine_is_kept(
    settings: Settings, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run begins where memory is short and goes on where there is plenty: its micro-batches stay the same."""
    config = settings()

    def fits(tokens: int) -> None:
        monkeypatch.setattr(trainer, "tokens_per_microbatch", lambda *_: tokens)

    fits(300)
    short, _ = run(config, tmp_path / "run")
    run(config, tmp_path / "again" / "run", cut=4)
    fits(10_000)
    plenty, _ = run(config, tmp_path / "plenty" / "run")
    assert not same_bits(short, plenty)
    got, _ = run(config, tmp_path / "again" / "run", cut=None)
    assert same_bits(got, short)
    assert whole_log(tmp_path / "again" / "run") == whole_log(tmp_path / "run")


def test_a_half_written_line_of_the_log_is_dropped(settings: Settings, run: Run, tmp_path: Path) -> None:
    config = settings()
    run(config, tmp_path / "run")
    again = tmp_path / "again" / "run"
    run(config, again, cut=4)
    with open(again / "log.jsonl", "a") as log:
        log.write('{"step": 4, "source": "na')
    run(config, again)
    assert whole_log(again) == whole_log(tmp_path / "run")


def test_how_a_run_is_kept_and_watched_may_change(settings: Settings, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    expected, _ = run(settings(), tmp_path / "run")
    again = tmp_path / "again" / "run"
    run(settings(checkpoint_every=2), again, cut=5)
    got, made = run(settings(checkpoint_every=1, keep_checkpoints=4, tensorboard=True), again)
    assert made == [4, 5]
    assert same_bits(got, expected)


# --- Refusal

CHANGES = {
    "recipe": (r"recipe\.learning_rate was 0\.01 and is 0\.02", {"learning_rate": 0.02}, {}, 5),
    "nested": (r"recipe\.hard_negatives\.clustering was 2 and is 1", {}, {}, 5),
    "data": (r'inputs\.rows was "old" and is "new"', {}, {"rows": "new"}, 5),
    "seed": (r"seed was 5 and is 6", {}, {}, 6),
    "length": (r"recipe\.steps was 6 and is 8", {"steps": 8}, {}, 5),
}


class Seeded(Sampler):
    """The same batches, said to be of another seed."""

    def __init__(self, batches: Sampler, seed: int) -> None:
        self._batches, self.seed, self.steps, self.streams = batches, seed, batches.steps, batches.streams

    def __getitem__(self, step: int) -> Batch:
        return self._batches[step]


@pytest.mark.parametrize(("sentence", "changes", "inputs", "seed"), CHANGES.values(), ids=CHANGES)
def test_a_changed_run_does_not_go_on_unless_it_has_to(
    sentence: str,
    changes: dict[str, Any],
    inputs: dict[str, str],
    seed: int,
    settings: Settings,
    run: Run,
    tmp_path: Path,
) -> None:
    if "hard_negatives" in sentence:
        changes = {"hard_negatives": settings().hard_negatives.model_copy(update={"clustering": 1})}
    given = {"inputs": {"rows": "old", "base": "the same"}}
    run(settings(), tmp_path, cut=5, **given)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = {"inputs": given["inputs"] | inputs, "sampler": lambda batches: Seeded(batches, seed)}
    with pytest.raises(
        UsageError, match=rf"^the run began otherwise: {sentence}; [^.]*--force\.$"
    ) as refusal:
        run(settings(**changes), tmp_path, **changed)
    assert len(re.findall(r"\.(?:\s|$)", str(refusal.value))) == 1  # one sentence
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    log = steps_of(tmp_path)
    config = settings(**changes)
    _, made = run(config, tmp_path, force=True, **changed)
    assert made == list(range(3, config.steps or 0))
    assert steps_of(tmp_path)[:3] == log[:3]
    rates = [record["learning_rate"] / config.learning_rate for record in steps_of(tmp_path)[3:]]
    assert rates[0] <= 1 and rates == sorted(rates, reverse=True)


# --- A number that is not finite


def test_a_broken_loss_leaves_the_last_good_checkpoint(
    settings: Settings, run: Run, make_model: MakeModel, rows_folder: Path, tmp_path: Path
) -> None:
    """The weights go bad after step 4, and a run that goes on from the checkpoint at 3 ends as if they had not."""
    config = settings(ema=0.9)
    expected, _ = run(config, tmp_path / "run")
    model, again = make_model(), tmp_path / "again" / "run"
    spoil = {4: lambda: model.decoder.norm.weight.data[0].fill_(torch.nan)}
    batches = Stopped(divided(config, rows_folder)[0], spoil)
    checkpoint = again / "checkpoints" / "step-00000003"
    message = rf"^the loss at step 4 of run is nan .* the last checkpoint, {checkpoint}, is kept; lower .*\.$"
    with pytest.raises(F2Error, match=message):
        train(config, model, batches, None, again)
    assert [record["step"] for record in steps_of(again)] == [0, 1, 2, 3]
    assert find_checkpoint(again / "checkpoints", ALONE) == checkpoint
    got, made = run(config, again)
    assert made == [3, 4, 5]
    assert same_bits(got, expected)


# --- Kills

SHAPE = Shape(hidden_size=64, intermediate_size=96, layers=2, heads=4, kv_heads=2, head_dim=8)
SCRIPT = """
import sys
from pathlib import Path
import torch
from f2llm.recipe_train import TrainStage
from f2llm.train.stage import train_stage

torch.set_num_threads(2)
config, data, tokenizer, out = sys.argv[1:]
facts = train_stage(
    TrainStage.model_validate_json(config), data=Path(data), base=None, tokenizer=Path(tokenizer), teacher=None,
    out=Path(out), seed=7, recipe_hash="",
)
print(facts["identity"])
"""


def newest_checkpoint(out: Path) -> int:
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=0)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_in_the_same_model(
    settings: Settings, rows_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """With all that a run carries from step to step; its batches are large enough for threads to share operations."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = settings(
        base=None,
        shape=SHAPE,
        tokenizer="tokenizer",
        steps=16,
        batch_size=64,
        tokens_per_microbatch=1500,
        ema=0.95,
        validation=Validation(rows=12, every=4, patience=9),
        checkpoint_every=2,
    )

    def start(out: Path) -> subprocess.Popen[str]:
        given = [config.model_dump_json(exclude_unset=True), *map(str, (rows_folder, tmp_path, out))]
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *given], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )

    straight, _ = start(tmp_path / "straight").communicate()
    seed = random.randrange(1 << 30)
    moments, killed = random.Random(seed), tmp_path / "killed"
    for step in sorted(moments.sample(range(13), 3)):
        process = start(killed)
        while process.poll() is None and newest_checkpoint(killed) < step:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.2))  # so that it may be writing, or steps beyond the checkpoint
        process.kill()
        assert process.wait() == -signal.SIGKILL
    resumed, _ = start(killed).communicate()
    assert len(straight.strip()) == 64
    assert resumed == straight, f"seed of the moments: {seed}"
    assert whole_log(killed) == whole_log(tmp_path / "straight")
