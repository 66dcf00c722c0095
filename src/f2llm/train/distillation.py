"""What a student learns from a teacher's vectors; beside objective.py the only place that knows losses.

Four terms, all least where the student agrees with its teacher:

- `mse` (arXiv 2603.19223, section 3.3): squared distance of raw vectors, at full width;
- `cosine`: 1 - cosine, which is half the squared distance of vectors of unit length;
- `similarity`: KL divergence from the teacher's softmax of a query over the documents of the batch to the student's
  (soft targets of Hinton et al. 2015, arXiv 1503.02531: what is near to what, whatever the two spaces look like);
- `ranking`: -log likelihood of the order of the teacher's RANKED nearest documents, drawn one after another by the
  student's softmax (Plackett-Luce; ListMLE of Xia et al. 2008, "Listwise approach to learning to rank").

All but mse are taken of the student's Matryoshka prefixes too, with the weights of the contrastive terms. A prefix is
set against the teacher's full vectors in similarity and ranking, against as many of its dimensions in cosine, and
through the first columns of a projection against all of them.

Shape suffixes: N texts, D dims of the student, T of the teacher, B queries, C documents, R ranks, W dims compared.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from f2llm.train.objective import NONE, SCORES_AT_ONCE, Roles, matryoshka_weights, rows

RANKED = 16  # documents whose order is learnt: about what a search shows

Disagreement = Callable[[Tensor, Tensor], Tensor]
"""Of cosines over temperature, the student's and the teacher's [B, C]: how much they disagree, [B]."""


@dataclass(frozen=True)
class Target:
    """What the student's vectors are set against: some of the teacher's dimensions, or all through a projection."""

    taught_D: Tensor | None = None  # int64
    projection_TD: Tensor | None = None  # it may carry a gradient

    def pair(self, vectors_ND: Tensor, teacher_NT: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The student's prefix and the teacher's vectors, of equal width [N, W]."""
        prefix_NS = vectors_ND[:, :size]
        if self.projection_TD is not None:
            return prefix_NS @ self.projection_TD[:, :size].to(prefix_NS).T, teacher_NT
        assert self.taught_D is not None  # one of both is there
        return prefix_NS, teacher_NT.index_select(1, self.taught_D[:size])


def distillation_terms(
    vectors_ND: Tensor,
    teacher_NT: Tensor,
    roles: Roles,
    sizes: list[int],
    target: Target,
    names: Collection[str],
    temperature: float,
) -> dict[str, Tensor]:
    """The terms in `names`, before their weights.

    Args:
        vectors_ND: the student's raw vectors of all texts of the batch.
        teacher_NT: the teacher's; raw for mse, of any length otherwise.
        sizes: Matryoshka prefixes, the full width among them.
        temperature: of similarity and ranking.
    """
    weights = dict(zip(sizes, matryoshka_weights(sizes), strict=True))
    terms = {}
    if "mse" in names:
        student_NW, taught_NW = target.pair(vectors_ND, teacher_NT, sizes[-1])
        terms["mse"] = _mean_of_parts((student_NW - taught_NW).square().mean(dim=1), roles)
    if "cosine" in names:
        terms["cosine"] = sum_of(
            weight
            * _mean_of_parts(1 - F.cosine_similarity(*target.pair(vectors_ND, teacher_NT, size)), roles)
            for size, weight in weights.items()
        )
    for name in SCORED.keys() & names:
        terms[name] = sum_of(
            weight * _scored(vectors_ND[:, :size], teacher_NT, roles, SCORED[name], temperature)
            for size, weight in weights.items()
        )
    return terms


def sum_of(values: Iterable[Tensor]) -> Tensor:
    """The sum of scalars, as a tensor."""
    return torch.stack(list(values)).sum()


def _mean_of_parts(value_N: Tensor, roles: Roles) -> Tensor:
    """Three means, of queries, positives and hard negatives, added up: a text counts as often as it plays a part."""
    weight_N = value_N.new_zeros(len(value_N))
    for part in (roles.query_B, roles.positive_B, roles.negative_BK[roles.negative_BK != NONE]):
        if len(part):
            weight_N += torch.bincount(part, minlength=len(weight_N)).to(weight_N.dtype) / len(part)
    return (weight_N * value_N).sum()


# --- Terms of cosines between queries and documents


def _similarity(scores_BC: Tensor, taught_BC: Tensor) -> Tensor:
    log_BC, log_taught_BC = scores_BC.log_softmax(1), taught_BC.log_softmax(1)
    return (log_taught_BC.exp() * (log_taught_BC - log_BC)).sum(1)


def _ranking(scores_BC: Tensor, taught_BC: Tensor) -> Tensor:
    # The last document is never drawn: when it is alone its likelihood is 1.
    order_BR = taught_BC.topk(min(RANKED, taught_BC.shape[1] - 1), dim=1).indices
    drawn_BR = scores_BC.gather(1, order_BR)
    left_B1 = scores_BC.scatter(1, order_BR, _lowest(scores_BC)).logsumexp(1, keepdim=True)
    # What each is drawn from: itself, those drawn later, and those never drawn.
    from_BR = torch.cat((drawn_BR, left_B1), dim=1).flip(1).logcumsumexp(1).flip(1)[:, :-1]
    return (from_BR - drawn_BR).mean(1)


SCORED: dict[str, Disagreement] = {"similarity": _similarity, "ranking": _ranking}


def _scored(
    prefix_NS: Tensor, teacher_NT: Tensor, roles: Roles, disagreement: Disagreement, temperature: float
) -> Tensor:
    """Mean over queries of how much student and teacher disagree about the batch's documents, each text once."""
    given_BK = roles.negative_BK
    document_C = torch.cat((roles.positive_B, given_BK[given_BK != NONE])).unique()
    if len(document_C) < 3:  # with a query's own text away there would be nothing to compare
        return prefix_NS.new_zeros(())
    student_NS, taught_NT = F.normalize(prefix_NS, dim=-1), F.normalize(teacher_NT, dim=-1)
    taught_BT, taught_CT = rows(taught_NT, roles.query_B), rows(taught_NT, document_C)

    def of_block(scores_bC: Tensor, start: int) -> Tensor:
        block = slice(start, start + len(scores_bC))
        taught_bC = taught_BT[block] @ taught_CT.T
        # A text finds itself first, which says nothing.
        itself_bC = roles.query_B[block, None] == document_C
        both = (
            (cosines / temperature).masked_fill(itself_bC, _lowest(scores_bC))
            for cosines in (scores_bC, taught_bC)
        )
        return disagreement(*both).sum()

    query_BS, document_CS = rows(student_NS, roles.query_B), rows(student_NS, document_C)
    total = cast(Tensor, _ByBlocks.apply(query_BS, document_CS, of_block))  # type: ignore[no-untyped-call]
    return total / len(roles.query_B)


def _lowest(scores: Tensor) -> float:
    """As good as -infinity for a softmax, and finite, so that its product with a probability of 0 is 0."""
    return torch.finfo(scores.dtype).min / 4


class _ByBlocks(torch.autograd.Function):
    """The sum of a loss over blocks of scores, which never stand in memory as a whole (as objective.softmax_loss).

    Each block gives its share of the loss and, at once, of the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, query_BD: Tensor, document_CD: Tensor, of_block: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        loss = query_BD.new_zeros(())
        grad_query_BD, grad_document_CD = torch.empty_like(query_BD), torch.zeros_like(document_CD)
        block = max(1, SCORES_AT_ONCE // len(document_CD))
        for start in range(0, len(query_BD), block):
            query_bD = query_BD[start : start + block]
            scores_bC = (query_bD @ document_CD.T).requires_grad_()
            with torch.enable_grad():
                share = of_block(scores_bC, start)
                (grad_bC,) = torch.autograd.grad(share, scores_bC)
            loss += share.detach()
            grad_query_BD[start : start + block] = grad_bC @ document_CD
            grad_document_CD.addmm_(grad_bC.T, query_bD)
        ctx.save_for_backward(grad_query_BD, grad_document_CD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_query_BD, grad_document_CD = ctx.saved_tensors
        return grad_query_BD * grad, grad_document_CD * grad, None
