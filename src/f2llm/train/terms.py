"""From a batch of texts to its loss: token ids, roles, the terms and their weights, and what a teacher adds.

Shape suffixes: N texts of a batch, D dims of the student.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from f2llm.errors import UsageError
from f2llm.model.folder import Model
from f2llm.model.tokenizer import encode
from f2llm.recipe import TrainStage
from f2llm.train.objective import Roles, contrastive_terms, distillation_term, matryoshka_sizes
from f2llm.train.sampler import Batch

Terms = dict[str, Tensor]


def make_loss(
    config: TrainStage, batch: Batch, teacher_ND: Tensor | None, temperature: Tensor, terms: Terms
) -> Callable[[Tensor], Tensor]:
    """The loss of a batch as a function of its raw vectors [N, D]; what it consists of is left in `terms`."""

    def loss_of(vectors_ND: Tensor) -> Tensor:
        roles = roles_of(batch, vectors_ND.device)
        found = contrastive_terms(
            vectors_ND,
            roles,
            trained_sizes(config, vectors_ND.shape[1]),
            temperature.to(vectors_ND),
            kind=config.objective,
            gather_gradient=config.gather_gradient,
            both_directions=config.both_directions,
        )
        if teacher_ND is not None:
            found["distillation"] = distillation_term(vectors_ND, teacher_ND.to(vectors_ND), roles)
        terms.update({name: term.detach() for name, term in found.items()})
        return torch.stack([weight_of(config, name) * term for name, term in found.items()]).sum()

    return loss_of


def roles_of(batch: Batch, device: torch.device) -> Roles:
    query_B, positive_B, negative_BK, same_BB, known_P2 = (
        torch.from_numpy(array).to(device)
        for array in (batch.query_B, batch.positive_B, batch.negative_BK, batch.same_BB, batch.known_P2)
    )
    return Roles(query_B, positive_B, negative_BK, same_BB, known_P2, batch.in_batch)


def weight_of(config: TrainStage, term: str) -> float:
    return config.distillation_weight if term == "distillation" else 1.0


def token_ids(model: Model, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Ids of texts, EOS last; longer texts are cut before it."""
    return encode(
        model.tokenizer, texts, eos_id=model.facts.eos_id, max_length=max_length, too_long="truncate"
    )


def trained_sizes(config: TrainStage, width: int) -> list[int]:
    """The prefixes that the contrastive terms are taken of."""
    return matryoshka_sizes(width) if config.matryoshka else [width]


def taught_dimensions(config: TrainStage, model: Model, teacher: Model) -> Tensor:
    """Which of the teacher's dimensions the student's are to equal: int64 [D], D the student's width."""
    width, teacher_width = model.decoder.config.hidden_size, teacher.decoder.config.hidden_size
    dimensions = list(range(width))
    if config.distillation_target == "kept":
        kept = model.facts.kept
        if kept is None or kept["of"] not in (teacher.facts.identity, teacher.facts.parent):
            raise UsageError(
                "distillation_target is 'kept', but the student was not cut from the teacher or from the model that "
                "the teacher was trained from, so their dimensions do not correspond; take 'prefix'."
            )
        dimensions = kept["hidden"]
    if max(dimensions) >= teacher_width:
        raise UsageError(
            f"the teacher is {teacher_width} wide, but its student of {width} is to learn its dimension "
            f"{max(dimensions)}; take a wider teacher."
        )
    return torch.tensor(dimensions)
