"""Public sources to own files: a record's location -> raw rows as they are, and a record beside them that can be read.

    OUT/NAME/raw/part-00000.parquet ...   rows of a hub dataset, every column; or the one file of an http(s) address
    OUT/NAME/state.json                   how many rows are done, of which very revision
    OUT/NAME/record.yaml                  what `settle` writes once somebody has agreed on what the columns are

A fetch that was stopped goes on with the next row of the same revision, whatever its place has by then: each part is
complete or not there, and the state is written after it. Memory holds one part.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from f2llm.data.download import download
from f2llm.data.hub import BY_HAND, HUB, Rows, open_rows, tables
from f2llm.data.opening import kind
from f2llm.data.propose import Proposal, propose
from f2llm.data.readers import KINDS, read_chunks
from f2llm.data.records import UNKNOWN, SourceRecord, read_record, write_record
from f2llm.errors import F2Error, UsageError
from f2llm.files import alone_in, read_object, sha256_file, write_json, write_table
from f2llm.progress import progress

STATE, RECORD, RAW = "state.json", "record.yaml", "raw"
SHOWN = 3  # rows to judge columns by


class State(BaseModel):
    """What is done of a fetch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    location: str
    config: str | None
    split: str
    revision: str = UNKNOWN
    licence: str = UNKNOWN
    label_names: dict[str, dict[str, str]] = {}
    """Of columns that hold numbers of labels: {"label": {"0": "negative", "1": "positive"}}."""
    rows: int = 0
    parts: int = 0
    complete: bool = False


class Fetched(NamedTuple):
    """A source whose raw rows are here."""

    folder: Path
    record: SourceRecord
    sample: pa.Table
    """The first rows, in every column."""
    proposal: Proposal | None
    """How the columns may be read; None where the record says so already, or no reading is likely."""
    label_names: dict[str, dict[str, str]]

    @property
    def is_settled(self) -> bool:
        """Whether the record says what the columns are."""
        return self.record.columns != UNKNOWN


def fetch(
    record: SourceRecord,
    out: Path,
    *,
    config: str | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Fetched:
    """Bring the raw rows of a source to `out`/NAME, going on from where an earlier call was stopped.

    Args:
        config: configuration of a hub dataset in place of the record's; also ends the name, as in `unpc.ar-en`.
        split: in place of the record's.
        limit: rows of a hub dataset, at most; a later call with more goes on from there. A plain file comes whole.

    Raises:
        UsageError: the location, the configuration or the split is not one that can be fetched.
        F2Error: the network failed; what is finished is kept.
    """
    if config is not None:
        name = f"{record.name}.{re.sub(r'[^a-z0-9_.-]+', '-', config.lower())}"
        record = record.model_copy(update={"name": name, "config": config})
    if split is not None:
        record = record.model_copy(update={"split": split})
    folder, hub = out / record.name, HUB.fullmatch(record.location or "")
    file = None if hub else _file_name(record)
    with alone_in(folder):
        state = _state(folder, record)
        if hub:
            state = _fetch_rows(record, hub["name"], folder, state, limit)
        elif not state.complete:
            path = folder / RAW / str(file)
            download(state.location, path)
            state = state.model_copy(update={"revision": f"sha256:{sha256_file(path)}", "complete": True})
            write_json(folder / STATE, state.model_dump())
        record = _with_facts(record, state, f"{RAW}/{file or '*.parquet'}")
        if (folder / RECORD).exists():
            record = read_record(folder / RECORD)  # somebody may have mended it
    sample = _sample(folder, record)
    proposal = propose(sample.schema, record.format) if record.columns == UNKNOWN else None
    return Fetched(folder, record, sample, proposal, state.label_names)


def settle(fetched: Fetched, proposal: Proposal | None) -> Path:
    """Write the record of a fetched source, with the columns of `proposal`, and say where it is.

    Without a proposal the columns stay as they are, and so does a record that is there already.
    """
    record, update = fetched.record, dict[str, Any]()
    if proposal is not None:
        update = {"columns": proposal.columns} | _languages(record, proposal)
        if proposal.layout != record.format:
            update["layout"] = proposal.layout
        if names := fetched.label_names.get(proposal.columns.label):
            update["label_names"] = names
        update["from_"] = {**record.from_, "columns": "proposed from the columns' names and accepted"}
    path = fetched.folder / RECORD
    if update or not path.exists():
        write_record(path, record.model_copy(update=update))
    return path


def _with_facts(record: SourceRecord, state: State, files: str) -> SourceRecord:
    """The record with what the fetch found out."""
    update: dict[str, Any] = {"revision": state.revision, "split": record.split, "files": [files]}
    origins = {"revision": f"{state.location}, when it was fetched"}
    if record.licence == UNKNOWN != state.licence:
        update["licence"], origins["licence"] = state.licence, f"dataset card of revision {state.revision}"
    return record.model_copy(update={**update, "from_": record.from_ | origins})


def _languages(record: SourceRecord, proposal: Proposal) -> dict[str, str]:
    """Those that the columns' names tell, or the only one that the source has."""
    if proposal.query_lang and proposal.positive_lang:
        return {"query_lang": proposal.query_lang, "positive_lang": proposal.positive_lang}
    if record.languages != UNKNOWN and len(record.languages) == 1 and proposal.columns.lang is None:
        return {"query_lang": record.languages[0], "positive_lang": record.languages[0]}
    return {}


def _file_name(record: SourceRecord) -> str:
    """The name of the file at an http(s) address; UsageError where the location is none."""
    address = urlsplit(record.location or "")
    name = address.path.rpartition("/")[2]
    if address.scheme not in ("http", "https") or kind(Path(name)) not in KINDS:
        raise UsageError(
            f"{record.name} is at {record.location or 'no known place'}, which is neither a dataset of the hub nor "
            f"the address of a file ({', '.join(KINDS)}); {BY_HAND}."
        )
    return name


def _state(folder: Path, record: SourceRecord) -> State:
    """What was done before; UsageError where it was of other rows than are asked for now."""
    asked = State(location=record.location or "", config=record.config, split=record.split)
    path = folder / STATE
    if not path.exists():
        return asked
    try:
        state = State.model_validate(read_object(path))
    except ValidationError:
        raise F2Error(f"{path} is not the state of a fetch; remove {folder} to fetch again.") from None
    for name in ("location", "config", "split"):
        if (before := getattr(state, name)) != (now := getattr(asked, name)):
            raise UsageError(
                f"{folder} holds rows of the {name} {before!r}, not of {now!r}; give another folder with --out."
            )
    return state


def _fetch_rows(record: SourceRecord, name: str, folder: Path, state: State, limit: int | None) -> State:
    """Write what is missing of the raw rows of a hub dataset, part by part."""
    if state.complete or (limit is not None and state.rows >= limit):
        return state
    revision = state.revision if state.revision != UNKNOWN else record.revision
    rows: Rows = open_rows(record, name, None if revision == UNKNOWN else revision)
    state = state.model_copy(
        update={"revision": rows.revision, "licence": rows.licence, "label_names": rows.label_names}
    )
    for stray in sorted((folder / RAW).glob("part-*.parquet"))[state.parts :]:
        stray.unlink()  # written just before a stop, and not in the state
    with progress(total=limit or rows.total, what=f"fetch {record.name}", unit="row") as bar:
        bar.advance(state.rows)
        for table, complete in tables(rows, record.name, state.rows, limit):
            if table.num_rows:
                write_table(folder / RAW / f"part-{state.parts:05}.parquet", table)
            counts = {
                "rows": state.rows + table.num_rows,
                "parts": state.parts + bool(table.num_rows),
                "complete": complete,
            }
            state = state.model_copy(update=counts)
            write_json(folder / STATE, state.model_dump())
            bar.advance(table.num_rows)
    return state


def _sample(folder: Path, record: SourceRecord) -> pa.Table:
    first = min((path for pattern in record.files for path in folder.glob(pattern)), default=None)
    if first is None:
        raise F2Error(
            f"{record.name}: {record.location} has no rows in {record.split!r}; give another --split."
        )
    if kind(first) == ".parquet":
        with pq.ParquetFile(first) as file:
            batch = next(file.iter_batches(SHOWN), None)
            return pa.Table.from_batches([batch] if batch else [], file.schema_arrow)
    chunk = next(read_chunks(first, rows=SHOWN), None)
    return pa.table(chunk.columns if chunk else {})
