"""How kernels are compiled: without the interpreter's lock, and kept on disk so that the next process need not."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

KERNEL: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Machine code instead of Python; without checks of bounds."""
    return cast(F, numba.njit(function, **KERNEL))


def any_order(function: F) -> F:
    """`kernel` for sums and maxima, which may be taken in any order, so sixteen at a time."""
    return cast(F, numba.njit(function, fastmath={"reassoc", "contract", "nsz", "nnan"}, **KERNEL))


def kept_on_disk(function: F) -> F:
    """`kernel` for what a process calls first, whose machine code is kept under a hash of all sources of this package.

    numba by itself looks at the function's own file: after a change in another one it would go on with what it has.
    Where nothing can be written, every process compiles anew.
    """
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return kernel(function)
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        return cast(F, numba.njit(function, cache=True, **KERNEL))
    finally:
        numba.config.CACHE_DIR = before


def _folder() -> Path:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "f2llm" / "kernels" / digest.hexdigest()[:16]
