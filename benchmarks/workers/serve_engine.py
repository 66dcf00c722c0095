"""The engine that a server has inside, without the server: `Embedder.encode` in the process that asks."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from f2llm.embed.embedder import Embedder
from f2llm.files import read_json


def commands(model_folder: str, texts_file: str) -> dict[str, Callable[..., Any]]:
    embedder = Embedder(model_folder)
    texts = read_json(Path(texts_file))

    def encode() -> float:
        """Seconds for all texts."""
        return _seconds(texts)

    def alone(query: str, times: int) -> float:
        """Median seconds for one query."""
        return statistics.median(_seconds([query]) for _ in range(times))

    def _seconds(texts: list[str]) -> float:
        started = time.perf_counter()
        embedder.encode(texts)
        return time.perf_counter() - started

    return {"encode": encode, "alone": alone}
