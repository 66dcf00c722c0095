"""The contrastive objective, as functions of embeddings.

Two objectives over cosine similarities, both summed over Matryoshka prefixes:

- `f2llm-v2` (arXiv 2603.19223, sections 3.1 and 3.3; constants from codefuse-ai/CodeFuse-Embeddings, the reference
  code): two softmaxes with one temperature. The hard term (all formats) sets a query's positive against its own hard
  negatives; the in-batch term (retrieval only) against the positives of the other queries.
- `joint`: one softmax of a query's positive among all documents of the batch, everybody's hard negatives included
  (retrieval; the other formats keep the hard term), and on request of a positive's query among all queries.

A teacher adds terms of its own (distillation.py). docs/objective.md has the truth table: which pairs of query and
document stand in which denominator.

Shape suffixes: B queries, C documents, K hard negatives per query, D dims, N vectors, P pairs.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TEMPERATURE = 0.05
NONE = -1  # in `Roles.negative_BK`: this query has no such negative
SCORES_AT_ONCE = 1 << 20  # elements of a block of scores: 4 MB in float32, about what caches hold

Kind = Literal["f2llm-v2", "joint"]


def matryoshka_sizes(dim: int, smallest: int = 8) -> list[int]:
    """Prefix sizes 8, 16, 32 ... below `dim`, then `dim` itself, ascending."""
    powers = [smallest << k for k in range(64) if smallest << k < dim]
    return [*powers, dim]


def matryoshka_weights(sizes: list[int]) -> list[float]:
    """Weight of each prefix: the n-th largest of full width d gets 1 / (n * sqrt(d / size)) (reference code)."""
    descending = sorted(sizes, reverse=True)
    rank = {size: n for n, size in enumerate(descending, start=1)}
    return [1.0 / (rank[size] * math.sqrt(descending[0] / size)) for size in sizes]


@dataclass(frozen=True)
class Roles:
    """Which row of a batch's vectors plays which part; a text that plays several parts is one row."""

    query_B: Tensor  # int64, row of each query
    positive_B: Tensor
    negative_BK: Tensor  # NONE where a query has fewer than K; K may be 0
    same_BB: Tensor  # bool: positive j may be right for query i too; its diagonal is ignored
    known_P2: Tensor  # int64, (query, row): texts of the batch that are known to be right for the query
    in_batch: bool  # whether the others' documents are negatives (retrieval rows)


class _SoftmaxLoss(torch.autograd.Function):
    """Mean cross-entropy over scores that never stand in memory as a whole.

    A batch of 8,192 has 67 million scores for each Matryoshka size; autograd would keep several copies of them.
    Here a block of queries at a time gives its share of the loss and, at once, of its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, query_BD: Tensor, document_CD: Tensor, own_B: Tensor, hidden_BC: Tensor, temperature: Tensor
    ) -> Tensor:
        queries, documents = len(query_BD), len(document_CD)
        needs_query, needs_document, _, _, needs_temperature = ctx.needs_input_grad
        loss = query_BD.new_zeros(())
        grad_query_BD, grad_document_CD = torch.empty_like(query_BD), torch.zeros_like(document_CD)
        grad_temperature = torch.zeros_like(temperature)
        lowest = torch.finfo(query_BD.dtype).min  # finite, so that its product with a probability of 0 is 0
        block = max(1, SCORES_AT_ONCE // documents)
        for start in range(0, queries, block):
            part = slice(start, start + block)
            query_bD = query_BD[part]
            scores_bC = (query_bD / temperature) @ document_CD.T
            scores_bC.masked_fill_(hidden_BC[part], lowest)
            scores_bC -= scores_bC.amax(dim=1, keepdim=True)
            own_b1 = scores_bC.gather(1, own_B[part, None])
            # Probabilities but for their sum, by which it is cheaper to divide what they are multiplied with.
            share_bC = scores_bC.exp() if needs_temperature else scores_bC.exp_()
            sum_b1 = share_bC.sum(dim=1, keepdim=True)
            loss += (sum_b1.log() - own_b1).sum()
            # d loss / d score is the probability, less 1 at the own document.
            if needs_query:
                grad_query_BD[part] = (share_bC @ document_CD) / sum_b1 - rows(document_CD, own_B[part])
            if needs_document:
                grad_document_CD.addmm_(share_bC.T, query_bD / sum_b1)
            if needs_temperature:
                expected_b1 = (share_bC * scores_bC).sum(dim=1, keepdim=True) / sum_b1
                grad_temperature -= (expected_b1 - own_b1).sum() / temperature
        grad_document_CD.index_add_(0, own_B, query_BD, alpha=-1)
        scale = 1.0 / (queries * temperature)
        ctx.save_for_backward(
            grad_query_BD.mul_(scale) if needs_query else None,
            grad_document_CD.mul_(scale) if needs_document else None,
            grad_temperature.div_(queries) if needs_temperature else None,
        )
        return loss / queries

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, document, temperature = (None if t is None else t * grad for t in ctx.saved_tensors)
        return query, document, None, None, temperature


def softmax_loss(
    query_BD: Tensor, document_CD: Tensor, own_B: Tensor, hidden_BC: Tensor, temperature: Tensor
) -> Tensor:
    """Mean over queries of -log softmax of the own document among the documents that are not hidden.

    Args:
        query_BD, document_CD: of unit length.
        own_B: int64, the document that is right for each query.
        hidden_BC: bool, documents that leave a query's denominator; never the own one.
        temperature: 0-d.
    """
    return cast(Tensor, _SoftmaxLoss.apply(query_BD, document_CD, own_B, hidden_BC, temperature))  # type: ignore[no-untyped-call]


def in_batch_loss(q_BD: Tensor, positive_BD: Tensor, same_BB: Tensor, temperature: Tensor) -> Tensor:
    """`softmax_loss` of the own positive among the positives of the batch, less those in `same_BB` (see `Roles`)."""
    own_B = torch.arange(len(q_BD), device=q_BD.device)
    return softmax_loss(q_BD, positive_BD, own_B, same_BB.clone().fill_diagonal_(False), temperature)


def hard_loss(
    q_BD: Tensor, positive_BD: Tensor, negative_BKD: Tensor, there_BK: Tensor, temperature: Tensor
) -> Tensor:
    """Mean over queries of -log softmax of the own positive among itself and the query's own hard negatives.

    `there_BK` (bool) marks the negatives that a query has; one with none adds zero.
    """
    positive_B1 = (q_BD * positive_BD).sum(-1, keepdim=True)
    negative_BK = torch.einsum("bd,bkd->bk", q_BD, negative_BKD)
    scores = torch.cat((positive_B1, negative_BK), dim=1) / temperature
    scores[:, 1:].masked_fill_(~there_BK, -math.inf)  # after the division, whose gradient it would make NaN
    return F.cross_entropy(scores, torch.zeros(len(q_BD), dtype=torch.int64, device=q_BD.device))


def rows(vectors_ND: Tensor, numbers: Tensor) -> Tensor:
    """The vectors of the given row numbers (of any shape).

    Indexing with a tensor would do the same, but its gradient adds up repeated rows in the order in which threads
    arrive, and a run that is continued would not end in the same bits.
    """
    return vectors_ND.index_select(0, numbers.flatten()).unflatten(0, numbers.shape)


def contrastive_terms(
    vectors_ND: Tensor,
    roles: Roles,
    sizes: list[int],
    temperature: Tensor,
    *,
    kind: Kind = "f2llm-v2",
    gather_gradient: bool = True,
    both_directions: bool = False,
) -> dict[str, Tensor]:
    """The contrastive terms of a batch, each summed over the Matryoshka prefixes with their weights.

    Args:
        vectors_ND: raw vectors of all texts of the batch, on every rank the same.
        sizes: Matryoshka prefixes, the full width among them.
        temperature: 0-d; it may carry a gradient.
        gather_gradient: False keeps the in-batch term's gradient from the positives, which is what the reference
            code's gather does: its documents learn from the hard term alone.
        both_directions: with the joint objective, the mean of query -> document and positive -> query.
    """
    there_BK = roles.negative_BK != NONE
    negative_BK = roles.negative_BK.clamp(min=0)
    everything = _Documents.of(roles) if kind == "joint" and roles.in_batch else None
    terms: dict[str, Tensor] = {}
    for size, weight in zip(sizes, matryoshka_weights(sizes), strict=True):
        unit_ND = F.normalize(vectors_ND[:, :size], dim=-1)
        q_BD, positive_BD = rows(unit_ND, roles.query_B), rows(unit_ND, roles.positive_B)
        parts = {}
        if everything:
            parts["joint"] = softmax_loss(
                q_BD, rows(unit_ND, everything.row_C), everything.own_B, everything.hidden_BC, temperature
            )
            if both_directions:
                back = in_batch_loss(positive_BD, q_BD, roles.same_BB.T, temperature)
                parts["joint"] = (parts["joint"] + back) / 2
        elif roles.in_batch:
            others_BD = positive_BD if gather_gradient else positive_BD.detach()
            parts["in_batch"] = in_batch_loss(q_BD, others_BD, roles.same_BB, temperature)
        if negative_BK.shape[1] and not everything:
            parts["hard"] = hard_loss(q_BD, positive_BD, rows(unit_ND, negative_BK), there_BK, temperature)
        for name, value in parts.items():
            terms[name] = terms.get(name, 0.0) + weight * value
    return terms


@dataclass(frozen=True)
class _Documents:
    """All documents of a batch, each text once, for the joint objective."""

    row_C: Tensor  # their rows among the batch's vectors
    own_B: Tensor  # which of them is each query's positive
    hidden_BC: Tensor  # which of them leave a query's denominator

    @staticmethod
    def of(roles: Roles) -> "_Documents":
        negative_BK, there_BK = roles.negative_BK, roles.negative_BK != NONE
        row_C = torch.cat((roles.positive_B, negative_BK[there_BK])).unique()
        own_B = torch.searchsorted(row_C, roles.positive_B)
        query_B = torch.arange(len(own_B), device=own_B.device)
        hidden_BC = torch.zeros(len(own_B), len(row_C), dtype=torch.bool, device=own_B.device)
        i, j = roles.same_BB.nonzero(as_tuple=True)
        hidden_BC[i, own_B[j]] = True
        known_P, text_P = roles.known_P2.T.contiguous()
        place_P = torch.searchsorted(row_C, text_P).clamp(max=len(row_C) - 1)
        among_P = row_C[place_P] == text_P
        hidden_BC[known_P[among_P], place_P[among_P]] = True
        hidden_BC[torch.where(there_BK)[0], torch.searchsorted(row_C, negative_BK[there_BK])] = False
        hidden_BC[query_B, own_B] = False
        return _Documents(row_C, own_B, hidden_BC)
