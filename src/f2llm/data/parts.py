"""Rows part by part: how every stage from rows to rows goes through them, counts them and can be stopped.

folders of rows -> parts (row groups) -> a step on each, anywhere (`f2llm.engine`) -> parts of the same numbers, what
was rejected with the reason, and a tally. Each part of a stage's output is complete or not there, so a stage that was
killed goes on with the parts that are missing, and ends in the same files.

What rows were decontaminated of goes wherever they go: to later stages, and to the models trained on them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa

from f2llm.data.rows import ROWS_FILE, SCHEMA, SOURCES_FILE, Source, open_rows, read_sources, row_files
from f2llm.engine import map_items
from f2llm.errors import F2Error
from f2llm.files import read_json, write_json, write_table

REJECTS = "rejects.parquet"
DONE = "done"  # what each finished part counted
DECONTAMINATION = "decontamination.json"
REJECT_SCHEMA = SCHEMA.append(pa.field("reason", pa.string(), nullable=False))
KEPT = "kept"


class Part(NamedTuple):
    """A row group of a file of rows."""

    path: str
    row_group: int
    rows: int


class Sifted(NamedTuple):
    """What a step made of a part: rows to go on with (SCHEMA), those that do not with the reason (REJECT_SCHEMA)."""

    kept: pa.Table
    rejected: pa.Table
    changed: Mapping[str, int] = MappingProxyType({})
    """How many rows were changed and kept, by what was done to them."""


Step = Callable[[pa.Table], Sifted]
Tally = dict[str, dict[str, Counter[str]]]
"""source -> language of the query -> "kept" or a reason -> rows"""


def parts(folder: Path) -> list[Part]:
    """The parts of a folder of rows, in order; opens each file's footer alone."""
    found = []
    for path in row_files(folder):
        with open_rows(path) as file:
            groups = range(file.num_row_groups)
            found += [Part(str(path), group, file.metadata.row_group(group).num_rows) for group in groups]
    return found


def read_part(part: Part, columns: list[str] | None = None) -> pa.Table:
    with open_rows(Path(part.path)) as file:
        return file.read_row_group(part.row_group, columns=columns)


def sift(folders: Sequence[Path], out: Path, step: Step, what: str) -> Tally:
    """Put the rows of `folders` through `step`, part by part, into the folder of rows `out`.

    Args:
        step: a function of a part's rows; a partial of one that stands at the top of a module, to be sent to workers.
        what: for the bar: "clean rows".

    Returns:
        How many rows of each source and language were kept, or not and why. What went in is the sum.
    """
    found = [part for folder in folders for part in parts(folder)]
    work = [_Work(number, part, out, step) for number, part in enumerate(found)]
    tally: Tally = defaultdict(lambda: defaultdict(Counter))
    changed: Counter[str] = Counter()
    for facts in map_items(_sift_part, work, what=what):
        changed.update(facts["changed"])
        for source, language, fate, rows in facts["tally"]:
            tally[source][language][fate] += rows
    write_json(out / "tally.json", {"rows": tally, "changed": changed})
    sources = {source.name: source for folder in folders for source in read_sources(folder)}
    write_sources(out, sources.values(), tally)
    carry_decontamination(folders, out)
    return tally


def write_sources(out: Path, sources: Iterable[Source], tally: Tally) -> None:
    """sources.json of the sources that have rows left, with these counted."""
    counted = []
    for source in sources:
        kept = {
            language: fates[KEPT] for language, fates in tally.get(source.name, {}).items() if fates[KEPT]
        }
        if kept:
            update = {"rows": sum(kept.values()), "languages": sorted(kept)}
            counted.append(source.model_copy(update=update).model_dump())
    write_json(out / SOURCES_FILE, counted)


def carry_decontamination(folders: Iterable[Path], out: Path, *own: dict[str, Any]) -> None:
    """Write to `out` the reports of decontamination that lie in `folders`, each once, and then its `own`.

    Folders are of rows, token stores or models. Where none was decontaminated, nothing is written.
    """
    found = [report for folder in folders for report in _decontaminations(folder)]
    reports = [report for number, report in enumerate([*found, *own]) if report not in found[:number]]
    if reports:
        write_json(out / DECONTAMINATION, reports)


def _decontaminations(folder: Path) -> list[dict[str, Any]]:
    path = folder / DECONTAMINATION
    reports = read_json(path) if path.exists() else []
    if not isinstance(reports, list):
        raise F2Error(
            f"{path} holds a {type(reports).__name__}, expected a list of reports; make the folder again."
        )
    return reports


def write_part(out: Path, number: int | tuple[int, ...], rows: pa.Table, name: str = ROWS_FILE) -> None:
    """Part `number` of the rows (or of another table) of `out`; one without rows is a file as well.

    Where nobody knows beforehand how many parts an item of work makes, the number is the item's and one within it.
    """
    write_table(out / name / f"part-{digits(number)}.parquet", rows)


def digits(number: int | tuple[int, ...]) -> str:
    """In names of files, so that these sort as numbers do."""
    return "-".join(f"{one:05}" for one in (number if isinstance(number, tuple) else (number,)))


@dataclass(frozen=True)
class _Work:
    number: int
    part: Part
    out: Path
    step: Step


def _sift_part(work: _Work) -> dict[str, Any]:
    done = work.out / DONE / f"{work.number:05}.json"
    if done.exists():
        return read_json(done)
    rows = read_part(work.part)
    sifted = work.step(rows)
    if sifted.kept.num_rows + sifted.rejected.num_rows != rows.num_rows:
        raise F2Error(
            f"{work.part.path}, row group {work.part.row_group}: {rows.num_rows} rows went in, {sifted.kept.num_rows} "
            f"were kept and {sifted.rejected.num_rows} rejected; this is a mistake in f2llm, please report it."
        )
    write_part(work.out, work.number, sifted.kept)
    if sifted.rejected.num_rows:
        write_part(work.out, work.number, sifted.rejected, REJECTS)
    counts: Counter[tuple[str, str, str]] = Counter()
    for table in (sifted.kept, sifted.rejected):
        counts.update(_keys(table))
    facts = {
        "tally": [[*key, rows] for key, rows in sorted(counts.items())],
        "changed": dict(sifted.changed),
    }
    write_json(done, facts)
    return facts


def _keys(table: pa.Table) -> Iterable[tuple[str, str, str]]:
    """Source, language and fate of each row."""
    fates = table["reason"].to_pylist() if "reason" in table.column_names else [KEPT] * table.num_rows
    return zip(table["source"].to_pylist(), table["query_lang"].to_pylist(), fates, strict=True)
