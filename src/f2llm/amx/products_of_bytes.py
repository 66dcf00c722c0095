"""Products of int8 matrices on tiles: sums in int32, exact.

Factors lie in tiles of 1,024 bytes as those of `f2llm.amx.products` do: left tiles have 16 rows and a depth of 64, a
step of depth in a panel of the right factor has two tiles of 16 columns each, whose rows are fours of inputs.
"""

import numpy as np

from f2llm.amx.compiling import kept_on_disk, kernel
from f2llm.amx.instructions import add_product_of_bytes, fetch, load, store, zero
from f2llm.amx.products import FETCH_ROWS, PANEL, ROWS, TILE

DEPTH = 64  # of a tile
LEFT_STEP, RIGHT_STEP = TILE, 2 * TILE  # bytes of such a depth
MOST = np.float32(127)


@kernel
def multiply(
    left: int, left_row: int, rows: int, right: int, panels: int, out: int, out_row: int, depth: int
) -> None:
    """Take left times right; addresses and sizes as of `f2llm.amx.products.multiply`, `out` in int32."""
    size = depth * RIGHT_STEP
    bit = -(-size // (rows // 2 * 64)) * 64 if rows > FETCH_ROWS else 0
    for panel in range(panels):
        b, to = right + panel * size, out + panel * PANEL * 4
        for row in range(0, rows - 1, 2):
            for line in range(0, bit, 64):
                fetch(b + size + row // 2 * bit + line)
            _two_rows(left + row * left_row, left_row, b, to + row * ROWS * out_row, out_row, depth)
        if rows % 2:
            _one_row(left + (rows - 1) * left_row, b, to + (rows - 1) * ROWS * out_row, out_row, depth)


@kernel
def _two_rows(a: int, left_row: int, b: int, out: int, out_row: int, depth: int) -> None:
    zero(0)
    zero(1)
    zero(2)
    zero(3)
    for _ in range(depth):
        load(4, a, 64)
        load(6, b, 64)
        add_product_of_bytes(0, 4, 6)
        load(7, b + TILE, 64)
        add_product_of_bytes(1, 4, 7)
        load(5, a + left_row, 64)
        add_product_of_bytes(2, 5, 6)
        add_product_of_bytes(3, 5, 7)
        a += LEFT_STEP
        b += RIGHT_STEP
    below = out + ROWS * out_row
    store(0, out, out_row)
    store(1, out + 64, out_row)
    store(2, below, out_row)
    store(3, below + 64, out_row)


@kernel
def _one_row(a: int, b: int, out: int, out_row: int, depth: int) -> None:
    zero(0)
    zero(1)
    for _ in range(depth):
        load(4, a, 64)
        load(6, b, 64)
        add_product_of_bytes(0, 4, 6)
        load(7, b + TILE, 64)
        add_product_of_bytes(1, 4, 7)
        a += LEFT_STEP
        b += RIGHT_STEP
    store(0, out, out_row)
    store(1, out + 64, out_row)


@kept_on_disk
def pack_bytes(weight_FE: np.ndarray, right: np.ndarray, scale_F: np.ndarray) -> None:
    """The weight of a linear map, float32 [F, E], as a right factor in `right` (int8, flat, F * E).

    Each output has a scale of its own: weight = int8 * scale, the largest one 127. Where a weight is no number, the
    scale is none either.
    """
    outputs, inputs = weight_FE.shape
    depth = inputs // DEPTH
    for number in range(outputs):
        most, taint = np.float32(0), np.float32(0)
        for i in range(inputs):
            most = max(most, abs(weight_FE[number, i]))
            taint += weight_FE[number, i] * np.float32(0)
        scale_F[number] = most / MOST + taint
        factor = MOST / most if most > 0 else np.float32(0)
        column = number // PANEL * depth * RIGHT_STEP + number % PANEL // 16 * TILE + number % 16 * 4
        for i in range(inputs):
            at = column + i // DEPTH * RIGHT_STEP + i % DEPTH // 4 * 64 + i % 4
            right[at] = np.int8(np.rint(weight_FE[number, i] * factor))
