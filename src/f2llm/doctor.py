"""What results and speed depend on, beside the code: versions, threads, memory policy."""

import importlib.metadata
import os
import platform
from typing import Any

from f2llm import __version__, runtime
from f2llm.amx.hardware import why_not

LIBRARIES = (
    "torch",
    "numpy",
    "numba",
    "tokenizers",
    "safetensors",
    "pyarrow",
    "babel",
    "lancedb",
    "scikit-learn",
)


def examine() -> dict[str, Any]:
    """Facts by name; a library that is not there is `missing`."""
    import torch

    return {
        "f2llm": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{library: _version(library) for library in LIBRARIES},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "matrix units": f"not used: {reason}" if (reason := why_not()) else "used",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "keeps freed memory": runtime.keep_memory(),
    }


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
