"""What both contenders of the training benchmark share: the objective of a batch, and what a step reports.

The rows of a batch are queries, then their positives, then their hard negatives, query by query.

Shape suffixes: B queries, K hard negatives per query, N texts = B * (2 + K), D dims.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from f2llm.train.objective import TEMPERATURE, Roles, contrastive_terms, matryoshka_sizes


def loss_of(vectors_ND: Tensor, queries: int) -> Tensor:
    """In-batch and hard terms over all Matryoshka sizes."""
    rows_N = torch.arange(len(vectors_ND))
    roles = Roles(
        query_B=rows_N[:queries],
        positive_B=rows_N[queries : 2 * queries],
        negative_BK=rows_N[2 * queries :].view(queries, -1),
        same_BB=torch.zeros(queries, queries, dtype=torch.bool),
        in_batch=True,
    )
    terms = contrastive_terms(vectors_ND, roles, matryoshka_sizes(vectors_ND.shape[1]), TEMPERATURE)
    return torch.stack(list(terms.values())).sum()


def report(seconds: float, loss: Tensor, parameters: Iterable[nn.Parameter]) -> dict[str, float]:
    """Time, loss and norm of the gradient, the last two to see that both contenders did the same work."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return {"seconds": seconds, "loss": loss.item(), "gradient_norm": norm.item()}
