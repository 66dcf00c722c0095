"""Whole training runs on several ranks: they go as on one, and go on after a stop on any other number of them."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tests.train.gloo import on_ranks
from tests.train.runs import steps_of, validations_of

from f2llm.errors import UsageError
from f2llm.files import sha256_folder
from f2llm.model.folder import load_model, save_model
from f2llm.recipe_train import Lora, TrainStage, Validation
from f2llm.train import stage
from f2llm.train.ranks import ALONE, Ranks
from f2llm.train.stage import train_stage
from f2llm.train.watch import read_log

# Micro-batches of 60 tokens are several, and not as many on each rank.
RUNS: dict[str, dict[str, Any]] = {
    "everything": {
        "teacher": "teacher",
        "objective": "joint",
        "both_directions": True,
        "learn_temperature": True,
        "ema": 0.9,
        "activation_checkpointing": True,
        "validation": Validation(rows=12, every=2, patience=9),
        "tokens_per_microbatch": 60,
    },
    "as memory allows": {"gather_gradient": False, "exits": [1], "table_ranks": [12]},
    "through a projection, from a cache": {
        "teacher": "teacher",
        "distillation": {
            "terms": {"mse": 1.0, "cosine": 1.0, "similarity": 1.0, "ranking": 1.0},
            "target": "projection",
            "cache": "put into the work's folder",
        },
    },
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "adapters": {"lora": Lora(rank=2, alpha=4.0), "tokens_per_microbatch": 60},
}
BY_ROWS: dict[str, dict[str, Any]] = {
    "exact rows": {"embedding_rows": "exact"},
    "lazy rows": {"embedding_rows": "lazy"},
}


@dataclass(frozen=True)
class Work:
    """Stages to train, of what, and where."""

    configs: dict[str, TrainStage]
    rows: Path
    models: Path  # folder of the base and the teacher
    out: Path

    def train(self, ranks: Ranks = ALONE) -> dict[str, dict[str, Any]]:
        """The facts of each stage."""
        return {
            name: train_stage(
                _with_cache_in(self.out / f"teacher of {name}", config),
                data=self.rows,
                base=self.models / "base",
                tokenizer=None,
                teacher=self.models / "teacher" if config.teacher else None,
                out=self.out / name,
                seed=7,
                recipe_hash="the recipe's hash",
                ranks=ranks,
            )
            for name, config in self.configs.items()
        }

    def go_on(self, name: str, world: int) -> "Work":
        """The same work, from what is left of it in another folder as of a kill in step 5, on `world` ranks."""
        again = replace(self, out=self.out.with_name(name))
        for run in self.configs:
            shutil.copytree(self.out / run / "checkpoints", again.out / run / "checkpoints")
            shutil.copy(self.out / run / "log.jsonl", again.out / run)
        on_ranks(world, train_on, again) if world > 1 else again.train()
        for run in self.configs:  # its clock tells the log of a step that was not done again
            assert _first_steps(again.out / run) == _first_steps(self.out / run)
        return again


def _with_cache_in(folder: Path, config: TrainStage) -> TrainStage:
    if not config.distillation.cache:
        return config
    distillation = config.distillation.model_copy(update={"cache": str(folder)})
    return config.model_copy(update={"distillation": distillation})


def _first_steps(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_log(folder / "log.jsonl") if record["step"] < 3]


def train_on(ranks: Ranks, work: Work) -> dict[str, dict[str, Any]]:
    return work.train(ranks)


def train_and_keep_checkpoints(ranks: Ranks, work: Work) -> dict[str, dict[str, Any]]:
    with patch.object(stage, "drop_checkpoints", lambda folder: None):
        return work.train(ranks)


def refusals(ranks: Ranks, work: Work) -> dict[str, str]:
    """What each run is refused with."""
    sentences = {}
    for name, config in work.configs.items():
        with pytest.raises(UsageError) as refusal:
            replace(work, configs={name: config}).train(ranks)
        sentences[name] = str(refusal.value)
    return sentences


MakeWork = Callable[[str, dict[str, dict[str, Any]]], Work]


@pytest.fixture(scope="module")
def make_work(
    settings: Callable[..., TrainStage],
    rows_folder: Path,
    make_model: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> MakeWork:
    """Makes the work of some runs, to be done in a folder of a name."""
    folder = tmp_path_factory.mktemp("work")
    save_model(folder / "base", make_model())
    save_model(folder / "teacher", make_model(seed=1, hidden_size=30))

    def make(name: str, runs: dict[str, dict[str, Any]]) -> Work:
        common = {"steps": 6, "checkpoint_every": 3, "learning_rate": 1e-3}
        configs = {run: settings(**common, **changes) for run, changes in runs.items()}
        return Work(configs, rows_folder, folder, folder / name)

    return make


@pytest.fixture(scope="module")
def one(make_work: MakeWork) -> Work:
    """Done straight by one process; the last checkpoint of each run is left."""
    train_and_keep_checkpoints(ALONE, done := make_work("one", RUNS))
    return done


@pytest.fixture(scope="module")
def two(make_work: MakeWork) -> tuple[Work, list[dict[str, dict[str, Any]]]]:
    """The same by two ranks, with the facts that they tell."""
    done = make_work("two", RUNS)
    return done, on_ranks(2, train_and_keep_checkpoints, done)


def check_same(got: Work, expected: Work) -> None:
    """The same losses, norms and validations in the log, and the same weights, but for rounding."""
    for name in expected.configs:
        one, other = steps_of(expected.out / name), steps_of(got.out / name)
        assert [record["step"] for record in other] == list(range(6))
        for here, there in zip(one, other, strict=True):
            assert here.keys() == there.keys()
            for key, value in here.items():
                # A cache rounds to 11 bits, so vectors that differ in the 24th may do so in the 11th.
                rounding = 1e-3 if "cache" in name else 1e-5
                close = (
                    value if isinstance(value, str | int) else pytest.approx(value, rel=rounding, abs=1e-9)
                )
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


def test_what_two_ranks_left_is_ended_by_one(one: Work, two: tuple[Work, Any]) -> None:
    check_same(two[0].go_on("two, then one", 1), one)


@pytest.mark.slow
def test_what_two_ranks_left_is_ended_by_three(one: Work, two: tuple[Work, Any]) -> None:
    check_same(two[0].go_on("two, then three", 3), one)


@pytest.mark.slow
def test_what_one_left_is_ended_by_two_ranks(one: Work) -> None:
    check_same(one.go_on("one, then two", 2), one)


@pytest.mark.slow  # peft takes seconds to import, on each rank
def test_two_ranks_train_adapters_as_one(make_work: MakeWork) -> None:
    one, two = make_work("adapters of one", ADAPTERS), make_work("adapters of two", ADAPTERS)
    one.train()
    on_ranks(2, train_and_keep_checkpoints, two)
    check_same(two, one)
    check_same(two.go_on("adapters of two, then one", 1), one)


@pytest.mark.slow
def test_a_table_that_learns_by_rows_is_for_one_process(make_work: MakeWork) -> None:
    """From the start, and where one process has begun, whose checkpoints stay as they are."""
    begun, fresh = make_work("by rows", BY_ROWS), make_work("by rows on two", BY_ROWS)
    train_and_keep_checkpoints(ALONE, begun)
    before = sha256_folder(begun.out)
    for work in (begun, fresh):
        for sentences in on_ranks(2, refusals, work):
            for name, config in BY_ROWS.items():
                expected = (
                    f"'embedding_rows' is '{config['embedding_rows']}', which needs the whole embedding table"
                )
                assert sentences[name].startswith(expected)
                assert sentences[name].endswith("train in one process and fp32, or take 'dense'.")
    assert sha256_folder(begun.out) == before
    assert not fresh.out.exists()
