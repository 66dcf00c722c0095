"""Stage `sources`: files of any kind and size to canonical rows, as the records of their sources say.

records -> files -> items of work (some successive files of one source) -> parts of 65,536 records -> a part of rows and
a part of rejects each. Memory holds one part. What cannot be a row stands in `rejects.parquet` with its file, place and
reason; rows and rejects of a source together are what was read. Only parallel texts are more, or fewer, than the pairs
made of them (`parallel`): there a text is kept if it is in a pair.

An item depends on nothing but the record, the files and the seed, and so does where its parts begin and end: a stage
that was killed goes on with the parts that are missing, and ends in the same files.
"""

import difflib
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from f2llm.data.import_item import (
    BY_CHOICE,
    SPOOL,
    Draw,
    Facts,
    Item,
    import_item,
    is_parallel,
    merged,
    source_of,
)
from f2llm.data.opening import find_files
from f2llm.data.parts import KEPT, Tally, write_sources
from f2llm.data.readers import KINDS, count_records
from f2llm.data.reading import Reading
from f2llm.data.records import Placed, SourceRecord, read_records
from f2llm.engine import map_items
from f2llm.errors import UsageError
from f2llm.files import write_json
from f2llm.recipe_corpus import SourcesStage

ITEM_BYTES = 1 << 28  # of files that are one item of work; a larger file is one by itself
TOO_MANY = 0.5  # of a source's records are faulty: then it is not they that are wrong


def sources_stage(config: SourcesStage, out: Path, seed: int) -> dict[str, Any]:
    """Write the rows of all sources to `out`; returns what was read, kept and rejected of each.

    Raises UsageError for records that do not suffice, files that are missing or lack columns, and for a source of
    which more than half is faulty, none is kept, or whose labels are not what its format needs.
    """
    chosen = load_records(config)
    items = list(_items(config, chosen, out, seed))
    tally: Tally = defaultdict(lambda: defaultdict(Counter))
    facts = {}
    results = zip(items, map_items(import_item, items, what="read sources", unit="item"), strict=True)
    for record, group in groupby(results, key=lambda result: result[0].record):
        found = merged([result for _, result in group])
        _judge(record, found)
        for language, fate, count in found["tally"]:
            tally[record.name][language][fate] += count
        facts[record.name] = {name: found[name] for name in ("read", "kept", "rejected", "rows")} | {
            "languages": sum(KEPT in fates for fates in tally[record.name].values())
        }
    write_json(out / "tally.json", {"rows": tally, "changed": {}})
    write_sources(out, [source_of(placed.record) for placed in chosen], tally)
    shutil.rmtree(out / SPOOL, ignore_errors=True)
    return {"rows": {name: found["rows"] for name, found in facts.items()}, "sources": facts}


def load_records(config: SourcesStage) -> list[Placed]:
    """The records that are asked for, in the order of their files and names."""
    placed: dict[str, Placed] = {}
    for path in map(Path, config.records):
        for file in sorted(path.rglob("*.y*ml")) if path.is_dir() else [path]:
            for one in read_records(file):
                if one.record.name in placed:
                    raise UsageError(
                        f"{one.place}: there is a source {one.record.name!r} already, at "
                        f"{placed[one.record.name].place}; give one of them another name."
                    )
                placed[one.record.name] = one
    for name in config.sources or ():
        if name not in placed:
            near = difflib.get_close_matches(name, placed, 1, 0)
            raise UsageError(
                f"there is no source {name!r} in {', '.join(config.records)}"
                + (
                    f"; the nearest is {near[0]!r}."
                    if near
                    else ", which have none; name files with records."
                )
            )
    return [one for name, one in placed.items() if config.sources is None or name in config.sources]


def source_files(config: SourcesStage) -> list[Path]:
    """The files that the stage reads, beside the records."""
    found = []
    for record, place in load_records(config):
        found += find_files(record.files, _root(config, place), KINDS)
    return found


def _root(config: SourcesStage, place: str) -> Path:
    """What a record's files are relative to."""
    return Path(config.root) if config.root else Path(place.rsplit(":", 1)[0]).parent


# --- Items of work


def _items(config: SourcesStage, chosen: Sequence[Placed], out: Path, seed: int) -> Iterator[Item]:
    """All the work, in the order of the sources and their files."""
    found = {}
    for record, place in chosen:
        Reading.of(record)  # refuses a record that does not suffice
        if not record.files:
            raise UsageError(
                f"{place}: {record.name} names no files; write 'files' into its record, or fetch it."
            )
        root = _root(config, place)
        found[record.name] = record, root, find_files(record.files, root, KINDS)
    counted = _counts(config.limit, found)
    number = 0
    for record, root, files in found.values():
        counts = [counted.get(file, 0) for file in files]
        starts = list(accumulate(counts, initial=0))
        for group in [range(len(files))] if is_parallel(record) else _grouped(files):
            picked = tuple(files[i] for i in group)
            draw = Draw(seed, config.limit, starts[-1], tuple((starts[i], counts[i]) for i in group))
            yield Item(number, record, picked, root, out, draw)
            number += 1


def _counts(limit: int | None, found: dict[str, tuple[SourceRecord, Path, list[Path]]]) -> dict[Path, int]:
    """Records of each file, where they are more than may be read of its source."""
    if limit is None:
        return {}
    files = [file for record, _, files in found.values() if not is_parallel(record) for file in files]
    return dict(zip(files, map_items(count_records, files, what="count records", unit="file"), strict=True))


def _grouped(files: Sequence[Path]) -> Iterator[list[int]]:
    """Places of successive files that are ITEM_BYTES together."""
    held: list[int] = []
    size = 0
    for place, file in enumerate(files):
        held.append(place)
        size += file.stat().st_size
        if size >= ITEM_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


# --- What all sources have to be


def _judge(record: SourceRecord, found: Facts) -> None:
    """Refuse a source that was read wrongly, or that cannot be trained on."""
    read, kept = found["read"], found["kept"]
    faulty = sum(count for reason, count in found["rejected"].items() if reason not in BY_CHOICE)
    first = found["first"] or "nothing was wrong with them"
    if read == 0:
        raise UsageError(f"the files of {record.name} have no records; give files with at least one.")
    if faulty > TOO_MANY * read:
        raise UsageError(
            f"{faulty:,} of {read:,} records of {record.name} are not rows, so its 'layout' or 'columns' are likely "
            f"wrong; the first is {first}"
        )
    if kept == 0:
        why = ", ".join(f"{reason} ({count:,})" for reason, count in found["rejected"].items())
        raise UsageError(
            f"no record of {record.name} becomes a row: {why}; see its 'at_least' and 'directions'."
        )
    labels = found["labels"]
    if record.format != "retrieval" and len(labels) < 2:
        raise UsageError(
            f"all rows of {record.name} have the label {labels[0]!r}; {record.format} needs two or more."
        )
    if record.format == "classification" and len(labels) > 2:
        raise UsageError(
            f"{record.name} has more than two labels ({', '.join(map(repr, labels))} ...) and classification has two; "
            "make its format clustering."
        )
