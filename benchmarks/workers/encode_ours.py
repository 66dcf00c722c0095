"""Encoding with `Embedder`: in the best way of this machine, by torch, or in int8."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from f2llm.embed.compute import TOKENS_PER_BATCH
from f2llm.embed.embedder import Embedder
from f2llm.files import read_json
from f2llm.model.folder import read_config
from workers.arithmetic import linear_shapes, most_products


def commands(model_folder: str, texts_file: str, compute: str = "best") -> dict[str, Callable[..., Any]]:
    if compute == "torch":
        os.environ["F2LLM_AMX"] = "0"
    embedder = Embedder(model_folder, "int8" if compute == "int8" else "float32")
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

    def matrix_product() -> float:
        """Most multiply-adds per second of `torch.mm(out=)`: on large squares and at the shapes of a batch."""
        return most_products(linear_shapes(read_config(Path(model_folder)), TOKENS_PER_BATCH))

    return {
        "encode": encode,
        "save_vectors": save_vectors,
        "tokens": tokens,
        "matrix_product": matrix_product,
    }
