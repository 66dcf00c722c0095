"""Pruning a model folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from f2llm.compress.prune import prune_model


def commands() -> dict[str, Callable[..., Any]]:
    def prune(source: str, out: str, calibration: str, texts: int, **shape: int) -> int:
        """Parameters of what is kept."""
        pruned = prune_model(
            source,
            Path(out),
            calibration=[Path(calibration)],
            hidden_size=shape["hidden_size"],
            intermediate_size=shape["intermediate_size"],
            layers=shape["layers"],
            calibration_texts=texts,
        )
        return pruned.shape.parameters

    return {"prune": prune}
