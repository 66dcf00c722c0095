"""Training steps of a student with its teacher: as the trainer takes them, without its log and its checkpoints.

The batch is the same in each step. Without a cache the teacher is in memory and computes its vectors in every step.
"""

import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from f2llm.data.rows import Source
from f2llm.files import read_json
from f2llm.model.base import read_base
from f2llm.model.folder import load_model
from f2llm.recipe_train import Distillation, HardNegatives, TrainStage
from f2llm.train.ranks import ALONE
from f2llm.train.sources import SourceRows
from f2llm.train.stage import make_sampler
from f2llm.train.step import accumulate_gradients
from f2llm.train.teacher import open_teacher, target_of
from f2llm.train.terms import Taught, make_loss, token_ids
from f2llm.train.training import begin

SEED = 0
SOURCE = Source(
    name="texts", format="retrieval", task="answer", symmetric=False, instruction="", licence="unknown"
)


def commands(
    student: str, teacher: str, rows_file: str, cache: str | None = None
) -> dict[str, Callable[..., Any]]:
    torch.set_flush_denormal(True)  # as the trainer does
    rows = rows_of(read_json(Path(rows_file)))
    model = load_model(Path(student))
    config = TrainStage(
        stage="train",
        data="./rows",
        base=student,
        teacher=teacher,
        distillation=Distillation(terms={"mse": 1.0}, target="prefix", cache=cache),
        instructions=False,
        steps=1,
        batch_size=len(rows),
        max_length=model.facts.max_length,
        hard_negatives=HardNegatives(retrieval=len(rows.negatives[0])),
        learning_rate=1e-5,
    )
    sampler = make_sampler(config, [rows], SEED)
    batch = sampler[0]
    taught_by = open_teacher(config, read_base(teacher), sampler, token_ids, ALONE, 0)
    training = begin(config, model, SEED, ALONE)
    target, optimizer = target_of(config, training, taught_by), training.optimizer

    def step() -> dict[str, float]:
        """Seconds of a step, and its loss before the weights move."""
        started = time.perf_counter()
        ids = token_ids(model, batch.texts, config.max_length)
        optimizer.zero_grad()
        optimizer.prepare(torch.tensor(list(chain.from_iterable(ids))))
        taught = Taught(taught_by.vectors(batch.texts), target)
        loss_of = make_loss(config, batch, taught, training.temperature, {})
        loss, _ = accumulate_gradients(model.decoder, ids, loss_of, sum(map(len, ids)), ALONE)
        optimizer.clip(config.clip_norm)
        optimizer.step()
        return {"seconds": time.perf_counter() - started, "loss": loss.item()}

    return {"step": step}


def rows_of(columns: dict[str, Any]) -> SourceRows:
    """Rows of one source, from their queries, positives and negatives."""
    count = len(columns["query"])
    return SourceRows(SOURCE, **columns, query_lang=["und"] * count, label=[None] * count)
