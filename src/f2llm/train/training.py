"""What a run moves and what it learns from: the model with its optimizer and averages, texts as ids, and the teacher.

Shape suffixes: N texts of a batch, D dims of the student.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from f2llm.data.token_store import TokenStore
from f2llm.model.folder import Model
from f2llm.recipe import TrainStage
from f2llm.train.lora import add_lora
from f2llm.train.optim import Average, Optimizer, make_optimizer
from f2llm.train.ranks import Ranks, shard
from f2llm.train.sources import Text
from f2llm.train.step import Ids, vectors_of
from f2llm.train.terms import taught_dimensions

Read = Callable[[Model, Sequence[Text], int], Ids]
"""Token ids of texts for a model, EOS last; those that are longer than so many tokens are cut before it."""

LOWEST_TEMPERATURE = 0.01  # a learnt temperature stays above it, as in CLIP (arXiv 2103.00020)


@dataclass(frozen=True)
class Training:
    """What a run moves, and what its checkpoints hold."""

    model: Model
    optimizer: Optimizer
    average: Average | None
    fixed_temperature: float
    log_temperature: nn.Parameter | None  # 0-d, where the temperature is learnt

    @property
    def temperature(self) -> Tensor:
        """0-d; it carries a gradient if it is learnt."""
        if self.log_temperature is None:
            return torch.tensor(self.fixed_temperature, dtype=torch.float64)
        return self.log_temperature.exp()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All that the next step depends on, live."""
        parts = {"model": self.model.decoder.state_dict(), "optimizer": self.optimizer.state()}
        if self.log_temperature is not None:
            parts["objective"] = {"log_temperature": self.log_temperature.detach()}
        if self.average:
            parts["average"] = self.average.state()
        return parts

    def after_step(self, step: int) -> None:
        """What follows each optimizer step."""
        if self.log_temperature is not None:
            with torch.no_grad():
                self.log_temperature.clamp_(min=math.log(LOWEST_TEMPERATURE))
        if self.average:
            self.average.update(step)

    def finish(self) -> None:
        """Give the model the weights that the run leaves; it is not trained any more."""
        self.optimizer.flush()
        if self.average:
            self.average.swap()

    def finished(self) -> AbstractContextManager[None]:
        """Within this, the model has the weights that a run which ended now would leave."""
        self.optimizer.flush()
        return self.average.applied() if self.average else nullcontext()


@dataclass(frozen=True)
class Teacher:
    """A model to distil from, and which of its dimensions the student's are to equal."""

    model: Model
    taught_D: Tensor
    read: Read

    def vectors(self, texts: Sequence[Text], max_length: int, budget: int, ranks: Ranks) -> Tensor:
        """Raw vectors [N, D] of a batch's texts, without a graph."""
        ids = self.read(self.model, texts, max_length)
        return vectors_of(self.model.decoder, ids, budget, ranks).index_select(1, self.taught_D)


def begin(config: TrainStage, model: Model, seed: int, ranks: Ranks) -> Training:
    """Ready a model for training: adapters, ranks and precision, optimizer, moving average."""
    decoder = model.decoder.train()
    if config.lora:
        add_lora(decoder, config.lora.rank, config.lora.alpha, seed)
    shard(decoder, ranks, precision_of(config, ranks), config.activation_checkpointing)
    log_temperature = None
    if config.learn_temperature:
        log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature), device=ranks.device))
    learnt = {} if log_temperature is None else {"log_temperature": log_temperature}
    return Training(
        model,
        make_optimizer(decoder, config, learnt),
        Average(decoder, config.ema) if config.ema else None,
        config.temperature,
        log_temperature,
    )


def begin_teacher(config: TrainStage, model: Model, teacher: Model, read: Read, ranks: Ranks) -> Teacher:
    taught_D = taught_dimensions(config, model, teacher).to(ranks.device)
    shard(teacher.decoder.eval(), ranks, precision_of(config, ranks), False)
    return Teacher(teacher, taught_D, read)


def reader_of(store: TokenStore) -> Read:
    """Reads texts by their numbers; for models whose tokenizer is the store's (`check_store`)."""

    def read(model: Model, texts: Sequence[Text], max_length: int) -> Ids:
        return [ids_N.tolist() for ids_N in store.tokens(texts, max_length)]

    return read


def precision_of(config: TrainStage, ranks: Ranks) -> Literal["fp32", "bf16"]:
    """Auto is bf16 on a GPU and fp32 on a CPU."""
    if config.precision == "auto":
        return "bf16" if ranks.device.type == "cuda" else "fp32"
    return config.precision
