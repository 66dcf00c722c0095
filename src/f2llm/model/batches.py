"""Token sequences into batches for the decoder: sorted by length, under a budget of tokens."""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from f2llm.model.decoder import WHOLE, Cuts, Decoder, Prefix


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in order of length, in batches of at most `budget` tokens (a longer text is a batch of its own)."""
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and tokens + lengths[i] > budget:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch


def forward(
    decoder: Decoder, ids: Sequence[Sequence[int]], cuts: Cuts = WHOLE, prefix: Prefix | None = None
) -> Tensor:
    """Raw vectors [N, D] of N token sequences (those of exits in front), computed at once on the decoder's device."""
    device = decoder.embed_tokens.weight.device
    ids_T = torch.tensor(list(chain.from_iterable(ids)), device=device)
    return decoder(ids_T, [len(sequence) for sequence in ids], cuts, prefix)
