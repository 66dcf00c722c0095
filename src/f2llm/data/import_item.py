"""One item of the stage `sources`, in a worker: some files of one source to parts of rows, of rejects, and counts.

chunks of the files -> bundles of at most 65,536 records -> canonical rows and faults -> a part of each. A bundle that
was counted is not made again. Parallel texts first go to a spool, all of a source, and their pairs make the parts.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from f2llm.data.canonical import BELOW, MEND, convert
from f2llm.data.parallel import Numbers, Pairs, Spool, Texts, count_pairs, directions, draw, iterate_pairs
from f2llm.data.parts import DONE, KEPT, REJECTS, digits, write_part
from f2llm.data.readers import BYTES, ROWS, Chunk, read_chunks
from f2llm.data.reading import Reading, check_header
from f2llm.data.records import SourceRecord
from f2llm.data.rows import ROWS_FILE, Source, rows_table
from f2llm.data.text_files import ALL, SHOWN, Fault
from f2llm.files import read_json, write_json

SPOOL = "spool"
ALONE, AGAIN = "no text to pair with", "id and language repeat"
BY_CHOICE = {BELOW, ALONE}  # reasons that are no faults

RAW_REJECTS = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("query_lang", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),  # of `number`: line, row or item
        pa.field("number", pa.int64(), nullable=False),
        pa.field("column", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("problem", pa.string(), nullable=False),
        pa.field("raw", pa.string(), nullable=False),  # how the record begins
    ]
)

Facts = dict[str, Any]
"""Of a bundle, an item or a source: records `read`, `kept` and `rejected` by reason; `rows` made; `tally` of [language,
fate, count], where what is kept counts as rows; the `first` fault in a sentence; the first three `labels`."""


class Draw(NamedTuple):
    """Which records are read: `limit` of a source's `total`, drawn at random."""

    seed: int
    limit: int | None
    total: int
    places: tuple[tuple[int, int], ...]
    """Of each file of the item: records of the source before it, and in it."""


@dataclass(frozen=True)
class Item:
    """Successive files of one source; of parallel texts all of them."""

    number: int
    record: SourceRecord
    files: tuple[Path, ...]
    root: Path
    out: Path
    draw: Draw


class Reject(NamedTuple):
    """A fault and where it is."""

    file: Path
    unit: str
    fault: Fault


def is_parallel(record: SourceRecord) -> bool:
    return record.layout == "parallel"


def source_of(record: SourceRecord) -> Source:
    """What a record says of all rows of its source."""
    return Source(
        name=record.name,
        format=record.format,
        task=record.task,
        symmetric=record.symmetric,
        instruction=record.instruction,
        licence=record.licence,
    )


def import_item(item: Item) -> Facts:
    """Write the item's parts that are missing."""
    done = item.out / DONE / f"{digits(item.number)}.json"
    if not done.exists():
        write_json(done, merged((_parallel if is_parallel(item.record) else _rows)(item)))
    return dict(read_json(done))


def merged(facts: Iterable[Facts]) -> Facts:
    """The facts of all, in order."""
    total = _facts([], 0, {}, ())
    rejected, tally, labels = Counter[str](), Counter[tuple[str, str]](), set[str]()
    for one in facts:
        for name in ("read", "kept", "rows"):
            total[name] += one[name]
        rejected.update(one["rejected"])
        tally.update({(language, fate): count for language, fate, count in one["tally"]})
        labels |= set(one["labels"])
        total["first"] = total["first"] or one["first"]
    entries = [[*key, count] for key, count in sorted(tally.items())]
    return total | {
        "rejected": dict(sorted(rejected.items())),
        "tally": entries,
        "labels": sorted(labels)[:3],
    }


def _facts(rejects: Sequence[Reject], kept: int, rows: dict[str, int], labels: Iterable[str]) -> Facts:
    tally = Counter({(language, KEPT): count for language, count in rows.items()})
    tally.update((reject.fault.lang, reject.fault.reason) for reject in rejects)
    wrong = (one for one in rejects if one.fault.reason not in BY_CHOICE)
    first = next((one.fault.sentence(one.file, one.unit) for one in wrong), None)
    return {
        "read": kept + len(rejects),
        "kept": kept,
        "rejected": Counter(reject.fault.reason for reject in rejects),
        "rows": sum(rows.values()),
        "tally": [[*key, count] for key, count in sorted(tally.items())],
        "first": first,
        "labels": sorted(set(labels))[:3],
    }


def _bundles(item: Item) -> Iterator[list[Chunk]]:
    """What the item reads, as much at once as makes a part."""
    held: list[Chunk] = []
    for chunk in _chunks(item):
        together = [*held, chunk]
        if held and (sum(c.read for c in together) > ROWS or sum(c.size for c in together) > BYTES):
            yield held
            held = [chunk]
        else:
            held = together
    if held:
        yield held


def _chunks(item: Item) -> Iterator[Chunk]:
    reading = Reading.of(item.record)
    limited = item.draw.limit is not None and not is_parallel(item.record)
    drawn = draw(item.draw.seed, item.record.name, item.draw.total, item.draw.limit or 0) if limited else None
    for file, place in zip(item.files, item.draw.places, strict=True):
        checked = False
        only = ALL if drawn is None else _within(drawn, *place)
        for chunk in read_chunks(file, reading.wanted, rows=ROWS, only=only):
            if not checked:
                check_header(chunk, reading)
                checked = True
            yield chunk


def _within(drawn: Numbers, start: int, count: int) -> Container[int]:
    """The numbers of a file's own records among those of the source."""
    first, last = np.searchsorted(drawn, (start, start + count))
    return frozenset((drawn[first:last] - start).tolist())


def _write_rejects(item: Item, number: int, rejects: Sequence[Reject]) -> None:
    if rejects:
        rows = [
            {
                "source": item.record.name,
                "query_lang": fault.lang,
                "file": str(file.relative_to(item.root) if file.is_relative_to(item.root) else file),
                "unit": unit,
                "number": fault.number,
                "column": None if fault.column is None else str(fault.column),
                "reason": fault.reason,
                "problem": fault.problem,
                "raw": fault.raw,
            }
            for file, unit, fault in rejects
        ]
        write_part(item.out, (item.number, number), pa.Table.from_pylist(rows, RAW_REJECTS), REJECTS)


def _rows(item: Item) -> Iterator[Facts]:
    for number, bundle in enumerate(_bundles(item)):
        done = item.out / DONE / f"{digits((item.number, number))}.json"
        if not done.exists():
            write_json(done, _write_bundle(item, number, bundle))
        yield read_json(done)


def _write_bundle(item: Item, number: int, bundle: Sequence[Chunk]) -> Facts:
    columns: dict[str, list[Any]] = defaultdict(list)
    rejects = []
    for chunk in bundle:
        converted = convert(chunk, Reading.of(item.record))
        for name, values in converted.columns.items():
            columns[name] += values
        rejects += [Reject(chunk.file, chunk.unit, fault) for fault in converted.faults]
    write_part(item.out, (item.number, number), rows_table(source_of(item.record), columns))
    _write_rejects(item, number, rejects)
    return _facts(rejects, len(columns["query"]), Counter(columns["query_lang"]), columns.get("label", ()))


# --- Parallel texts


def _parallel(item: Item) -> Iterator[Facts]:
    folder = item.out / SPOOL / digits(item.number)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    spool, units = Spool(folder), dict[Path, str]()
    parts_of_rejects = 0
    for bundle in _bundles(item):
        rejects = []
        for chunk in bundle:
            units[chunk.file] = chunk.unit
            good = convert(chunk, Reading.of(item.record))
            file = item.files.index(chunk.file)
            spool.add(
                good.columns["id"], good.columns["query"], good.columns["query_lang"], file, good.numbers
            )
            rejects += [Reject(chunk.file, chunk.unit, fault) for fault in good.faults]
        _write_rejects(item, parts_of_rejects, rejects)
        parts_of_rejects += 1
        yield _facts(rejects, 0, {}, ())
    if not spool.langs:
        return
    texts = spool.close()
    wanted = directions(texts.langs, item.record.directions, item.record.name)
    total, used_T = count_pairs(texts, wanted)
    yield _facts([], int(used_T.sum()), _write_pairs(item, texts, wanted, total), ())
    unused = np.flatnonzero(~used_T)
    for start in range(0, len(unused), ROWS):
        rejects = list(_unused(item, texts, units, unused[start : start + ROWS]))
        _write_rejects(item, parts_of_rejects, rejects)
        parts_of_rejects += 1
        yield _facts(rejects, 0, {}, ())
    shutil.rmtree(folder)


def _write_pairs(item: Item, texts: Texts, wanted: list[tuple[str, str]], total: int) -> dict[str, int]:
    """Write the parts that are missing; rows by language of the query."""
    limit = item.draw.limit
    drawn = draw(item.draw.seed, item.record.name, total, limit) if limit else None
    most = max(1, min(ROWS, int(BYTES / texts.mean_size / 2)))
    rows: Counter[str] = Counter()
    for number, held in enumerate(iterate_pairs(texts, wanted, drawn, most)):
        for pairs in held:
            rows[pairs.query_lang] += len(pairs.query_P)
        if not (item.out / ROWS_FILE / f"part-{digits((item.number, number))}.parquet").exists():
            write_part(item.out, (item.number, number), _table(item.record, texts, held))
    return rows


def _table(record: SourceRecord, texts: Texts, held: Sequence[Pairs]) -> pa.Table:
    columns: dict[str, list[Any]] = defaultdict(list)
    for pairs in held:
        count = len(pairs.query_P)
        columns["query"] += texts.take(pairs.query_P)
        columns["positives"] += [[text] for text in texts.take(pairs.positive_P)]
        columns["label"] += texts.take(pairs.query_P, "id")  # what has the same id is never a negative
        columns["query_lang"] += [pairs.query_lang] * count
        columns["positive_lang"] += [pairs.positive_lang] * count
    return rows_table(source_of(record), columns)


def _unused(item: Item, texts: Texts, units: dict[Path, str], numbers: Numbers) -> Iterator[Reject]:
    again = np.isin(numbers, texts.again).tolist()
    content, ids = texts.take(numbers), texts.take(numbers, "id")
    for number, repeats, text, one in zip(numbers.tolist(), again, content, ids, strict=True):
        file, place = texts.place(number)
        path = item.files[file]
        problem = f"the id {one!r:.60} " + (
            "came before in this language" if repeats else "has no text to pair with"
        )
        fault = Fault(
            place, AGAIN if repeats else ALONE, problem, MEND, raw=text[:SHOWN], lang=texts.lang(number)
        )
        yield Reject(path, units[path], fault)
