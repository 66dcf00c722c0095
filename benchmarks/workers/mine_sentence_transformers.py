"""Mining with sentence-transformers' `mine_hard_negatives`, from the same model folder."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

QUERIES_AT_ONCE = 2048  # its own 16,384 would need 13 GB with 200,000 documents


def commands(model_folder: str, texts_file: str) -> dict[str, Callable[..., Any]]:
    model = SentenceTransformer(model_folder, device="cpu")
    given = json.loads(Path(texts_file).read_text(encoding="utf-8"))
    pairs = Dataset.from_dict({"query": given["queries"], "positive": given["positives"]})
    spent = [0.0]
    model.encode_query = _timed(model.encode_query, spent)
    model.encode_document = _timed(model.encode_document, spent)
    mined: dict[str, list[str]] = {}

    def encode(batch_size: int, texts: int) -> float:
        """Seconds for the first so many documents."""
        started = time.perf_counter()
        model.encode(given["documents"][:texts], batch_size=batch_size, show_progress_bar=False)
        return time.perf_counter() - started

    def mine(batch_size: int, candidates: int, last_rank: int, relative_margin: float) -> dict[str, float]:
        """Seconds of encoding, and of all else."""
        spent[0], started = 0.0, time.perf_counter()
        found = mine_hard_negatives(
            pairs,
            model,
            corpus=given["documents"],
            range_max=last_rank,
            num_negatives=candidates,
            relative_margin=relative_margin,
            output_format="labeled-list",
            batch_size=batch_size,
            faiss_batch_size=QUERIES_AT_ONCE,
            verbose=False,
        )
        seconds = time.perf_counter() - started
        mined.clear()
        mined.update({row["query"]: row["positive"][1:] for row in found})
        return {"encode": spent[0], "rest": seconds - spent[0]}

    def save(path: str) -> None:
        Path(path).write_text(json.dumps(mined), encoding="utf-8")

    return {"encode": encode, "mine": mine, "save": save}


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **settings)
        finally:
            spent[0] += time.perf_counter() - started

    return timed
