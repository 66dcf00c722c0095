"""Process settings that our own commands make before any work, never on `import f2llm`.

glibc hands large blocks back to the kernel after every operation, and the page faults of taking them again cost more
than the arithmetic of a training step on a CPU. One arena that keeps what it has got makes the same step several
times as fast. F2LLM_MALLOC=0 switches it off; on other C libraries nothing is done.
"""

import ctypes
import os
import platform

# Parameter numbers of mallopt in glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
KEEP_BYTES = 1 << 30


def keep_memory() -> bool:
    """Tell glibc to keep freed memory; True if every setting was accepted. Call it before threads start."""
    if os.environ.get("F2LLM_MALLOC") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (M_ARENA_MAX, 1),
        (M_MMAP_THRESHOLD, KEEP_BYTES),
        (M_TRIM_THRESHOLD, KEEP_BYTES),
        (M_TOP_PAD, 64 << 20),
    )
    accepted = [mallopt(parameter, value) for parameter, value in settings]
    return all(result == 1 for result in accepted)
