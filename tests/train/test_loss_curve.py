"""The loss of a small run, step by step, as committed: a change that moves a number has to say so.

Twenty steps in float64 and on one thread, over hand-written names (tests/things.tsv): tokenizer, sampler, decoder,
objective with all its terms, optimizer and schedule all have a share in each number. To accept a new curve:

    F2LLM_ACCEPT_LOSSES=1 .venv/bin/python -m pytest tests/train/test_loss_curve.py
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from f2llm.model.decoder import initialise
from f2llm.model.folder import Model
from f2llm.recipe import HardNegatives, TrainStage
from f2llm.train.sampler import Sampler
from f2llm.train.trainer import train

CURVE = Path(__file__).with_name("loss_small.txt")


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_losses_are_the_committed_ones(
    settings: Callable[..., TrainStage],
    batches: Callable[[TrainStage], Sampler],
    make_model: Callable[..., Model],
    tmp_path: Path,
) -> None:
    config = settings(
        teacher="teacher",
        steps=20,
        warmup_steps=4,
        learning_rate=1e-3,
        hard_negatives=HardNegatives(retrieval=0, clustering=3, classification=1),
    )
    model, teacher = make_model(), make_model(seed=1, hidden_size=32)
    for seed, one in enumerate((model, teacher)):
        initialise(one.decoder.double(), torch.Generator().manual_seed(seed))
    train(config, model, batches(config), teacher, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    if os.environ.get("F2LLM_ACCEPT_LOSSES"):
        lines = ["# step, source, loss; written by test_loss_curve.py"]
        lines += [f"{line['step']} {line['source']} {line['loss']:.12g}" for line in log]
        CURVE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    committed = [line.split() for line in CURVE.read_text(encoding="utf-8").splitlines()[1:]]
    assert [(str(line["step"]), line["source"]) for line in log] == [
        (step, name) for step, name, _ in committed
    ]
    assert [line["loss"] for line in log] == pytest.approx([float(loss) for *_, loss in committed], rel=1e-6)
