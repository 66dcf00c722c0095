"""Products on matrix units against float64, at every shape of tiles; the steps between them against plain formulas."""

import numpy as np
import pytest
import torch

from f2llm.amx.hardware import why_not

if reason := why_not():
    pytest.skip(f"no matrix units here: {reason}", allow_module_level=True)

from numba import njit

from f2llm.amx import maps, steps
from f2llm.amx.instructions import CONFIGURATION, configure
from f2llm.amx.products import LEFT_STEP, RIGHT_STEP, TILE, multiply

RNG = np.random.default_rng(0)


@njit  # type: ignore[untyped-decorator]
def _product(x_MK: np.ndarray, right: np.ndarray, out_MN: np.ndarray, left: np.ndarray, add: bool) -> None:
    configure(CONFIGURATION.ctypes.data)
    deep = x_MK.shape[1] // 32
    for row in range(len(x_MK)):
        address = x_MK.ctypes.data + row * x_MK.shape[1] * 4
        steps.put_row(address, x_MK.shape[1], np.float32(1), left.ctypes.data, row)
    multiply(
        left.ctypes.data, deep * LEFT_STEP, (len(x_MK) + 15) // 16, right.ctypes.data, deep * RIGHT_STEP,
        out_MN.shape[1] // 32, out_MN.ctypes.data, out_MN.shape[1] * 4, deep, add,
    )  # fmt: skip


def product(x_MK: np.ndarray, weight_NK: np.ndarray, start: float | None = None) -> np.ndarray:
    rows = -(-len(x_MK) // 16) * 16
    left = np.zeros(rows * x_MK.shape[1] * 4, np.uint8)
    out_MN = np.full((rows, len(weight_NK)), np.nan if start is None else start, np.float32)
    right = np.zeros(weight_NK.size, np.uint32)
    steps.pack_right(weight_NK, right)
    _product(x_MK, right, out_MN, left, start is not None)
    return out_MN[: len(x_MK)]


@pytest.mark.parametrize("shape", [(1, 32, 32), (16, 64, 32), (17, 160, 96), (33, 192, 64), (200, 352, 128)])
def test_a_product_is_that_of_float64(shape: tuple[int, int, int]) -> None:
    rows, depth, columns = shape
    x_MK = RNG.standard_normal((rows, depth), np.float32)
    weight_NK = RNG.standard_normal((columns, depth), np.float32)
    exact_MN = x_MK.astype(np.float64) @ weight_NK.astype(np.float64).T
    typical = np.sqrt(depth)
    assert np.abs(product(x_MK, weight_NK) - exact_MN).max() < 5e-5 * typical
    assert np.abs(product(x_MK, weight_NK, start=2.5) - 2.5 - exact_MN).max() < 5e-5 * typical


def test_numbers_of_very_different_size_keep_their_digits() -> None:
    """What fixed point would lose: a row with one number ten thousand times as large as the others."""
    x_MK = RNG.standard_normal((16, 64), np.float32)
    x_MK[:, 5] *= 1e4
    weight_NK = RNG.standard_normal((32, 64), np.float32)
    weight_NK[:, 5] = 0
    exact_MN = x_MK.astype(np.float64) @ weight_NK.astype(np.float64).T
    assert np.abs(product(x_MK, weight_NK) - exact_MN).max() < 5e-5 * 8


def test_what_is_no_number_stays_none() -> None:
    x_MK = RNG.standard_normal((3, 32), np.float32)
    x_MK[1, 7] = np.nan
    found_MN = product(x_MK, RNG.standard_normal((32, 32), np.float32))
    assert np.isnan(found_MN[1]).all()
    assert np.isfinite(found_MN[[0, 2]]).all()


def halves_of_rows(left: np.ndarray, rows: int, width: int) -> np.ndarray:
    """The numbers that a left factor stands for, float64 [rows, width]."""
    tiles = left.view(np.uint16).reshape(-1, width // 32, 2, 16, 32)
    numbers = (tiles.astype(np.uint32) << 16).view(np.float32).astype(np.float64).sum(2)
    return numbers.transpose(0, 2, 1, 3).reshape(-1, width)[:rows]


def test_swiglu_is_the_plain_formula() -> None:
    gate_TW, up_TW = (4 * RNG.standard_normal((20, 128), np.float32) for _ in range(2))
    gate_TW[0, :4] = [-200, 200, 0, -0.0]
    left = maps.empty_left(20, 128)
    maps.swiglu_rows(gate_TW, up_TW, 20, left, False)
    gate, up = torch.from_numpy(gate_TW).double(), torch.from_numpy(up_TW).double()
    expected = (torch.nn.functional.silu(gate) * up).numpy()
    np.testing.assert_allclose(halves_of_rows(left.factor, 20, 128), expected, rtol=1e-5, atol=1e-30)


def test_norms_are_the_plain_formula() -> None:
    x_TW = 3 * RNG.standard_normal((21, 96), np.float32)
    left = maps.empty_left(21, 96)
    maps.norm_rows(x_TW, 21, np.float32(1e-6), left, False)
    exact = x_TW.astype(np.float64)
    exact /= np.sqrt((exact**2).mean(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(halves_of_rows(left.factor, 21, 96), exact, rtol=1e-5)


def test_a_tile_is_where_place_says() -> None:
    assert steps.place(0, 3, 17, 70) == (1 * 3 + 2) * LEFT_STEP + (1 * 32 + 6) * 2
    assert LEFT_STEP == 2 * TILE
