"""Vectors in the precisions that clients ask for: floats, base64, bytes, bits.

- base64: little-endian float32, the same bytes that the floats have.
- int8: x * 127 / r, rounded and clipped to [-127, 127]; uint8 is the same plus 128. The range r is one number for
  each model and size, the quantile 0.9999 of |x| over the unit vectors of fixed texts: never of the request, so
  that a text has the same bytes in any company. One range for all dimensions keeps the order of inner products.
- ubinary: the signs, a bit each, 1 for x > 0, packed as by `numpy.packbits` (the last byte filled up with zeros);
  binary is the same minus 128, signed.

Shape suffixes: N texts, D dims, B bytes.
"""

import asyncio
import base64
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import orjson

from f2llm.embed.embedder import Embedder, truncate
from f2llm.serve.scheduler import Scheduler

Precision = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]

QUANTILE = 0.9999
NUMBERS_AT_ONCE = 1 << 16  # written as JSON between two looks at other requests: a few milliseconds


class Calibration:
    """The range r of a model's vectors at each size, from texts that are computed when it is first asked for."""

    def __init__(self, embedder: Embedder, scheduler: Scheduler) -> None:
        self._embedder, self._scheduler = embedder, scheduler
        self._raw_ND: asyncio.Task[np.ndarray] | None = None
        self._ranges: dict[int, float] = {}

    async def range_at(self, dim: int) -> float:
        """The range r of vectors of `dim` dimensions."""
        if dim not in self._ranges:
            if self._raw_ND is None or (self._raw_ND.done() and self._raw_ND.exception()):
                self._raw_ND = asyncio.create_task(self._vectors())
            # A client that goes away must not take the work from others that wait for it.
            vectors_ND = truncate(await asyncio.shield(self._raw_ND), dim)
            self._ranges[dim] = float(np.quantile(np.abs(vectors_ND), QUANTILE))
        return self._ranges[dim]

    async def _vectors(self) -> np.ndarray:
        # Babel's names take a moment to load, and few servers are ever asked for bytes.
        from f2llm.export.sample import sample

        embedder = self._embedder
        prefix = embedder.prefix("query", None)
        chosen = sample(embedder.tokenizer, embedder.max_length, prefix, None)
        return await self._scheduler.vectors("calibration", embedder.token_ids(chosen.prompted(prefix)))


async def in_precision(vectors_ND: np.ndarray, precision: Precision, calibration: Calibration) -> list[Any]:
    """Each float32 vector as what `orjson.dumps` takes; other requests get their turn in between."""
    if precision == "float":
        return await _written(vectors_ND)
    if precision == "base64":
        return [base64.b64encode(row).decode() for row in np.ascontiguousarray(vectors_ND, dtype="<f4")]
    if precision in ("int8", "uint8"):
        numbers_ND = to_int8(vectors_ND, await calibration.range_at(vectors_ND.shape[1]))
        return await _written(numbers_ND if precision == "int8" else (numbers_ND ^ -128).view(np.uint8))
    bits_NB = np.packbits(vectors_ND > 0, axis=1)
    return await _written(bits_NB if precision == "ubinary" else (bits_NB ^ 128).view(np.int8))


def to_int8(vectors_ND: np.ndarray, most: float) -> np.ndarray:
    """int8 [N, D]: from [-most, most] to [-127, 127], clipped."""
    scaled_ND = vectors_ND * np.float32(127 / max(most, float(np.finfo(np.float32).tiny)))
    return np.clip(np.rint(scaled_ND), -127, 127).astype(np.int8)


async def _written(rows_ND: np.ndarray) -> list[orjson.Fragment]:
    rows_ND = np.ascontiguousarray(rows_ND)
    step = max(1, NUMBERS_AT_ONCE // rows_ND.shape[1])
    return [row async for row in _with_breaks(rows_ND, step, _fragment)]


def _fragment(row_D: np.ndarray) -> orjson.Fragment:
    return orjson.Fragment(orjson.dumps(row_D, option=orjson.OPT_SERIALIZE_NUMPY))


async def _with_breaks(rows: Iterable[np.ndarray], step: int, write: Callable[[np.ndarray], Any]) -> Any:
    for number, row in enumerate(rows, 1):
        yield write(row)
        if number % step == 0:
            await asyncio.sleep(0)
