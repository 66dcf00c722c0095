"""Mining with `mine_stage`."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from f2llm.data.rows import Source, read_rows, rows_table, write_rows
from f2llm.embed.embedder import Embedder
from f2llm.engine import Engine, using
from f2llm.files import read_json, write_json
from f2llm.mine.mining import mine_stage
from f2llm.mine.texts import embedder
from f2llm.recipe_corpus import MineStage

SOURCE = Source(
    name="texts", format="retrieval", task="texts", symmetric=False, instruction="", licence="unknown"
)


def commands(model_folder: str, texts_file: str, folder: str) -> dict[str, Callable[..., Any]]:
    rows, out = Path(folder) / "rows", Path(folder) / "mined"
    given = read_json(Path(texts_file))
    queries = given["queries"]
    # Documents that answer no query come as negatives that rows have, which are mined anew.
    more = [given["documents"][row :: len(queries)] for row in range(len(queries))]
    columns = {
        "query": queries,
        "positives": [[text] for text in given["positives"]],
        "negatives": more,
        "query_lang": ["und"] * len(queries),
    }
    write_rows(rows, rows_table(SOURCE, columns), [SOURCE])
    embedder(Path(model_folder))  # the peer has its model too, before it is timed
    spent = _timed_encoding()

    def mine(**settings: Any) -> dict[str, float]:
        """Seconds of the embedder, and of all else from rows to rows."""
        shutil.rmtree(out, ignore_errors=True)
        config = MineStage(
            stage="mine", data=["rows"], model="model", given_negatives="replace", samples=0, **settings
        )
        spent[0], started = 0.0, time.perf_counter()
        with using(Engine(workers=1)):
            mine_stage(config, [rows], Path(model_folder), out, seed=0)
        return {"encode": spent[0], "rest": time.perf_counter() - started - spent[0]}

    def save(path: str) -> None:
        """The negatives of each query."""
        table, _ = read_rows(out)
        write_json(Path(path), dict(zip(queries, table["negatives"].to_pylist(), strict=True)))

    return {"mine": mine, "save": save}


def _timed_encoding() -> list[float]:
    """A list whose only number grows by the seconds of each call of the embedder."""
    spent, encode = [0.0], Embedder.encode

    def timed(self: Embedder, *texts: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        try:
            return encode(self, *texts, **settings)
        finally:
            spent[0] += time.perf_counter() - started

    Embedder.encode = timed  # type: ignore[method-assign]
    return spent
