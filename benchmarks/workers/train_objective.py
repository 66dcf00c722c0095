"""What all contenders of the training benchmark share: how a batch lies, its objective, and what a step reports.

The rows of a batch are queries, then their positives, then their hard negatives, query by query.

Shape suffixes: B queries, K hard negatives per query, N texts = B * (2 + K), D dims.
"""

import time
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from f2llm.train.objective import TEMPERATURE, Kind, Roles, contrastive_terms, matryoshka_sizes

T = TypeVar("T")


def part(rows: list[T], queries: int, number: int, parts: int) -> list[T]:
    """The given one of `parts` equal batches: its share of the queries, with their positives and hard negatives."""
    share, negatives = queries // parts, len(rows) // queries - 2
    first, last = number * share, (number + 1) * share
    positives, rest = rows[queries : 2 * queries], rows[2 * queries :]
    return rows[first:last] + positives[first:last] + rest[negatives * first : negatives * last]


def columns(rows: list[T], queries: int) -> dict[str, list[T]]:
    """Query, positive and hard negatives: a column each, with a row for each query."""
    negatives, rest = len(rows) // queries - 2, rows[2 * queries :]
    return {
        "query": rows[:queries],
        "positive": rows[queries : 2 * queries],
        **{f"negative_{k}": rest[k::negatives] for k in range(negatives)},
    }


def micro_batches(lengths: list[int], padded_tokens: int) -> list[list[int]]:
    """Numbers of the texts, shortest first, in batches of at most that many tokens, padding counted (or one text)."""
    batches: list[list[int]] = [[]]
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[number] > padded_tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


def loss_of(vectors_ND: Tensor, queries: int, kind: Kind = "f2llm-v2") -> Tensor:
    """In-batch and hard terms, or the joint one, over all Matryoshka sizes."""
    rows_N = torch.arange(len(vectors_ND), device=vectors_ND.device)
    roles = Roles(
        query_B=rows_N[:queries],
        positive_B=rows_N[queries : 2 * queries],
        negative_BK=rows_N[2 * queries :].view(queries, len(rows_N) // queries - 2),
        same_BB=torch.zeros(queries, queries, dtype=torch.bool, device=vectors_ND.device),
        known_P2=rows_N.new_empty(0, 2),
        in_batch=True,
    )
    temperature = torch.tensor(TEMPERATURE, device=vectors_ND.device)
    sizes = matryoshka_sizes(vectors_ND.shape[1])
    terms = contrastive_terms(vectors_ND, roles, sizes, temperature, kind=kind)
    return torch.stack(list(terms.values())).sum()


def clock(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def report(seconds: float, loss: Tensor, parameters: Iterable[nn.Parameter]) -> dict[str, float]:
    """Time, loss and norm of the gradient, the last two to see that both contenders did the same work."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return {"seconds": seconds, "loss": loss.item(), "gradient_norm": norm.item()}
