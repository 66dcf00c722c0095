"""How a ragged batch lies in memory: its sequences sorted by length, so that those of equal length are neighbours.

Shape suffixes: T tokens of all sequences, N sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from f2llm.errors import F2Error


@dataclass(frozen=True, eq=False)
class Layout:
    """The order of a batch's tokens, made once per batch; sizes are plain numbers, so that no device is waited for."""

    groups: list[tuple[int, int]]  # (sequences, length of each), ascending length
    token_order_T: Tensor  # sorted position -> position in the caller's flat list
    positions_T: Tensor  # position inside its sequence
    last_N: Tensor  # sorted position of each sequence's final token
    restore_N: Tensor  # caller's sequence -> sorted sequence

    @property
    def longest(self) -> int:
        return self.groups[-1][1] if self.groups else 0


def make_layout(lengths: Sequence[int], device: torch.device) -> Layout:
    """Sort sequences of the given lengths (each at least 1) into groups of equal length."""
    lengths_N = torch.as_tensor(lengths, dtype=torch.int64)
    if len(lengths_N) and int(lengths_N.min()) < 1:
        raise F2Error("a sequence without tokens reached the decoder; each needs at least its EOS token.")
    order_N = torch.argsort(lengths_N, stable=True)
    sorted_N = lengths_N[order_N]
    ends_N = sorted_N.cumsum(0)
    starts_T = torch.repeat_interleave(ends_N - sorted_N, sorted_N)
    positions_T = torch.arange(int(ends_N[-1]) if len(ends_N) else 0) - starts_T
    caller_starts_N = (lengths_N.cumsum(0) - lengths_N)[order_N]
    return Layout(
        groups=[(len(list(same)), length) for length, same in groupby(sorted_N.tolist())],
        token_order_T=(torch.repeat_interleave(caller_starts_N, sorted_N) + positions_T).to(device),
        positions_T=positions_T.to(device),
        last_N=(ends_N - 1).to(device),
        restore_N=torch.argsort(order_N).to(device),
    )
