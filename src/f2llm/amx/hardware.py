"""Whether this machine has Intel's matrix units (AMX), and leave to use them; known without compiling anything."""

import ctypes
import os
import platform
from functools import cache
from importlib.util import find_spec
from pathlib import Path

FLAGS = {"amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512vl"}
REQUEST_PERMISSION, TILE_DATA, SYS_ARCH_PRCTL = 0x1023, 18, 158  # of arch_prctl(2)


@cache
def why_not() -> str | None:
    """Why the matrix units are not used here, in a few words; None where they are.

    F2LLM_AMX=0 in the environment switches them off.
    """
    if os.environ.get("F2LLM_AMX") == "0":
        return "switched off by F2LLM_AMX=0"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "needs Linux on x86_64"
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    if not set(flags) >= FLAGS:
        return "the processor has no AMX"
    if find_spec("numba") is None:
        return "numba is not installed"
    if ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) != 0:
        return "the system does not permit it"
    return None
