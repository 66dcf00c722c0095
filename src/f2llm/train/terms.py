"""From a batch of texts to its loss: token ids, roles, the terms and their weights, and what a teacher adds.

Shape suffixes: N texts of a batch, D dims of the student, T of the teacher.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from f2llm.model.base import Base
from f2llm.model.folder import Model
from f2llm.model.tokenizer import encode
from f2llm.recipe_train import TrainStage
from f2llm.train.distillation import Target, distillation_terms, sum_of
from f2llm.train.objective import Roles, contrastive_terms, matryoshka_sizes
from f2llm.train.sampler import Batch
from f2llm.train.sources import Text
from f2llm.train.step import Ids

TEACHER = "teacher_"  # before the names of its terms in a record
Terms = dict[str, Tensor]
Read = Callable[[Model | Base, Sequence[Text], int], Ids]
"""Token ids of texts for a model, EOS last; those that are longer than so many tokens are cut before it."""


@dataclass(frozen=True)
class Taught:
    """A teacher's vectors of a batch's texts, and what the student's are set against."""

    vectors_NT: Tensor
    target: Target


def make_loss(
    config: TrainStage,
    batch: Batch,
    taught: Taught | None,
    temperature: Tensor,
    terms: Terms,
    exits: Sequence[int] = (),
) -> Callable[[Tensor], Tensor]:
    """The loss of a batch as a function of its raw vectors [N, D]; what it consists of is left in `terms`.

    With `exits` the vectors are [N, exits * D + D] and the loss is the mean over them and the whole model; `terms` gets
    the whole model's, and the loss of each exit.
    """
    weights = weights_of(config) if taught else {}

    def loss_of(vectors_ND: Tensor) -> Tensor:
        *of_exits, of_all = vectors_ND.chunk(len(exits) + 1, dim=1)
        losses = [loss_at(of_all, terms)]
        for layers, left_ND in zip(exits, of_exits, strict=True):
            losses.append(loss_at(left_ND, {}))
            terms[f"exit_{layers}"] = losses[-1].detach()
        return torch.stack(losses).mean()

    def loss_at(vectors_ND: Tensor, terms: Terms) -> Tensor:
        roles, sizes = roles_of(batch, vectors_ND.device), trained_sizes(config, vectors_ND.shape[1])
        found: Terms = {}
        if not taught or config.distillation.contrastive:
            found |= contrastive_terms(
                vectors_ND,
                roles,
                sizes,
                temperature.to(vectors_ND),
                kind=config.objective,
                gather_gradient=config.gather_gradient,
                both_directions=config.both_directions,
            )
        if taught:
            asked = config.distillation
            of_teacher = distillation_terms(
                vectors_ND,
                taught.vectors_NT.to(vectors_ND),
                roles,
                sizes,
                taught.target,
                asked.terms,
                asked.temperature,
            )
            found |= {TEACHER + name: term for name, term in of_teacher.items()}
        terms.update({name: term.detach() for name, term in found.items()})
        others = config.distillation.contrastive if taught else 1.0
        return sum_of(weights.get(name, others) * term for name, term in found.items())

    return loss_of


def weights_of(config: TrainStage) -> dict[str, float]:
    """Weights of the teacher's terms, by their names in a record."""
    return {TEACHER + name: weight for name, weight in config.distillation.terms.items()}


def roles_of(batch: Batch, device: torch.device) -> Roles:
    query_B, positive_B, negative_BK, same_BB, known_P2 = (
        torch.from_numpy(array).to(device)
        for array in (batch.query_B, batch.positive_B, batch.negative_BK, batch.same_BB, batch.known_P2)
    )
    return Roles(query_B, positive_B, negative_BK, same_BB, known_P2, batch.in_batch)


def token_ids(model: Model | Base, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Ids of texts, EOS last; longer texts are cut before it."""
    return encode(
        model.tokenizer, texts, eos_id=model.facts.eos_id, max_length=max_length, too_long="truncate"
    )


def trained_sizes(config: TrainStage, width: int) -> list[int]:
    """The prefixes that the contrastive terms are taken of."""
    return matryoshka_sizes(width) if config.matryoshka else [width]
