"""llama.cpp in a process of its own, because where it fails it takes the process with it.

`python -m f2llm.export.llama_cpp_worker FILE SIZE`: each line of standard input is a JSON list of texts, each line of
standard output the list of their vectors, of unit length. SIZE is the most tokens of a text.
"""

import json
import os
import sys
from importlib import import_module
from typing import Any


def main() -> None:
    path, size = sys.argv[1], int(sys.argv[2])
    # The library writes on standard output as well: that goes to standard error, and answers alone to the caller.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llama_cpp: Any = import_module("llama_cpp")
    model = llama_cpp.Llama(
        path, embedding=True, n_ctx=size, n_batch=size, n_ubatch=size, n_gpu_layers=0, verbose=False
    )
    for line in sys.stdin:
        vectors = [model.embed(text, normalize=True, truncate=False) for text in json.loads(line)]
        answers.write(json.dumps(vectors) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
