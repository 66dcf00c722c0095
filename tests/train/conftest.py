"""A training run of seconds, for all tests of the trainer: settings, batches and rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from f2llm.data.rows import read_rows
from f2llm.recipe_train import HardNegatives, TrainStage
from f2llm.train.sampler import Sampler, load_sources
from f2llm.train.stage import make_sampler


@pytest.fixture(scope="session")
def settings() -> Callable[..., TrainStage]:
    """Makes the configuration of a tiny run; keywords are fields of `TrainStage`."""

    def make(**changes: Any) -> TrainStage:
        values: dict[str, Any] = {
            "stage": "train",
            "data": "rows",
            "base": "base",
            "instructions": True,
            "steps": 6,
            "batch_size": 12,
            "max_length": 64,  # the instructions alone take half of it
            "hard_negatives": HardNegatives(retrieval=0, clustering=2, classification=1),
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "checkpoint_every": 3,
        }
        return TrainStage(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def batches(rows_folder: Path) -> Callable[[TrainStage], Sampler]:
    """Makes the sampler of a run over the hand-written rows."""

    def make(config: TrainStage) -> Sampler:
        table, sources = read_rows(rows_folder)
        return make_sampler(config, load_sources(table, sources, config.formats), seed=5)

    return make
