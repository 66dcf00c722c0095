"""The training objective, as functions of embeddings; the only place that knows losses.

The method is F2LLM-v2's (arXiv 2603.19223, sections 3.1 and 3.3; constants from the reference code
codefuse-ai/CodeFuse-Embeddings): two softmaxes over cosine similarities with one temperature. The hard term
(all formats) sets a query's positive against its own hard negatives; the in-batch term (retrieval only) against
the positives of the other queries. Both are summed over Matryoshka prefixes; distillation adds a mean squared
error to a teacher's raw vectors.

Shape suffixes: B queries, K hard negatives per query, D dims of the student, N vectors.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.05


def matryoshka_sizes(dim: int, smallest: int = 8) -> list[int]:
    """Prefix sizes 8, 16, 32 ... below `dim`, then `dim` itself, ascending."""
    powers = [smallest << k for k in range(64) if smallest << k < dim]
    return [*powers, dim]


def matryoshka_weights(sizes: list[int]) -> list[float]:
    """Weight of each prefix: the n-th largest of full width d gets 1 / (n * sqrt(d / size)) (reference code)."""
    descending = sorted(sizes, reverse=True)
    rank = {size: n for n, size in enumerate(descending, start=1)}
    return [1.0 / (rank[size] * math.sqrt(descending[0] / size)) for size in sizes]


def in_batch_loss(q_BD: Tensor, positive_BD: Tensor, same_BB: Tensor, temperature: float) -> Tensor:
    """Mean over queries of -log softmax of the own positive among the positives of the batch.

    `same_BB[i, j]` (bool) marks positives j that may be right for query i as well (the same text, or the same
    thing); they leave the denominator. Its diagonal is ignored. Vectors must have unit length.
    """
    scores_BB = q_BD @ positive_BD.T / temperature
    same_BB = same_BB & ~torch.eye(len(q_BD), dtype=torch.bool, device=q_BD.device)
    return F.cross_entropy(
        scores_BB.masked_fill(same_BB, -math.inf), torch.arange(len(q_BD), device=q_BD.device)
    )


def hard_loss(q_BD: Tensor, positive_BD: Tensor, negative_BKD: Tensor, temperature: float) -> Tensor:
    """Mean over queries of -log softmax of the own positive among itself and the query's own hard negatives."""
    positive_B1 = (q_BD * positive_BD).sum(-1, keepdim=True)
    negative_BK = torch.einsum("bd,bkd->bk", q_BD, negative_BKD)
    scores = torch.cat((positive_B1, negative_BK), dim=1) / temperature
    return F.cross_entropy(scores, torch.zeros(len(q_BD), dtype=torch.int64, device=q_BD.device))


def distillation_loss(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean squared error, over all elements, between raw vectors of student and teacher, of equal width."""
    return F.mse_loss(student_ND, teacher_ND)


@dataclass(frozen=True)
class Roles:
    """Which row of a batch's vectors plays which part; a text that plays several parts is one row."""

    query_B: Tensor  # int64, row of each query
    positive_B: Tensor
    negative_BK: Tensor  # K may be 0
    same_BB: Tensor  # bool, see `in_batch_loss`
    in_batch: bool  # whether the in-batch term applies (retrieval rows)


def rows(vectors_ND: Tensor, numbers: Tensor) -> Tensor:
    """The vectors of the given row numbers (of any shape).

    Indexing with a tensor would do the same, but its gradient adds up repeated rows in the order in which threads
    arrive, and a run that is continued would not end in the same bits.
    """
    return vectors_ND.index_select(0, numbers.flatten()).unflatten(0, numbers.shape)


def contrastive_terms(
    vectors_ND: Tensor, roles: Roles, sizes: list[int], temperature: float
) -> dict[str, Tensor]:
    """The in-batch and hard terms, each summed over the Matryoshka prefixes with their weights."""
    terms: dict[str, Tensor] = {}
    for size, weight in zip(sizes, matryoshka_weights(sizes), strict=True):
        unit_ND = F.normalize(vectors_ND[:, :size], dim=-1)
        q_BD, positive_BD = rows(unit_ND, roles.query_B), rows(unit_ND, roles.positive_B)
        parts = {}
        if roles.in_batch:
            parts["in_batch"] = in_batch_loss(q_BD, positive_BD, roles.same_BB, temperature)
        if roles.negative_BK.shape[1]:
            parts["hard"] = hard_loss(q_BD, positive_BD, rows(unit_ND, roles.negative_BK), temperature)
        for name, value in parts.items():
            terms[name] = terms.get(name, 0.0) + weight * value
    return terms


def distillation_terms(vectors_ND: Tensor, teacher_ND: Tensor, roles: Roles) -> Tensor:
    """Distillation of queries, positives and negatives: three means, added up."""
    parts = [roles.query_B, roles.positive_B, roles.negative_BK.flatten()]
    losses = [
        distillation_loss(rows(vectors_ND, part), rows(teacher_ND, part)) for part in parts if len(part)
    ]
    return torch.stack(losses).sum()
