"""What happens to rows of numbers between two products: each reads float32 and writes halves for the next product.

Addresses and sizes of left factors are as in `f2llm.amx.products`. Shape suffixes: T tokens, W numbers of a row, D head
width, E and F inputs and outputs of a map, K numbers of a column.
"""

import numpy as np

from f2llm.amx.compiling import any_order, kept_on_disk, kernel
from f2llm.amx.instructions import LANES, split, split_pairs, turn
from f2llm.amx.products import DEPTH, LEFT_STEP, PANEL, ROWS, TILE


@any_order
def sum_of_squares(x_TW: np.ndarray, row: int, first: int, width: int) -> np.float32:
    """Of `width` numbers of a row, from `first` on."""
    total = np.float32(0)
    for i in range(first, first + width):
        total += x_TW[row, i] * x_TW[row, i]
    return total


@kernel
def inverse_rms(x_TW: np.ndarray, row: int, first: int, width: int, eps: np.float32) -> np.float32:
    """1 / sqrt(mean(x²) + eps) of `width` numbers of a row, from `first` on."""
    mean = sum_of_squares(x_TW, row, first, width) / np.float32(width)
    return np.float32(1) / np.sqrt(mean + eps)


@kernel
def place(left: int, depth: int, row: int, number: int) -> int:
    """Address of a number's high half in a left factor of `depth` steps; the low half is a tile behind it."""
    tile = (row // ROWS * depth + number // DEPTH) * LEFT_STEP
    return left + tile + (row % ROWS * DEPTH + number % DEPTH) * 2


@kernel
def put_row(x: int, width: int, factor: np.float32, left: int, row: int) -> None:
    """Write `width` numbers at address `x`, times factor, into a row of the left factor at `left`."""
    for i in range(0, width, LANES):
        to = place(left, width // DEPTH, row, i)
        split(x + 4 * i, factor, to, to + TILE)


@kernel
def turn_head(
    x_TW: np.ndarray,
    row: int,
    first: int,
    weight_D: np.ndarray,
    eps: np.float32,
    angles: np.ndarray,
    position: int,
    out_D: np.ndarray,
) -> None:
    """Norm and rotary embedding of a head, which is a part of a row; angles: [2, positions, D / 2]."""
    width = len(weight_D)
    factor = inverse_rms(x_TW, row, first, width, eps)
    x = x_TW.ctypes.data + (row * x_TW.shape[1] + first) * 4
    half = width // 2 * 4
    cosines = angles.ctypes.data + position * half
    sines = cosines + angles.shape[1] * half
    for i in range(0, half, 4 * LANES):
        turn(x + i, half, weight_D.ctypes.data + i, factor, cosines + i, sines + i, out_D.ctypes.data + i)


@kernel
def put_column(x: int, halves_2K: np.ndarray, right: np.ndarray, start: int, number: int) -> None:
    """The numbers at address `x` as a column of the right factor in `right` (uint32, flat) from `start` on.

    halves_2K: room for their halves, uint32 [2, half as many as there are numbers]: a pair is one entry of the factor.
    """
    pairs = halves_2K.shape[1]
    high, low = halves_2K.ctypes.data, halves_2K.ctypes.data + 4 * pairs
    for i in range(0, 2 * pairs, LANES):
        split(x + 4 * i, np.float32(1), high + 2 * i, low + 2 * i)
    column = start + number // PANEL * (2 * pairs // DEPTH) * 1024 + number % PANEL // 16 * 256 + number % 16
    for i in range(pairs):
        to = column + i // 16 * 1024 + i % 16 * 16
        right[to] = halves_2K[0, i]
        right[to + 512] = halves_2K[1, i]


@kept_on_disk
def pack_right(weight_FE: np.ndarray, right: np.ndarray) -> None:
    """The weight of a linear map, float32 [F, E], as a right factor in `right` (uint32, flat, F * E)."""
    halves = np.empty((2, weight_FE.shape[1] // 2), np.uint32)
    for number in range(len(weight_FE)):
        put_column(weight_FE[number].ctypes.data, halves, right, 0, number)


@kernel
def put_values(x: int, y: int, width: int, values: int, panel_step: int, number: int) -> None:
    """Two rows of values, `width` numbers at addresses x and y, as a row of pairs in a right factor.

    values: address of [panel, depth, 4, 16, 16] of 32 bits; panel_step: bytes of a panel; number: of the pair.
    """
    row = values + number // 16 * 4 * TILE + number % 16 * 64
    for i in range(0, width, LANES):
        to = row + i // 32 * panel_step + i % 32 // 16 * TILE
        split_pairs(x + 4 * i, y + 4 * i, to, to + 2 * TILE)
