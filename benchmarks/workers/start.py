"""The process in which one contender of a benchmark lives: `python -m workers.start [--keep-memory] NAME ARGUMENTS`.

Memory policy, then the worker module (and with it torch and the library measured), then one JSON object a line:
commands come in on standard input, answers go out on standard output. Standard library only up to that import, so
that it runs in any environment.

A worker module has a function `commands(*arguments)` that returns its commands by name; they are called with the
request's other keys and return something that JSON can hold. Every worker answers `peak_memory` as well.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

from f2llm.runtime import keep_memory, peak_memory

LIBRARIES = ("torch", "numpy", "tokenizers", "transformers", "sentence-transformers")


def versions() -> dict[str, str]:
    """Versions of the libraries that matter to speed, those that are installed here."""
    installed = {name: list(metadata.distributions(name=name)) for name in LIBRARIES}
    return {name: found[0].version for name, found in installed.items() if found}


def main(arguments: list[str]) -> None:
    # Whatever a library prints goes to standard error; the answers keep the real standard output to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    keeps = arguments[0] == "--keep-memory"
    name, *rest = arguments[1:] if keeps else arguments
    if keeps:
        keeps = keep_memory()
    try:
        module = importlib.import_module(f"workers.{name}")
    except ImportError as error:
        answer({"missing": str(error)})
        return
    import torch  # not earlier: the memory policy must be in place before threads start

    commands: dict[str, Callable[..., Any]] = {"peak_memory": peak_memory, **module.commands(*rest)}
    answer({"threads": torch.get_num_threads(), "memory_policy": keeps, "versions": versions()})
    for line in sys.stdin:
        request = json.loads(line)
        answer({"value": commands[request.pop("command")](**request)})


if __name__ == "__main__":
    main(sys.argv[1:])
