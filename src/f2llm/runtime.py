"""The process: settings that our own commands make before any work, never on `import f2llm`, and its memory.

glibc hands large blocks back to the kernel after every operation, and the page faults of taking them again cost more
than the arithmetic of a training step on a CPU. One arena that keeps what it has got makes the same step several
times as fast. F2LLM_MALLOC=0 switches it off; on other C libraries nothing is done.
"""

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

# Parameter numbers of mallopt in glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
KEEP_BYTES = 1 << 30
OLD_MOST_BYTES = 32 << 20  # older versions of glibc refuse a larger M_MMAP_THRESHOLD


def keep_memory() -> bool:
    """Tell glibc to keep freed memory; True if every setting was accepted. Call it before threads start."""
    if os.environ.get("F2LLM_MALLOC") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    accepted = [
        mallopt(M_ARENA_MAX, 1),
        mallopt(M_MMAP_THRESHOLD, KEEP_BYTES) or mallopt(M_MMAP_THRESHOLD, OLD_MOST_BYTES),
        mallopt(M_TRIM_THRESHOLD, KEEP_BYTES),
        mallopt(M_TOP_PAD, 64 << 20),
    ]
    return all(result == 1 for result in accepted)


def peak_memory() -> int:
    """Most bytes this process has held at once."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would do, but there a child inherits the peak of the process that started it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
