"""The gradients of one batch, however it is cut: into micro-batches, over ranks, or not at all.

The objective looks at all vectors of a batch at once, but a batch of thousands of texts does not fit into memory with
its graph. So vectors and objective are taken apart (gradient caching, Gao et al. 2021, arXiv 2101.06983):

1. each rank computes the raw vectors of its share of the texts, in micro-batches, without a graph;
2. all ranks get all vectors, and each computes the objective and its gradient with respect to them;
3. each micro-batch is computed again, with its graph, and carries its rows of that gradient into the weights.

The last micro-batch keeps its graph from the first pass, so a batch that fits into one is computed once. Autograd never
crosses a collective: gradients do not depend on the number of ranks.

Shape suffixes: N texts of the batch, M texts of a micro-batch, D dims.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from f2llm.model.batches import forward, token_batches
from f2llm.model.decoder import WHOLE, Cuts, Decoder
from f2llm.train.ranks import ALONE, Ranks, gather, gathered, sync_gradients
from f2llm.train.watchdog import watched

Ids = Sequence[Sequence[int]]
ENCODE = "encode the texts"  # for the watchdog: weights are gathered in it, so it may wait for another rank
DUMMY = [[0]]  # one token, of no consequence: what a rank computes that has fewer micro-batches than another


@dataclass(frozen=True)
class Cut:
    """Who computes which texts of a batch, and in which micro-batches: the same on every rank."""

    micro_batches: list[
        list[int]
    ]  # of this rank: numbers of texts; as many on each rank, the surplus ones empty
    counts: list[int]  # texts of each rank
    place_N: list[
        int
    ]  # where each text's vector comes to lie when the ranks' vectors are put one after another


def cut(lengths: Sequence[int], tokens_per_microbatch: int, ranks: Ranks) -> Cut:
    """Deal texts out by length, so that all ranks have about equal work, and cut each share by a budget of tokens."""
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    shares = [by_length[rank :: ranks.world] for rank in range(ranks.world)]
    cuts = [
        [
            [share[i] for i in batch]
            for batch in token_batches([lengths[n] for n in share], tokens_per_microbatch)
        ]
        for share in shares
    ]
    most = max(map(len, cuts))
    place_N = [0] * len(lengths)
    for place, number in enumerate(n for share in cuts for batch in share for n in batch):
        place_N[number] = place
    # Empty ones come first: the last micro-batch is the one whose graph is kept.
    empty: list[list[int]] = [[] for _ in range(most - len(cuts[ranks.rank]))]
    return Cut(empty + cuts[ranks.rank], [len(share) for share in shares], place_N)


def vectors_of(decoder: Decoder, ids: Ids, tokens_per_microbatch: int, ranks: Ranks = ALONE) -> Tensor:
    """Raw vectors [N, D] of all texts, on every rank, without a graph."""
    division = cut([len(sequence) for sequence in ids], tokens_per_microbatch, ranks)
    with torch.no_grad():
        with watched(ENCODE, ranks):
            parts = [_encode(decoder, ids, micro_batch) for micro_batch in division.micro_batches]
        return _all_vectors(parts, division, ranks)


def accumulate_gradients(
    decoder: Decoder,
    ids: Ids,
    loss_of: Callable[[Tensor], Tensor],
    tokens_per_microbatch: int,
    ranks: Ranks = ALONE,
    sum_each: bool = False,
    cuts: Cuts = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of a batch's loss to the decoder's parameters.

    Args:
        ids: token ids of the batch's distinct texts; on every rank the same.
        loss_of: the loss, a scalar, of the raw vectors [N, D] of all texts; it runs once, and what else it depends on
            gets its gradient as well.
        tokens_per_microbatch: most tokens computed at once on a rank; a longer text is computed alone.
        sum_each: sum gradients over ranks after every micro-batch, and gather weights for each pass, which costs time
            and spares each rank whole gradients and whole weights (see `memory.sums_each`).
        cuts: smaller models inside, whose vectors the loss gets too: [N, exits * D + D].

    Returns:
        The loss, and the vectors [N, D] that it was taken of, without a graph; on every rank the same.
    """
    division = cut([len(sequence) for sequence in ids], tokens_per_microbatch, ranks)
    *again, last = division.micro_batches
    # A rank gathers weights once for all passes of a step, which pays where there are more than two.
    with gathered(decoder) if again and not sum_each else nullcontext():
        with watched(ENCODE, ranks):
            with torch.no_grad():
                parts = [_encode(decoder, ids, micro_batch, cuts) for micro_batch in again]
            kept_MD = _encode(decoder, ids, last, cuts)
        vectors_ND = _all_vectors([*parts, kept_MD.detach()], division, ranks).requires_grad_()
        loss = loss_of(vectors_ND)
        loss.backward()
        assert vectors_ND.grad is not None
        grad_ND = vectors_ND.grad

        with watched("carry the gradient back", ranks):
            # Gradients travel between ranks once, with the last micro-batch of all, if there is room for whole ones.
            sync_gradients(decoder, sum_each or not again)
            kept_MD.backward(grad_ND[last])
            for number, micro_batch in enumerate(again, start=1):
                sync_gradients(decoder, sum_each or number == len(again))
                _encode(decoder, ids, micro_batch, cuts).backward(grad_ND[micro_batch])
    return loss.detach(), vectors_ND.detach()


def _encode(decoder: Decoder, ids: Ids, micro_batch: list[int], cuts: Cuts = WHOLE) -> Tensor:
    """Raw vectors [M, D]; an empty micro-batch goes through the decoder too, since its collectives wait for all."""
    if not micro_batch:
        return forward(decoder, DUMMY, cuts)[:0]
    return forward(decoder, [ids[n] for n in micro_batch], cuts)


def _all_vectors(parts: list[Tensor], division: Cut, ranks: Ranks) -> Tensor:
    """All ranks' vectors [N, D] in the order of the texts, from those of this rank, micro-batch by micro-batch."""
    with watched("gather the vectors", ranks):
        vectors_ND = gather(torch.cat(parts), division.counts, ranks)
    return vectors_ND.index_select(0, torch.tensor(division.place_N, device=vectors_ND.device))
