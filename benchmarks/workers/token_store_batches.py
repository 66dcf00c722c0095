"""The batches that both contenders read: numbers of documents, drawn without regard to where they lie."""

from itertools import count

import numpy as np

BATCHES, BATCH = 40, 512

_turns = count()


def batches(documents: int) -> list[np.ndarray]:
    """Int64 [512] each; others at every call, the same ones at the same call of every process."""
    rng = np.random.default_rng(next(_turns))
    return [rng.integers(documents, size=BATCH) for _ in range(BATCHES)]
