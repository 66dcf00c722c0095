"""Random numbers as a pure function of a seed and of what they are for."""

import hashlib

import numpy as np


def generator(seed: int, *keys: int | str) -> np.random.Generator:
    """A generator that depends on `seed` and `keys` alone, never on what was drawn before.

    The same (seed, keys) give the same stream in every process and on every machine, so a batch, a split or a
    draw can be made again out of order.
    """
    digest = hashlib.sha256("\x1f".join([str(seed), *map(str, keys)]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
