"""The losses of three small runs, step by step, as committed: a change that moves a number has to say so.

Twenty steps in float64 and on one thread, over hand-written names (tests/things.tsv): tokenizer, sampler, decoder,
objective with all its terms, optimizer and schedule all have a share in each number. To accept new curves:

    F2LLM_ACCEPT_LOSSES=1 .venv/bin/python -m pytest tests/train/test_loss_curve.py
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from f2llm.model.decoder import initialise
from f2llm.model.folder import Model
from f2llm.recipe_train import HardNegatives, TrainStage
from f2llm.train.sampler import Sampler
from f2llm.train.trainer import train
from f2llm.train.watch import read_log

COMMON: dict[str, Any] = {"steps": 20, "warmup_steps": 4, "learning_rate": 1e-3}
RUNS: dict[str, dict[str, Any]] = {
    # Both terms of the paper, all formats, and a teacher.
    "distilled": {
        "teacher": "teacher",
        "hard_negatives": HardNegatives(retrieval=0, clustering=3, classification=1),
    },
    # One softmax, a learnt temperature, cached gradients, rows of the table moved when they are met.
    "joint": {
        "objective": "joint",
        "both_directions": True,
        "learn_temperature": True,
        "tokens_per_microbatch": 40,
        "embedding_rows": "exact",
        "cap": 20,
        "language_temperature": 2.0,
    },
    # The reference code's gather, one size, another schedule, and averaged weights.
    "plain": {
        "formats": ["retrieval"],
        "matryoshka": False,
        "gather_gradient": False,
        "schedule": "linear",
        "floor": 0.1,
        "ema": 0.9,
        "instructions": False,
    },
}


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_committed_ones(
    name: str,
    settings: Callable[..., TrainStage],
    batches: Callable[[TrainStage], Sampler],
    make_model: Callable[..., Model],
    tmp_path: Path,
) -> None:
    config = settings(**COMMON, **RUNS[name])
    model, teacher = make_model(), make_model(seed=1, hidden_size=32)
    for seed, one in enumerate((model, teacher)):
        initialise(one.decoder.double(), torch.Generator().manual_seed(seed))
    train(config, model, batches(config), teacher if config.teacher else None, tmp_path)
    log = [record for record in read_log(tmp_path / "log.jsonl") if "loss" in record]
    curve = Path(__file__).with_name(f"loss_{name}.txt")
    if os.environ.get("F2LLM_ACCEPT_LOSSES"):
        lines = ["# step, source, loss; written by test_loss_curve.py"]
        lines += [f"{line['step']} {line['source']} {line['loss']:.12g}" for line in log]
        curve.write_text("\n".join(lines) + "\n", encoding="utf-8")
    committed = [line.split() for line in curve.read_text(encoding="utf-8").splitlines()[1:]]
    assert [(str(line["step"]), line["source"]) for line in log] == [
        (step, source) for step, source, _ in committed
    ]
    assert [line["loss"] for line in log] == pytest.approx([float(loss) for *_, loss in committed], rel=1e-6)
