"""Cleaning as a stage: rows in, rows fit to be trained on out, and a report in which every row that went in is counted.

folders of rows -> each row for itself (`cleaning`, part by part) -> those that repeat another of any part
(`near_duplicates`) and those over the limits of their source or language -> parts of what is left, all that was
rejected, report.json. Of all rows at once only numbers are held, 13 bytes a row. Until the report stands, what is
done lies in the folder `work`; a stage that was killed goes on from there.

Shapes: R rows after the first step, G pairs of source and language.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from f2llm.data import language_id
from f2llm.data.cleaning import clean_rows
from f2llm.data.coded import Flags
from f2llm.data.folded import Hashes, mix
from f2llm.data.near_duplicates import REASON_NAMES, REASONS, find_duplicates
from f2llm.data.parts import (
    KEPT,
    REJECT_SCHEMA,
    REJECTS,
    Tally,
    carry_decontamination,
    parts,
    read_part,
    sift,
    write_part,
    write_sources,
)
from f2llm.data.rows import open_rows, read_sources, row_files
from f2llm.engine import map_items
from f2llm.errors import F2Error
from f2llm.files import atomic_write, read_json, write_json
from f2llm.recipe_corpus import CleanStage
from f2llm.rng import generator

REPORT = "report.json"
WORK = "work"
FATES = "fates.npy"  # int8 [R]: why a row goes, or 0
ONLY_EXACT = 0.99  # of near duplicates, where nobody asks for them


class Numbered(NamedTuple):
    """All rows after the first step."""

    groups_R: npt.NDArray[np.int32]
    """Index into `names`."""
    keys_R: Hashes
    """A random order of rows that depends on the seed and on what is in them."""
    names: list[tuple[str, str]]
    """Source and language [G]."""


def clean_stage(config: CleanStage, folders: Sequence[Path], out: Path, seed: int) -> dict[str, Any]:
    """Write the rows of `folders` that are fit to be trained on to `out`; returns how many of what there were.

    Raises F2Error where no row is left.
    """
    work = out / WORK
    if not (out / REPORT).exists():
        cleaned = work / "cleaned"
        tally = sift(folders, cleaned, partial(clean_rows, config), "clean rows")
        reasons, numbered, fates_R = _compare(config, cleaned, work, seed)
        divided = map_items(_divide, list(_items(cleaned, out, reasons)), what="write rows")
        for _ in divided:
            pass
        tally = _with_fates(tally, numbered, fates_R, reasons)
        changed = read_json(cleaned / "tally.json")["changed"]
        write_json(out / "tally.json", {"rows": tally, "changed": changed})
        sources = {source.name: source for folder in folders for source in read_sources(folder)}
        write_sources(out, sources.values(), tally)
        carry_decontamination(folders, out)
        write_json(out / REPORT, _report(tally, changed))
    shutil.rmtree(work, ignore_errors=True)
    report = read_json(out / REPORT)
    if not report["kept"]:
        raise F2Error(
            f"none of {report['read']} rows is left after cleaning ({report['dropped']}); relax the stage's settings."
        )
    return {name: report[name] for name in ("read", "kept", "dropped")}


def _compare(
    config: CleanStage, cleaned: Path, work: Path, seed: int
) -> tuple[list[str | None], Numbered, npt.NDArray[np.int8]]:
    """What speaks against rows beside others: names of reasons, the rows, and the reason of each [R]."""
    reasons = list(REASON_NAMES)
    numbered = _numbered(cleaned, seed)
    fates_R = np.zeros(len(numbered.groups_R), np.int8)
    if config.duplicates != "keep":
        threshold = config.near_above if config.duplicates == "near" else ONLY_EXACT
        find_duplicates([cleaned], work / "duplicates", threshold)
        fates_R = np.load(work / "duplicates" / REASONS)
        if config.duplicates == "exact":
            fates_R[fates_R != REASON_NAMES.index("exact duplicate")] = 0
    names = sorted({source for source, _ in numbered.names})
    source_of_G = np.array([names.index(source) for source, _ in numbered.names], np.int32)
    for limit, what, groups_R in (
        (config.rows_per_language, "a language of its source", numbered.groups_R),
        (config.rows_per_source, "its source", source_of_G[numbered.groups_R]),
    ):
        if limit is not None:
            fates_R[over(groups_R, numbered.keys_R, limit, fates_R == 0)] = len(reasons)
            reasons.append(f"more than {limit:,} rows of {what}")
    with atomic_write(work / FATES) as file:
        np.save(file, fates_R)
    return reasons, numbered, fates_R


def _numbered(cleaned: Path, seed: int) -> Numbered:
    numbers: dict[tuple[str, str], int] = {}
    groups: list[npt.NDArray[np.int32]] = []
    keys: list[Hashes] = []
    salt = generator(seed, "clean").integers(1 << 63, dtype=np.uint64)
    for part in parts(cleaned):
        rows = read_part(part, ["source", "query_lang", "hash"])
        pairs = zip(rows["source"].to_pylist(), rows["query_lang"].to_pylist(), strict=True)
        groups.append(np.array([numbers.setdefault(pair, len(numbers)) for pair in pairs], np.int32))
        hashes = np.array([int(digits, 16) for digits in rows["hash"].to_pylist()], np.uint64)
        keys.append(mix(hashes ^ salt))
    none: tuple[npt.NDArray[np.int32], Hashes] = np.empty(0, np.int32), np.empty(0, np.uint64)
    return Numbered(np.concatenate([none[0], *groups]), np.concatenate([none[1], *keys]), list(numbers))


def over(groups_R: npt.NDArray[np.int32], keys_R: Hashes, limit: int, eligible_R: Flags) -> Flags:
    """Which of the eligible rows are more than `limit` of their group: all but those of the least keys [R].

    Of rows with equal keys, which have equal contents, the first come first.
    """
    rows = np.flatnonzero(eligible_R)
    rows = rows[np.bincount(groups_R[rows])[groups_R[rows]] > limit] if len(rows) else rows
    rows = rows[np.lexsort((keys_R[rows], groups_R[rows]))]
    group, place = groups_R[rows], np.arange(len(rows))
    begins = np.ones(len(rows), bool)
    begins[1:] = group[1:] != group[:-1]
    rank = place - np.maximum.accumulate(np.where(begins, place, 0))
    is_over_R = np.zeros(len(groups_R), bool)
    is_over_R[rows[rank >= limit]] = True
    return is_over_R


@dataclass(frozen=True)
class _Item:
    number: int
    first: int
    """Rows before it."""
    rows: Path
    rejects: Path
    fates: Path
    reasons: list[str | None]
    out: Path


def _items(cleaned: Path, out: Path, reasons: list[str | None]) -> Iterator[_Item]:
    first = 0
    for number, path in enumerate(row_files(cleaned)):
        yield _Item(number, first, path, cleaned / REJECTS / path.name, cleaned.parent / FATES, reasons, out)
        with open_rows(path) as file:
            first += file.metadata.num_rows


def _divide(item: _Item) -> None:
    """Write what is left of a part, and all of it that was rejected by any step."""
    with open_rows(item.rows) as file:
        rows = file.read()
    fates = pa.array(np.load(item.fates, mmap_mode="r")[item.first : item.first + rows.num_rows])
    reason = pa.array(item.reasons, pa.string()).take(fates)
    dropped = rows.append_column(REJECT_SCHEMA.field("reason"), reason).filter(pc.is_valid(reason))
    rejected = [dropped.cast(REJECT_SCHEMA)]
    if item.rejects.exists():
        with open_rows(item.rejects) as file:
            rejected.insert(0, file.read())
    if any(table.num_rows for table in rejected):
        write_part(item.out, item.number, pa.concat_tables(rejected), REJECTS)
    write_part(item.out, item.number, rows.filter(pc.is_null(reason)))


def _with_fates(
    tally: Tally, numbered: Numbered, fates_R: npt.NDArray[np.int8], reasons: list[str | None]
) -> Tally:
    """The tally of the first step, with the rows that went afterwards moved from the kept to their reasons."""
    both: Tally = defaultdict(lambda: defaultdict(Counter))
    for source, languages in tally.items():
        for language, counts in languages.items():
            both[source][language].update(counts)
    cells, counts_C = np.unique(numbered.groups_R * np.int64(len(reasons)) + fates_R, return_counts=True)
    for cell, count in zip(cells.tolist(), counts_C.tolist(), strict=True):
        group, fate = divmod(cell, len(reasons))
        source, language = numbered.names[group]
        if (reason := reasons[fate]) is not None:
            both[source][language][reason] += count
            both[source][language][KEPT] -= count
    return both


def _report(tally: Tally, notes: dict[str, int]) -> dict[str, Any]:
    """All counts: of rows in all and by source and language, of what was done to kept rows, of the language check."""
    sources: dict[str, dict[str, Any]] = {}
    for source, languages in sorted(tally.items()):
        sources[source] = {}
        for language, counts in sorted(languages.items()):
            sources[source][language] = {**_totals(counts), "changed": {}}
    all_rows = sum((counts for languages in tally.values() for counts in languages.values()), Counter[str]())
    changed: Counter[str] = Counter()
    checked: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for key, rows in sorted(notes.items()):
        about, source, language, what = key.split("\t")
        if about == "changed":
            changed[what] += rows
            sources[source][language]["changed"][what] = rows
        else:
            checked[source][language][what] += rows
    not_known = {
        tag for tags in checked.values() for tag, found in tags.items() if language_id.UNKNOWN in found
    }
    return {
        **_totals(all_rows),
        "changed": dict(changed.most_common()),
        "sources": sources,
        "language_check": checked,
        "languages_not_known": sorted(not_known),
    }


def _totals(counts: Counter[str]) -> dict[str, Any]:
    dropped = {reason: rows for reason, rows in counts.most_common() if reason != KEPT and rows}
    return {"read": counts.total(), "kept": counts[KEPT], "dropped": dropped}
