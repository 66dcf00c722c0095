"""`tokenizers` alone: `encode_batch` of texts."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


def commands(folder_name: str) -> dict[str, Callable[..., Any]]:
    folder = Path(folder_name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))

    def encode_batch(batch_size: int) -> float:
        """Seconds for all texts."""
        started = time.perf_counter()
        for first in range(0, len(texts), batch_size):
            tokenizer.encode_batch(texts[first : first + batch_size])
        return time.perf_counter() - started

    def tokens() -> int:
        encoded = (
            tokenizer.encode_batch(texts[first : first + 1024]) for first in range(0, len(texts), 1024)
        )
        return sum(len(encoding) for some in encoded for encoding in some)

    return {"encode_batch": encode_batch, "tokens": tokens}
