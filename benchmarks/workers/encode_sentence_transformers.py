"""Encoding with sentence-transformers, from the same model folder."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer


def commands(model_folder: str, texts_file: str) -> dict[str, Callable[..., Any]]:
    model = SentenceTransformer(model_folder, device="cpu")
    texts = json.loads(Path(texts_file).read_text(encoding="utf-8"))

    def encode(batch_size: int) -> float:
        """Seconds for all texts."""
        started = time.perf_counter()
        model.encode(texts, batch_size=batch_size, show_progress_bar=False)
        return time.perf_counter() - started

    def save_vectors(path: str) -> None:
        np.save(path, model.encode(texts, show_progress_bar=False))

    return {"encode": encode, "save_vectors": save_vectors}
