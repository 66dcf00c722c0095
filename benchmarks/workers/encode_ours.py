"""Encoding with `Embedder`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from f2llm.embed.embedder import Embedder
from f2llm.files import read_json


def commands(model_folder: str, texts_file: str) -> dict[str, Callable[..., Any]]:
    embedder = Embedder(model_folder)
    texts = read_json(Path(texts_file))

    def encode() -> float:
        """Seconds for all texts."""
        started = time.perf_counter()
        embedder.encode(texts, too_long="truncate")
        return time.perf_counter() - started

    def save_vectors(path: str) -> None:
        np.save(path, embedder.encode(texts, too_long="truncate"))

    def tokens() -> int:
        """Real tokens that `encode` computes, EOS included."""
        return embedder.tokens(texts)

    return {"encode": encode, "save_vectors": save_vectors, "tokens": tokens}
