"""Scores of pairs of texts by a cross-encoder, through sentence-transformers."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from f2llm.errors import F2Error
from f2llm.mine.search import Scores


def cross_encoder_scores(model: str, pairs: Sequence[tuple[str, str]]) -> Scores:
    """Float32 [pairs]: the score of each (query, document), as the model gives it (a logit or a probability).

    Args:
        model: a folder, or the name of a model of the Hugging Face hub.
    """
    return np.asarray(_load(model).predict(list(pairs), show_progress_bar=False), np.float32)


@lru_cache(maxsize=1)
def _load(model: str) -> Any:
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        raise F2Error(
            "a cross-encoder needs sentence-transformers, which is missing; install f2llm[mine]."
        ) from None
    return CrossEncoder(model)
