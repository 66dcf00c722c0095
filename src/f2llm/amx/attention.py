"""Causal attention of one head in one sequence, by the same products as everything else.

Scores of some queries against all keys that the last of them sees are one product, the mixture of values another; in
between each row becomes its softmax, as halves again. Scores come in powers of two: queries were multiplied by
log2(e) / sqrt(D) beforehand.

A sequence may stand behind a prefix, whose keys and values are another pair of right factors.

Shape suffixes: Q queries, S keys, D head width.
"""

from typing import NamedTuple

import numpy as np

from f2llm.amx.compiling import any_order, kernel
from f2llm.amx.instructions import LANES, largest, multiply_by, split_powers
from f2llm.amx.products import DEPTH, LEFT_STEP, PANEL, RIGHT_STEP, ROWS, TILE, multiply
from f2llm.amx.steps import place

QUERIES = 64  # in one product
APART = 16  # numbers between rows of scores, so that rows do not share sets of the cache


class Scratch(NamedTuple):
    """Memory for one product's queries."""

    scores_QS: np.ndarray
    shares: np.ndarray  # a left factor [Q, S]
    totals: np.ndarray  # of a row, sixteen that add up to one
    inverse_Q: np.ndarray  # one over the sums of shares


@kernel
def scratch(panels: int) -> Scratch:
    """For at most this many panels of 32 keys."""
    return Scratch(
        np.empty((QUERIES, panels * PANEL + APART), np.float32),
        np.zeros(QUERIES // ROWS * panels * LEFT_STEP, np.uint8),
        np.empty(LANES, np.float32),
        np.empty(QUERIES, np.float32),
    )


@any_order
def _sum(numbers: np.ndarray) -> np.float32:
    total = np.float32(0)
    for number in numbers:
        total += number
    return total


@kernel
def _softmax(here: Scratch, query: int, before: int, before_panels: int, seen: int, panels: int) -> None:
    """One row of scores to shares that are still to be divided by their sum.

    The row has `before` keys of the prefix in so many panels, then `seen` of the sequence; what is behind either is
    garbage, and gets no share.
    """
    first = before_panels * PANEL
    row = here.scores_QS.ctypes.data + query * here.scores_QS.shape[1] * 4
    most = max(largest(row + 4 * first, seen), largest(row, before))
    here.totals[:] = 0
    for i in range(0, (before_panels + panels) * PANEL, LANES):
        valid = before - i if i < first else first + seen - i
        to = place(here.shares.ctypes.data, before_panels + panels, query, i)
        split_powers(row + 4 * i, most, valid, here.totals.ctypes.data, to, to + TILE)
    here.inverse_Q[query] = np.float32(1) / _sum(here.totals)


@kernel
def attend(
    queries: int,
    count: int,
    position: int,
    width: int,
    keys: int,
    values: int,
    key_panels: int,
    before: int,
    before_keys: int,
    before_values: int,
    out: int,
    out_row: int,
    here: Scratch,
) -> None:
    """Write the mixtures of values of `count` queries to `out`, float32; up to 15 rows behind them are overwritten.

    Args:
        queries: address of a left factor; query i is at `position` + i of its sequence.
        width: of a head. keys, values: addresses of right factors of `key_panels` panels of 32 keys.
        before: tokens of a prefix, whose keys and values are at `before_keys` and `before_values`.
        out, out_row: address, and bytes from one row to the next.
    """
    depth, before_panels = width // DEPTH, -(-before // PANEL)
    scores, score_row = here.scores_QS.ctypes.data, here.scores_QS.shape[1] * 4
    shares = here.shares.ctypes.data
    for first in range(0, count, QUERIES):
        some = min(QUERIES, count - first)
        tiles = -(-some // ROWS)
        panels = -(-(position + first + some) // PANEL)
        asked = queries + first // ROWS * depth * LEFT_STEP
        if before:
            multiply(
                asked, depth * LEFT_STEP, tiles, before_keys, depth * RIGHT_STEP, before_panels, scores, score_row,
                depth, False,
            )  # fmt: skip
        multiply(
            asked, depth * LEFT_STEP, tiles, keys, depth * RIGHT_STEP, panels, scores + before_panels * PANEL * 4,
            score_row, depth, False,
        )  # fmt: skip
        for query in range(some):
            _softmax(here, query, before, before_panels, position + first + query + 1, panels)
        share_row = (before_panels + panels) * LEFT_STEP
        mixed = out + first * out_row
        if before:
            multiply(
                shares, share_row, tiles, before_values, before_panels * RIGHT_STEP, depth, mixed, out_row,
                before_panels, False,
            )  # fmt: skip
        multiply(
            shares + before_panels * LEFT_STEP, share_row, tiles, values, key_panels * RIGHT_STEP, depth, mixed,
            out_row, panels, before > 0,
        )  # fmt: skip
        for query in range(some):
            for i in range(0, width, LANES):
                multiply_by(mixed + query * out_row + 4 * i, here.inverse_Q[query])
