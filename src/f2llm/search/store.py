"""Vector search over texts in an embedded store (LanceDB): a folder with the vectors, what they are of, and how made.

Every store remembers the identity of the model that made it, so that a query is never compared with vectors of
another model.

Shape suffixes: N texts, D dims.
"""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from f2llm.errors import F2Error, UsageError

# Lance warns of every new table that it does not exist yet; its log is set up when it is imported.
os.environ.setdefault("LANCEDB_LOG", "error")
try:
    import lancedb
except ImportError:
    raise F2Error("the vector store needs lancedb, which is missing; install f2llm[search].") from None
import pyarrow as pa
import pyarrow.parquet as pq

from f2llm.data.names import NAMES_FILE
from f2llm.embed.embedder import Embedder
from f2llm.files import read_json, write_json
from f2llm.progress import progress
from f2llm.recipe import IndexStage

SCHEMA_VERSION = 1
TABLE, FACTS = "texts", "index.json"
CHUNK = 8192  # texts embedded and written at a time


class Hit(NamedTuple):
    """A text found, best first."""

    text: str
    lang: str
    thing: str
    score: float
    """Cosine similarity, -1 to 1."""


def build_index(
    model: Path, texts: list[str], lang: list[str], thing: list[str], out: Path, dim: int | None
) -> dict[str, Any]:
    """Embed `texts` as documents, at `dim` dimensions (None: the model's full width), into a store in `out`."""
    embedder = Embedder(model)
    width = embedder.dim if dim is None else dim
    if not texts:
        raise UsageError(f"there are no texts to index in {out}; give at least one.")
    if not 1 <= width <= embedder.dim:
        raise UsageError(f"dim is {width}; {model} gives 1 to {embedder.dim}.")
    (out / FACTS).unlink(missing_ok=True)  # without it the folder is no index, until the new one is whole
    columns = {"text": pa.string(), "lang": pa.string(), "thing": pa.string()}
    schema = pa.schema({**columns, "vector": pa.list_(pa.float32(), width)})
    with progress(total=len(texts), what=f"index {out.name}", unit="text") as bar:
        table = lancedb.connect(out).create_table(TABLE, schema=schema, mode="overwrite")
        for start in range(0, len(texts), CHUNK):
            part = slice(start, start + CHUNK)
            vectors_ND = embedder.encode(texts[part], prompt="document", dim=width, too_long="truncate")
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), width)
            table.add(pa.table([texts[part], lang[part], thing[part], column], schema=schema))
            bar.advance(len(vectors_ND))
    facts = {
        "schema_version": SCHEMA_VERSION,
        "identity": embedder.identity,
        "model": os.path.relpath(model.resolve(), out.resolve()),
        "dim": width,
        "texts": len(texts),
    }
    write_json(out / FACTS, facts)
    return facts


def search(index: Path, query: str, limit: int = 10) -> list[Hit]:
    """The texts nearest to `query` by cosine similarity, exactly (no approximation), best first."""
    if not (index / FACTS).is_file():
        raise UsageError(
            f"{index} is not a search index: it has no {FACTS}; point to a folder made by f2llm."
        )
    facts = read_json(index / FACTS)
    embedder = Embedder(index / facts["model"])
    if embedder.identity != facts["identity"]:
        raise F2Error(
            f"{index} was made by model {facts['identity'][:12]}, but {index / facts['model']} is now "
            f"{embedder.identity[:12]}; their vectors do not compare, so build the index again."
        )
    query_D = embedder.encode(query, prompt="query", dim=facts["dim"])
    table: Any = lancedb.connect(index).open_table(TABLE)
    nearest = table.search(query_D, query_type="vector").distance_type("cosine").limit(limit).to_list()
    return [Hit(row["text"], row["lang"], row["thing"], 1.0 - row["_distance"]) for row in nearest]


def index_stage(config: IndexStage, *, data: Path, model: Path, out: Path) -> dict[str, Any]:
    """Index every distinct name of every thing; a string that many languages share is one entry."""
    names = pq.read_table(data / NAMES_FILE, columns=["text", "thing", "lang"]).to_pylist()
    langs: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        langs[name["text"], name["thing"]].append(name["lang"])
    texts, things = (list(column) for column in zip(*langs, strict=True))
    return build_index(model, texts, [_short(tags) for tags in langs.values()], things, out, config.dim)


def _short(tags: list[str]) -> str:
    """`deu`, `deu, lux`, or `deu and 7 more`."""
    return ", ".join(tags) if len(tags) <= 2 else f"{tags[0]} and {len(tags) - 1} more"
