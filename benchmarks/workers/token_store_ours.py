"""Building a token store, and reading batches from one."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from f2llm.data.token_store import open_store
from f2llm.data.token_store_build import build
from f2llm.engine import using
from workers.token_store_batches import batches


def commands(folder_name: str) -> dict[str, Callable[..., Any]]:
    folder = Path(folder_name)
    store = open_store(folder / "store") if (folder / "store").exists() else None

    def build_store() -> dict[str, Any]:
        shutil.rmtree(folder / "built", ignore_errors=True)
        started = time.perf_counter()
        with using():  # as a stage does: its workers are started once
            facts = build([folder / "rows"], folder / "tokenizer.json", folder / "built", {})
        return {"seconds": time.perf_counter() - started, "tokens": facts["tokens"], "texts": facts["texts"]}

    def read() -> float:
        """Seconds of a batch."""
        assert store
        drawn = batches(len(store))
        started = time.perf_counter()
        for numbers in drawn:
            store.tokens(numbers)
        return (time.perf_counter() - started) / len(drawn)

    def sum_of_first(count: int) -> int:
        assert store
        return sum(int(ids.sum()) for ids in store.tokens(range(count)))

    return {"build": build_store, "read": read, "sum_of_first": sum_of_first}
