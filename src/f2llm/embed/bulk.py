"""Vectors of a whole file, written as they come: memory does not grow with the input.

Shape suffixes: N texts, D dims.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from f2llm.errors import UsageError
from f2llm.files import atomic_write
from f2llm.progress import progress

CHUNK = 4096  # vectors written at a time


def embed_file(vectors: Iterable[np.ndarray], output: Path, *, identity: str) -> int:
    """Write float32 [D] vectors to `output` and return their number.

    .npy holds one array [N, D]; .parquet a column `vector` of lists and, in its metadata, the model's identity.
    """
    writers = {".npy": _write_npy, ".parquet": _write_parquet}
    if output.suffix not in writers:
        raise UsageError(f"{output} ends in {output.suffix!r}; expected .npy or .parquet, so name it so.")
    chunks = _chunks(vectors)
    first = next(chunks, None)
    if first is None:
        raise UsageError("the input has no texts; give at least one.")
    return writers[output.suffix](chain([first], chunks), first.shape[1], output, identity)


def _chunks(vectors: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    remaining = iter(vectors)
    with progress(total=None, what="embed", unit="text") as bar:
        while part := list(islice(remaining, CHUNK)):
            yield np.stack(part)
            bar.advance(len(part))


def _write_npy(chunks_ND: Iterable[np.ndarray], width: int, output: Path, identity: str) -> int:
    count = 0
    with atomic_write(output) as file:
        # The header says how many rows follow, which is known at the end: room is left for any number.
        _write_header(file, 0, width)
        for chunk_ND in chunks_ND:
            file.write(np.ascontiguousarray(chunk_ND, dtype="<f4").tobytes())
            count += len(chunk_ND)
        file.seek(0)
        _write_header(file, count, width)
    return count


def _write_header(file: IO[bytes], count: int, width: int) -> None:
    # NumPy pads the header so that the number of rows can grow in place.
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
    )


def _write_parquet(chunks_ND: Iterable[np.ndarray], width: int, output: Path, identity: str) -> int:
    count = 0
    schema = pa.schema([("vector", pa.list_(pa.float32(), width))], metadata={"f2llm.identity": identity})
    with atomic_write(output) as file, pq.ParquetWriter(file, schema) as writer:
        for chunk_ND in chunks_ND:
            column = pa.FixedSizeListArray.from_arrays(pa.array(chunk_ND.ravel()), width)
            writer.write_table(pa.table([column], schema=schema))
            count += len(chunk_ND)
    return count
