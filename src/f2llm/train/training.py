"""What a run moves: the model with its optimizer and averages, and what is learnt beside it.

Shape suffixes: N tokens of a text, D dims of the student, T of its teacher.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from f2llm.data.token_store import TokenStore
from f2llm.errors import UsageError
from f2llm.model.base import Base
from f2llm.model.decoder import Cuts, DecoderConfig
from f2llm.model.folder import Model
from f2llm.model.slices import onto_rank, table_basis
from f2llm.recipe_train import TrainStage
from f2llm.rng import generator
from f2llm.train.lora import add_lora
from f2llm.train.optim import Average, Optimizer, make_optimizer
from f2llm.train.ranks import Ranks, shard
from f2llm.train.sources import Text
from f2llm.train.step import Ids
from f2llm.train.terms import Read

# Names of what is learnt beside the model's weights: the temperature's logarithm (0-d), and the matrix through which a
# student's vectors are compared with its teacher's [T, D].
LOG_TEMPERATURE, PROJECTION = "log_temperature", "projection"
LOWEST_TEMPERATURE = 0.01  # a learnt temperature stays above it, as in CLIP (arXiv 2103.00020)


@dataclass(frozen=True)
class Training:
    """What a run moves, and what its checkpoints hold."""

    model: Model
    optimizer: Optimizer
    average: Average | None
    fixed_temperature: float
    learnt: dict[str, nn.Parameter]  # beside the model's weights: see LOG_TEMPERATURE and PROJECTION
    table_basis_EE: (
        Tensor | None
    )  # directions of the embedding table, the largest first, if ranks of it are trained

    @property
    def temperature(self) -> Tensor:
        """0-d; it carries a gradient if it is learnt."""
        if LOG_TEMPERATURE not in self.learnt:
            return torch.tensor(self.fixed_temperature, dtype=torch.float64)
        return self.learnt[LOG_TEMPERATURE].exp()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All that the next step depends on, live."""
        parts = {"model": self.model.decoder.state_dict(), "optimizer": self.optimizer.state()}
        beside = {name: parameter.detach() for name, parameter in self.learnt.items()}
        if self.table_basis_EE is not None:
            beside["table_basis"] = self.table_basis_EE
        if beside:
            parts["objective"] = beside
        if self.average:
            parts["average"] = self.average.state()
        return parts

    def after_step(self, step: int) -> None:
        """What follows each optimizer step."""
        if LOG_TEMPERATURE in self.learnt:
            with torch.no_grad():
                self.learnt[LOG_TEMPERATURE].clamp_(min=math.log(LOWEST_TEMPERATURE))
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


def begin(
    config: TrainStage, model: Model, seed: int, ranks: Ranks, taught_width: int | None = None
) -> Training:
    """Ready a model for training: adapters, ranks and precision, optimizer, moving average.

    Args:
        taught_width: of a teacher, if a projection onto its dimensions is trained along; it begins at zero.
    """
    decoder = model.decoder.train()
    basis_EE = table_basis(decoder.embed_tokens.weight.detach()) if config.table_ranks else None
    if config.lora:
        add_lora(decoder, config.lora.rank, config.lora.alpha, seed)
    shard(decoder, ranks, precision_of(config, ranks), config.activation_checkpointing)
    learnt = {}
    if config.learn_temperature:
        begins = torch.tensor(math.log(config.temperature), device=ranks.device)
        learnt[LOG_TEMPERATURE] = nn.Parameter(begins)
    if taught_width is not None:
        shape = (taught_width, decoder.config.hidden_size)
        learnt[PROJECTION] = nn.Parameter(torch.zeros(shape, device=ranks.device))
    return Training(
        model,
        make_optimizer(decoder, config, learnt),
        Average(decoder, config.ema) if config.ema else None,
        config.temperature,
        learnt,
        None if basis_EE is None else basis_EE.to(ranks.device),
    )


def check_cuts(config: TrainStage, shape: DecoderConfig) -> None:
    """Refuse exits and ranks that the model does not have inside."""
    for name, values, most, what in (
        ("exits", config.exits, shape.num_hidden_layers, "layers"),
        ("table_ranks", config.table_ranks, shape.hidden_size, "dimensions"),
    ):
        if values and values[-1] >= most:
            raise UsageError(
                f"{name!r} has {values[-1]}, but the model has {most} {what}; give smaller numbers."
            )


def cuts_of(config: TrainStage, training: Training, seed: int, step: int) -> Cuts:
    """The exits of a step, and the rank of the table that it draws: one of `table_ranks`, or the whole."""
    basis_EE = training.table_basis_EE
    if basis_EE is None:
        return Cuts(config.exits)
    drawn = int(generator(seed, "table rank", step).integers(len(config.table_ranks) + 1))
    if drawn == len(config.table_ranks):
        return Cuts(config.exits)
    return Cuts(config.exits, onto_rank(basis_EE, config.table_ranks[drawn]))


def reader_of(store: TokenStore) -> Read:
    """Reads texts by their numbers; for models whose tokenizer is the store's (`check_store`)."""

    def read(model: Model | Base, texts: Sequence[Text], max_length: int) -> Ids:
        return [ids_N.tolist() for ids_N in store.tokens(texts, max_length)]

    return read


def precision_of(config: TrainStage, ranks: Ranks) -> Literal["fp32", "bf16"]:
    """Auto is bf16 on a GPU and fp32 on a CPU."""
    if config.precision == "auto":
        return "bf16" if ranks.device.type == "cuda" else "fp32"
    return config.precision
