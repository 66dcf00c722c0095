"""Vectors of a whole file: in constant memory, by one machine or many, and going on where it was interrupted.

    texts -> parts beside the output -> `map_items` -> parts with vectors -> the output

A part is named after its number and the hash of its texts and of all that made its vectors, and is written once:
started again, only what is missing is computed, and a text that was changed meanwhile is computed again.

Shape suffixes: N texts, D dims.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from f2llm.embed.compute import Precision
from f2llm.embed.embedder import Embedder
from f2llm.engine import Engine, map_items, using
from f2llm.errors import F2Error, UsageError
from f2llm.files import alone_in, atomic_write, sync_folder, write_json
from f2llm.model.tokenizer import TooLong
from f2llm.progress import progress
from f2llm.text import clean

PART_TEXTS = 4096
PART_CHARACTERS = 1 << 20  # about a minute of a small model on two cores
ONE_PROCESS = Engine(workers=1)
TEXTS = pa.schema({"text": pa.string()})


@dataclass(frozen=True)
class Job:
    """A model and how it is asked, as by `Embedder` and its `encode`."""

    model: str
    precision: Precision = "float32"
    prompt: str | None = None
    instruction: str | None = None
    dim: int | None = None
    too_long: TooLong = "error"


@dataclass(frozen=True)
class Done:
    """What was written."""

    texts: int
    cut: int
    """Texts longer than the model's limit."""


@dataclass(frozen=True)
class _Part:
    """A piece of the work: texts in one file, with their vectors in another."""

    job: Job
    name: Path
    first: int  # number of its first text

    @property
    def texts(self) -> Path:
        return self.name.with_suffix(".texts")

    @property
    def vectors(self) -> Path:
        return self.name.with_suffix(".vectors")


def embed_file(job: Job, texts: Iterable[str], output: Path, engine: Engine | None = None) -> Done:
    """Write the vectors of `texts`, in their order, to `output`.

    Args:
        output: .npy is one float32 array [N, D], with what made it in OUTPUT.json; .parquet and .lance (a folder) are
            tables of `text` and `vector`, with what made them in the schema's metadata under `f2llm`.
        engine: who computes; one process has all cores for itself.

    Raises UsageError for another ending, for a folder that is there, and for no texts; and what loading the model,
    reading texts and encoding raise. What is done by then is kept beside the output for the next time.
    """
    if output.suffix not in WRITERS:
        raise UsageError(f"{output} ends in {output.suffix!r}; expected {', '.join(WRITERS)}, so name it so.")
    if output.is_dir():
        raise UsageError(f"{output} is a folder that is there already; give another name, or remove it.")
    if Path(job.model).is_dir():
        job = replace(job, model=str(Path(job.model).resolve()))  # other machines start elsewhere
    made = _made_by(job)
    work = output.absolute().parent / f".{output.name}.parts"
    with alone_in(work):
        parts = list(_cut_into_parts(job, texts, work, made))
        missing = [part for part in parts if not part.vectors.is_file()]
        with using(engine or ONE_PROCESS):
            for _ in map_items(_embed_part, missing, what=f"embed {output.name}"):
                pass
        if parts:
            WRITERS[output.suffix](map(_vectors, parts), _schema(made), output)
        tables = [_vectors(part) for part in parts]  # mapped, not read
        done = Done(sum(map(len, tables)), sum(int(table.schema.metadata[b"cut"]) for table in tables))
    shutil.rmtree(work)
    if not parts:
        raise UsageError("the input has no texts; give at least one.")
    return done


def _made_by(job: Job) -> dict[str, Any]:
    """All that a text's vector depends on; UsageError for a job that cannot be done, before any text is read."""
    embedder = _embedder(job.model, job.precision)
    return {
        "identity": embedder.identity,
        "precision": job.precision,
        "prompt": embedder.prefix(job.prompt, job.instruction),
        "dim": embedder.check_dim(job.dim),
        "too_long": job.too_long,
    }


@lru_cache(maxsize=1)
def _embedder(model: str, precision: Precision) -> Embedder:
    """One for all parts that a process works on."""
    return Embedder(model, precision)


# --- Parts


def _cut_into_parts(job: Job, texts: Iterable[str], work: Path, made: dict[str, Any]) -> Iterator[_Part]:
    """Write texts to files, but for those whose vectors are there; what is there of other texts is removed."""
    left = {path for path in work.iterdir() if path.suffix in (".texts", ".vectors")}
    first = 0
    with progress(total=None, what="read", unit="text") as bar:
        for number, some in enumerate(_portions(texts)):
            digest = hashlib.sha256(json.dumps([made, first, some], sort_keys=True).encode())
            part = _Part(job, work / f"{number:06}-{digest.hexdigest()[:32]}", first)
            left -= {part.texts, part.vectors}
            if not part.vectors.is_file():
                _write(part.texts, pa.table([some], schema=TEXTS))
            yield part
            first += len(some)
            bar.advance(len(some))
    for path in left:
        path.unlink()


def _portions(texts: Iterable[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    characters = 0
    for text in texts:
        portion.append(clean(text))
        characters += len(text)
        if len(portion) == PART_TEXTS or characters >= PART_CHARACTERS:
            yield portion
            portion, characters = [], 0
    if portion:
        yield portion


def _embed_part(part: _Part) -> None:
    texts = _read(part.texts)["text"].to_pylist()
    job = part.job
    vectors_ND, cut = _embedder(job.model, job.precision).encode_part(
        texts,
        prompt=job.prompt,
        instruction=job.instruction,
        dim=job.dim,
        too_long=job.too_long,
        first=part.first,
    )
    schema = TEXTS.append(_vector_field(vectors_ND.shape[1])).with_metadata({"cut": str(cut)})
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), vectors_ND.shape[1])
    _write(part.vectors, pa.table([texts, column], schema=schema))
    part.texts.unlink()


def _vectors(part: _Part) -> pa.Table:
    return _read(part.vectors)


def _read(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid as error:
        raise F2Error(f"{path} is damaged ({error}); remove it and start again.") from None


def _write(path: Path, table: pa.Table) -> None:
    with atomic_write(path) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


# --- Outputs


def _vector_field(width: int) -> pa.Field:
    return pa.field("vector", pa.list_(pa.float32(), width))


def _schema(made: dict[str, Any]) -> pa.Schema:
    facts = {"f2llm": json.dumps(made, ensure_ascii=False)}
    return TEXTS.append(_vector_field(made["dim"])).with_metadata(facts)


def _write_npy(tables: Iterable[pa.Table], schema: pa.Schema, output: Path) -> None:
    facts = output.with_name(f"{output.name}.json")
    facts.unlink(missing_ok=True)  # it must never stand beside vectors of another model
    count, width = 0, schema.field("vector").type.list_size
    with atomic_write(output) as file:
        # The header says how many rows follow, which is known at the end: room is left for any number.
        _write_header(file, 0, width)
        for table in tables:
            for chunk in table["vector"].chunks:
                file.write(chunk.flatten().to_numpy().astype("<f4", copy=False).tobytes())
            count += len(table)
        file.seek(0)
        _write_header(file, count, width)
    write_json(facts, json.loads(schema.metadata[b"f2llm"]))


def _write_header(file: IO[bytes], count: int, width: int) -> None:
    # NumPy pads the header so that the number of rows can grow in place.
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
    )


def _write_parquet(tables: Iterable[pa.Table], schema: pa.Schema, output: Path) -> None:
    with atomic_write(output) as file, pq.ParquetWriter(file, schema) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))


def _write_lance(tables: Iterable[pa.Table], schema: pa.Schema, output: Path) -> None:
    os.environ.setdefault("LANCEDB_LOG", "error")  # it warns of every new table that it does not exist yet
    try:
        import lancedb
    except ImportError:
        raise UsageError(
            f"{output} needs lancedb; pip install 'f2llm[search]', or name it .parquet."
        ) from None
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as folder:
        batches = (batch for table in tables for batch in table.to_batches())
        reader = pa.RecordBatchReader.from_batches(schema, batches)
        lancedb.connect(folder).create_table("vectors", data=reader, schema=schema)
        os.replace(Path(folder) / "vectors.lance", output)
        sync_folder(output.absolute().parent)


WRITERS = {".npy": _write_npy, ".parquet": _write_parquet, ".lance": _write_lance}
