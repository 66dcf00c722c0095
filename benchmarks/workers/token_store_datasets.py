"""Reading batches from a memory-mapped dataset, as lists of NumPy arrays."""

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped,import-not-found,unused-ignore]
import numpy as np

from workers.token_store_batches import batches


def commands(folder_name: str) -> dict[str, Callable[..., Any]]:
    dataset = datasets.Dataset.from_file(str(Path(folder_name) / "dataset.arrow"))

    def arrays(form: str, numbers: Any) -> list[np.ndarray]:
        column = dataset.with_format(form)[numbers]["ids"]
        if form == "python":
            return [np.asarray(ids, dtype=np.uint32) for ids in column]
        if form == "numpy":
            return list(column)
        # What the library gives as Arrow is cut up as cheaply as it can be.
        column = column.combine_chunks()
        flat, offsets = column.values.to_numpy(), column.offsets.to_numpy().tolist()
        return [flat[begin:end] for begin, end in pairwise(offsets)]

    def read(form: str) -> float:
        """Seconds of a batch."""
        drawn = batches(len(dataset))
        started = time.perf_counter()
        for numbers in drawn:
            arrays(form, numbers)
        return (time.perf_counter() - started) / len(drawn)

    def sum_of_first(count: int, form: str) -> int:
        return sum(int(ids.sum()) for ids in arrays(form, np.arange(count)))

    return {"read": read, "sum_of_first": sum_of_first}
