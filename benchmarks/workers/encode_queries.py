"""Encoding short queries behind one instruction, with what they share computed once, or with every query whole."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from f2llm.embed.embedder import Embedder
from f2llm.embed.prefixes import Group, Tokens
from f2llm.files import read_json


def commands(model_folder: str, texts_file: str, instruction: str) -> dict[str, Callable[..., Any]]:
    sharing, whole = Embedder(model_folder), Embedder(model_folder)
    whole._prefixes.groups = _all_alone  # type: ignore[method-assign]
    texts = read_json(Path(texts_file))

    def encode(share: bool) -> float:
        """Seconds for all texts."""
        started = time.perf_counter()
        (sharing if share else whole).encode(texts, instruction=instruction)
        return time.perf_counter() - started

    def smallest_cosine() -> float:
        a_ND, b_ND = (embedder.encode(texts, instruction=instruction) for embedder in (sharing, whole))
        return float((a_ND.astype(np.float64) * b_ND).sum(1).min())

    return {"encode": encode, "smallest_cosine": smallest_cosine}


def _all_alone(sequences: Sequence[Tokens]) -> list[Group]:
    return [((), list(range(len(sequences))))]
