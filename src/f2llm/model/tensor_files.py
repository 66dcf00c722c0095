"""Weights on disk, a tensor at a time: a model is read and written without ever being in memory as a whole.

Files are safetensors. They are read from the offsets that their header states and never mapped into memory, where
pages that were once read would stay and count. What is written is float32 and to the byte what the library itself
would write, so that a model's identity does not depend on how it was saved.

Shape suffix: R rows, along a tensor's first dimension.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from f2llm.errors import F2Error
from f2llm.files import atomic_write

HEAD = "lm_head.weight"  # a language model's output head, which no vector depends on
BYTES = 4  # of a float32
LONGEST_HEADER = 100_000_000  # bytes, as in the library
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    path: Path
    file: IO[bytes]
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file


class TensorFiles:
    """The tensors of a decoder in open safetensors files, under the decoder's names."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._at = {name.removeprefix("model."): place for name, place in places.items() if name != HEAD}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self._at.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, in float32."""
        place = self._at[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        _fill(tensor, place, place.start)
        return tensor.float()

    def read_rows(self, name: str, rows_R: Sequence[int]) -> Tensor:
        """Rows of one tensor in the order given, in float32; those that follow one another are read at once."""
        place = self._at[name]
        row = place.shape[1:]
        tensor = torch.empty((len(rows_R), *row), dtype=place.dtype)
        done = 0
        for first, count in _runs(rows_R):
            start = place.start + first * prod(row) * place.dtype.itemsize
            _fill(tensor[done : done + count], place, start)
            done += count
        return tensor.float()


@contextmanager
def open_tensors(files: Sequence[Path]) -> Iterator[TensorFiles]:
    """The tensors of safetensors files; an F2Error names a file that is missing, broken or cut off."""
    with ExitStack() as stack:
        places: dict[str, Place] = {}
        for path in files:
            try:
                file = stack.enter_context(open(path, "rb", buffering=0))
                places |= _places(path, file)
            except (FileNotFoundError, AttributeError, KeyError, TypeError, ValueError) as error:
                raise F2Error(f"{path} cannot be read ({error}); copy or make the folder again.") from None
        yield TensorFiles(places)


def write_tensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    tensor_of: Callable[[str], Tensor | Iterable[Tensor]],
) -> None:
    """Write float32 tensors of these shapes.

    Args:
        tensor_of: asked for one tensor after the other, by name, sorted; gives it whole, or blocks of its rows.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + BYTES * prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [start, end]}
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)
    with atomic_write(path) as file:
        file.write(len(written).to_bytes(8, "little") + written)
        for name in sorted(shapes):
            tensor = tensor_of(name)
            _write(file, name, shapes[name], [tensor] if isinstance(tensor, Tensor) else tensor)


def check_shapes(
    got: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], where: Path
) -> None:
    """Raise F2Error, naming the first tensor that is missing, not called for, or of another shape than expected."""
    if missing := sorted(expected.keys() - got.keys()):
        raise F2Error(f"{where} lacks {len(missing)} tensors, {missing[0]} first; copy the folder again.")
    if surplus := sorted(got.keys() - expected.keys()):
        raise F2Error(
            f"{where} has {len(surplus)} tensors that config.json does not call for, {surplus[0]} first."
        )
    for name, shape in expected.items():
        if tuple(got[name]) != tuple(shape):
            raise F2Error(
                f"{where}: {name} has shape {list(got[name])}, config.json calls for {list(shape)}; "
                "the files are not of the same model."
            )


def _places(path: Path, file: IO[bytes]) -> dict[str, Place]:
    """Where the header puts each tensor; a ValueError, KeyError or TypeError if it cannot be so.

    Nothing that is read later lies outside the file: every tensor has the bytes that its shape takes, one begins
    where the one before it ends, and the last one ends with the file.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, LONGEST_HEADER):
        raise ValueError(f"its header should take {length} bytes, but the file has {size}")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    places, end = {}, 0
    for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if facts["dtype"] not in DTYPES:
            raise ValueError(f"{name} is of the type {facts['dtype']}, expected {', '.join(DTYPES)}")
        dtype, shape = DTYPES[facts["dtype"]], tuple(facts["shape"])
        start, stop = facts["data_offsets"]
        if start != end or stop - start != prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(
                f"{name} lies at {start} to {stop}, which its shape and the others do not call for"
            )
        places[name] = Place(path, file, dtype, shape, 8 + length + start)
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"it should have {8 + length + end} bytes, but has {size}")
    return places


def _fill(tensor: Tensor, place: Place, start: int) -> None:
    """Read a contiguous tensor from byte `start` on."""
    view = tensor.flatten().view(torch.uint8).numpy().data
    done = 0
    while done < len(view):  # the system gives 2 GB at most
        got = os.preadv(place.file.fileno(), [view[done:]], start + done)
        if not got:
            raise F2Error(f"{place.path} became shorter while it was read; copy or make the folder again.")
        done += got


def _runs(rows_R: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of rows that follow one another."""
    if isinstance(rows_R, range) and rows_R.step == 1:
        yield rows_R.start, len(rows_R)
        return
    first = count = 0
    for row in rows_R:
        if count and row == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = row, 1
    if count:
        yield first, count


def _write(file: IO[bytes], name: str, shape: Sequence[int], blocks: Iterable[Tensor]) -> None:
    rows = 0
    for block in blocks:
        if tuple(block.shape[1:]) != tuple(shape[1:]):
            break
        rows += len(block)
        file.write(block.detach().to(torch.float32).contiguous().numpy().data)
    else:
        if rows == shape[0]:
            return
    raise F2Error(
        f"{name} came out with shape {[rows or len(block), *block.shape[1:]]}, expected {list(shape)}; "
        "this is a mistake of the program: please report it."
    )
