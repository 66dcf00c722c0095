"""Whole training runs on several ranks: they go as on one, and go on after a stop on any other number of them."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.gloo import on_ranks
from tests.train.runs import steps_of, validations_of
from torch import Tensor

from f2llm.model.folder import load_model, save_model
from f2llm.recipe import Lora, TrainStage, Validation
from f2llm.train import stage
from f2llm.train.ranks import ALONE, Ranks
from f2llm.train.stage import train_stage

# Micro-batches of 60 tokens are several, and not as many on each rank.
RUNS = {
    "everything": {
        "teacher": "teacher",
        "objective": "joint",
        "both_directions": True,
        "learn_temperature": True,
        "ema": 0.9,
        "activation_checkpointing": True,
        "tokens_per_microbatch": 60,
    },
    "adapters": {
        "lora": Lora(rank=2, alpha=4.0),
        "validation": Validation(rows=12, every=2, patience=9),
        "tokens_per_microbatch": 60,
    },
    "as memory allows": {"gather_gradient": False},
}


@dataclass(frozen=True)
class Work:
    """Stages to train, and where."""

    configs: dict[str, TrainStage]
    given: dict[str, Path]
    out: Path

    def train(self, ranks: Ranks = ALONE) -> dict[str, dict[str, Any]]:
        """The facts of each stage."""
        return {
            name: train_stage(
                config,
                **self.given,
                tokenizer=None,
                teacher=self.given["base"].with_name("teacher") if config.teacher else None,
                out=self.out / name,
                seed=7,
                recipe_hash="the recipe's hash",
                ranks=ranks,
            )
            for name, config in self.configs.items()
        }


def train_on(ranks: Ranks, work: Work) -> dict[str, dict[str, Any]]:
    return work.train(ranks)


def train_and_keep_checkpoints(ranks: Ranks, work: Work) -> dict[str, dict[str, Any]]:
    stage.drop_checkpoints = lambda folder: None
    return work.train(ranks)


@pytest.fixture(scope="module")
def work(
    settings: Callable[..., TrainStage],
    rows_folder: Path,
    make_model: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Work]:
    """Makes the work of all RUNS, to be done in a folder of a name."""
    folder = tmp_path_factory.mktemp("work")
    save_model(folder / "base", make_model())
    save_model(folder / "teacher", make_model(seed=1, hidden_size=30))
    configs = {
        name: settings(steps=6, checkpoint_every=3, learning_rate=1e-3, **run) for name, run in RUNS.items()
    }
    return lambda name: Work(configs, {"data": rows_folder, "base": folder / "base"}, folder / name)


@pytest.fixture(scope="module")
def one(work: Callable[[str], Work]) -> Work:
    """Done straight by one process."""
    (done := work("one")).train()
    return done


@pytest.fixture(scope="module")
def two(work: Callable[[str], Work]) -> tuple[Work, list[dict[str, dict[str, Any]]]]:
    """Done straight by two ranks, with the facts that they tell; the last checkpoint of each run is left."""
    done = work("two")
    return done, on_ranks(2, train_and_keep_checkpoints, done)


@pytest.fixture(scope="module")
def continued(work: Callable[[str], Work], two: tuple[Work, Any]) -> Callable[[int], Work]:
    """What two ranks left after step 3, continued by another number of them."""

    def go_on(world: int) -> Work:
        again = work(f"continued by {world}")
        for name in again.configs:
            shutil.copytree(two[0].out / name / "checkpoints", again.out / name / "checkpoints")
            shutil.copy(two[0].out / name / "log.jsonl", again.out / name)  # of a kill in step 5
        if world == 1:
            again.train()
        else:
            on_ranks(world, train_on, again)
        return again

    return go_on


def check_same(got: Work, expected: Work) -> None:
    """The same losses, norms and validations in the log, and the same weights, but for rounding."""
    for name in expected.configs:
        one, other = steps_of(expected.out / name), steps_of(got.out / name)
        assert [record["step"] for record in other] == list(range(6))
        for here, there in zip(one, other, strict=True):
            assert here.keys() == there.keys()
            for key, value in here.items():
                close = value if isinstance(value, str | int) else pytest.approx(value, rel=1e-5, abs=1e-9)
                assert there[key] == close, (name, key)
        # A score counts ranks, which rounding may turn only where two texts are equally near.
        assert validations_of(got.out / name).keys() == validations_of(expected.out / name).keys()
        weights = [load_model(work.out / name).decoder.state_dict() for work in (expected, got)]
        assert weights[0].keys() == weights[1].keys()
        for tensor, weight in weights[0].items():
            torch.testing.assert_close(weights[1][tensor], weight, rtol=0, atol=1e-4)


def test_two_ranks_train_as_one(one: Work, two: tuple[Work, list[dict[str, dict[str, Any]]]]) -> None:
    work, (main, other) = two
    check_same(work, one)
    for name, facts in main.items():
        assert facts["ranks"] == 2
        assert facts["identity"] == other[name]["identity"] == load_model(work.out / name).facts.identity


@pytest.mark.parametrize("world", [1, 3])
def test_a_run_goes_on_on_another_number_of_ranks(
    world: int, one: Work, continued: Callable[[int], Work]
) -> None:
    check_same(continued(world), one)
