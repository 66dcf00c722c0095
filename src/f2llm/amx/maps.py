"""Linear maps between float32 numbers, in float32 or in int8: the one place where a product's precision matters.

In int8 every output of a map has a scale, and so has every row that goes through it, found in that row alone: what
else is in the batch cannot change a vector.

Shape suffixes: T tokens, W numbers of a row, L layers, P parts of a map in a layer, F outputs.
"""

from typing import NamedTuple

import numpy as np

from f2llm.amx import products, products_of_bytes
from f2llm.amx.compiling import kernel
from f2llm.amx.instructions import LANES, from_ints, largest_size, split_swiglu, swiglu, to_bytes
from f2llm.amx.products import PANEL, ROWS, TILE
from f2llm.amx.steps import inverse_rms, place, put_row, sum_of_squares


class Map(NamedTuple):
    """The maps of one kind, as right factors."""

    right: np.ndarray  # uint8 [L, P, bytes]
    scale: np.ndarray  # float32 [L, P, F], in int8


class Left(NamedTuple):
    """Rows that go through a map, as a left factor."""

    factor: np.ndarray  # uint8
    width: int
    scale_T: np.ndarray  # float32, in int8


@kernel
def empty_left(tokens: int, width: int) -> Left:
    """Room for so many rows, in either precision; rows that are never written stay finite."""
    rows = -(-tokens // ROWS) * ROWS
    return Left(np.zeros(rows * width * 4, np.uint8), width, np.zeros(rows, np.float32))


@kernel
def norm_rows(x_TW: np.ndarray, rows: int, eps: np.float32, left: Left, in_bytes: bool) -> None:
    """RMSNorm without its weight, which is part of the map that follows."""
    for row in range(rows):
        factor = inverse_rms(x_TW, row, 0, left.width, eps)
        if in_bytes:
            _put_bytes(x_TW, row, factor, left)
        else:
            at = x_TW.ctypes.data + row * left.width * 4
            put_row(at, left.width, factor, left.factor.ctypes.data, row)


@kernel
def put_rows(x_TW: np.ndarray, rows: int, left: Left, in_bytes: bool) -> None:
    """Rows as they are."""
    for row in range(rows):
        if in_bytes:
            _put_bytes(x_TW, row, np.float32(1), left)
        else:
            at, one = x_TW.ctypes.data + row * left.width * 4, np.float32(1)
            put_row(at, left.width, one, left.factor.ctypes.data, row)


@kernel
def swiglu_rows(gate_TW: np.ndarray, up_TW: np.ndarray, rows: int, left: Left, in_bytes: bool) -> None:
    """silu(gate) * up; in int8 gate is overwritten."""
    for row in range(rows):
        gate = gate_TW.ctypes.data + row * left.width * 4
        up = up_TW.ctypes.data + row * left.width * 4
        for i in range(0, left.width, LANES):
            if in_bytes:
                swiglu(gate + 4 * i, up + 4 * i)
            else:
                to = place(left.factor.ctypes.data, left.width // products.DEPTH, row, i)
                split_swiglu(gate + 4 * i, up + 4 * i, to, to + TILE)
        if in_bytes:
            _put_bytes(gate_TW, row, np.float32(1), left)


@kernel
def _put_bytes(x_TW: np.ndarray, row: int, factor: np.float32, left: Left) -> None:
    """A row times factor, the largest number as 127."""
    at = x_TW.ctypes.data + row * left.width * 4
    largest = largest_size(at, left.width)
    # What is no number must not become one: it goes into the scale, and from there into the whole row.
    taint = sum_of_squares(x_TW, row, 0, left.width) * np.float32(0)
    left.scale_T[row] = largest * factor / products_of_bytes.MOST + taint
    to_byte = products_of_bytes.MOST / largest if largest > 0 else np.float32(0)
    depth = left.width // products_of_bytes.DEPTH
    start = left.factor.ctypes.data + row // ROWS * depth * TILE + row % ROWS * products_of_bytes.DEPTH
    for i in range(0, left.width, LANES):
        to = start + i // products_of_bytes.DEPTH * TILE + i % products_of_bytes.DEPTH
        to_bytes(at + 4 * i, to_byte, to)


@kernel
def apply(
    map_: Map, layer: int, part: int, first: int, panels: int, left: Left, tokens: int, out: int, out_row: int,
    add: bool, ints: np.ndarray,
) -> None:  # fmt: skip
    """Send rows through a map, or through some of its panels of 32 outputs, from `first` on.

    Args:
        tokens: rows of `left`. out, out_row: address and bytes of a row of float32 results. add: to what they hold.
        ints: room for int32 [T, outputs].
    """
    rows, right = -(-tokens // ROWS), map_.right[layer, part].ctypes.data
    if map_.scale.size == 0:
        depth = left.width // products.DEPTH
        panel = depth * products.RIGHT_STEP
        products.multiply(
            left.factor.ctypes.data, depth * products.LEFT_STEP, rows, right + first * panel, panel, panels, out,
            out_row, depth, add,
        )  # fmt: skip
        return
    depth = left.width // products_of_bytes.DEPTH
    right += first * depth * products_of_bytes.RIGHT_STEP
    ints_row = panels * PANEL * 4
    products_of_bytes.multiply(
        left.factor.ctypes.data, depth * TILE, rows, right, panels, ints.ctypes.data, ints_row, depth
    )
    scales = map_.scale[layer, part].ctypes.data + first * PANEL * 4
    kept = np.float32(1) if add else np.float32(0)
    for row in range(tokens):
        at, to = ints.ctypes.data + row * ints_row, out + row * out_row
        for i in range(0, ints_row, 4 * LANES):
            from_ints(at + i, left.scale_T[row], scales + i, kept, to + i)
