"""What the tests of the training loop share: runs that are cut short, and logs without what the clock says."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from f2llm.data.rows import read_rows
from f2llm.model.folder import Model
from f2llm.recipe_train import TrainStage
from f2llm.train.distillation import Target, distillation_terms
from f2llm.train.objective import Roles
from f2llm.train.sampler import Batch, Sampler
from f2llm.train.sources import SourceRows, load_sources
from f2llm.train.stage import make_sampler, split
from f2llm.train.watch import read_log

Settings = Callable[..., TrainStage]
Batches = Callable[[TrainStage], Sampler]
MakeModel = Callable[..., Model]

NOISE = {"tokens_per_second", "memory_gigabytes"}


class Stopped(Sampler):
    """The batches of another sampler; before the run takes that of a certain step, something happens."""

    def __init__(self, sampler: Sampler, before: Mapping[int, Callable[[], object]] | None = None) -> None:
        self._sampler, self._before = sampler, before or {}
        self.seed, self.steps, self.streams = sampler.seed, sampler.steps, sampler.streams
        self.made: list[int] = []  # steps whose batch the run took, in order

    def __getitem__(self, step: int) -> Batch:
        # Before its first step a run looks at some batches, to see how many tokens they have.
        if sys._getframe(1).f_code.co_name == "make":
            self._before.get(step, lambda: None)()
            self.made.append(step)
        return self._sampler[step]


def interrupt() -> None:
    """A Ctrl-C."""
    raise KeyboardInterrupt


def whole_log(folder: Path) -> list[dict[str, Any]]:
    """All records of a run's log."""
    return [
        {key: value for key, value in record.items() if key not in NOISE}
        for record in read_log(folder / "log.jsonl")
    ]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Those of its steps."""
    return [record for record in whole_log(folder) if "loss" in record]


def validations_of(folder: Path) -> dict[int, dict[str, Any]]:
    """Its validations, by the number of steps done."""
    return {r["step"]: r["validation"] for r in whole_log(folder) if "validation" in r}


def weights(model: Model) -> dict[str, Tensor]:
    """A copy of a model's weights."""
    return {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def load_part(checkpoint: Path, part: str, into: dict[str, Tensor]) -> None:
    """Read the tensors of one part of a checkpoint by torch's own hand."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    named = {f"{part}/{name}": tensor for name, tensor in into.items()}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that this process is alone
        load(named, storage_reader=FileSystemReader(checkpoint))


def mse_to(teacher_ND: Tensor, vectors_ND: Tensor, roles: Roles) -> Tensor:
    """The paper's distillation term, from a teacher as wide as the student."""
    width = vectors_ND.shape[1]
    target = Target(torch.arange(width))
    return distillation_terms(vectors_ND, teacher_ND, roles, [width], target, {"mse": 1.0}, 1.0)["mse"]


def divided(config: TrainStage, rows_folder: Path) -> tuple[Sampler, Sequence[SourceRows]]:
    """The batches of a run over the hand-written rows, and the rows that its validation holds out."""
    table, sources = read_rows(rows_folder)
    rows, held_out = split(config, load_sources(table, sources, config.formats), seed=5)
    return make_sampler(config, rows, seed=5), held_out
