"""What is wrong with a file of rows, before anything is made of it: every bad record with its place and the fix.

file -> chunks -> the same checks that make canonical rows (`canonical`) -> counts by reason and the first problems in
words. Nothing is written but, where it is asked for, a file of all bad records. Memory holds one chunk.
"""

import difflib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO

from f2llm.data.canonical import BELOW, convert
from f2llm.data.opening import find_files
from f2llm.data.readers import KINDS, Chunk, read_chunks
from f2llm.data.reading import MISSPELT, Reading, check_header, misspelt
from f2llm.data.records import Layout, read_record
from f2llm.data.text_files import Fault
from f2llm.errors import UsageError
from f2llm.files import atomic_write

# By the columns that tell; the first that has all of its.
LAYOUT_OF: dict[Layout, set[str]] = {
    "retrieval": {"query"},
    "sts": {"sentence1", "sentence2"},
    "parallel": {"id", "lang", "text"},
    "clustering": {"label"},
}


@dataclass
class FileReport:
    """What was found in one file."""

    file: Path
    layout: Layout | None = None
    read: int = 0
    good: int = 0
    below: int = 0
    """Scored pairs that are well formed and under the record's `at_least`."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Of bad records."""
    first: list[str] = field(default_factory=list)
    """Problems in words; one of them may be of the file as a whole."""

    @property
    def ok(self) -> bool:
        return self.good + self.below > 0 and not self.bad and not self.first

    @property
    def bad(self) -> int:
        return self.reasons.total()

    def lines(self) -> Iterator[str]:
        """To be printed."""
        kind = f" ({self.layout})" if self.layout else ""
        below = f", {self.below:,} {BELOW}" if self.below else ""
        yield f"{self.file}{kind}: {self.read:,} read, {self.good:,} good, {self.bad:,} bad{below}"
        yield from (f"  {sentence}" for sentence in self.first)
        if self.bad:
            yield "  bad by reason: " + ", ".join(f"{why} {n:,}" for why, n in self.reasons.most_common())


def check_file(
    path: Path,
    *,
    record: Path | None = None,
    layout: Layout | None = None,
    most: int = 10,
    rejects: Path | None = None,
) -> list[FileReport]:
    """Check a file, or all files of a folder or glob.

    Args:
        record: YAML file of a source, which says how the file reads.
        layout: how it reads, where there is no record; told by the columns, if left out.
        most: problems to say in words, for each file; at least one.
        rejects: where to write all bad records, as JSONL.

    Returns:
        A report for each file; all is well if all of them are `ok`.

    Raises:
        UsageError: there is no such file, or the record does not suffice.
    """
    if record and layout:
        raise UsageError("a record and a format were both given; give one of them, a record says the format.")
    reading = Reading.of(read_record(record)) if record else Reading(layout) if layout else None
    files = find_files([str(path)], Path(), KINDS)
    with atomic_write(rejects) if rejects else nullcontext() as out:
        return [_check(file, reading, max(1, most), out) for file in files]


def _check(file: Path, reading: Reading | None, most: int, out: IO[bytes] | None) -> FileReport:
    report = FileReport(file)
    try:
        reading = reading or _guess(file)
        report.layout = reading.layout
        known: set[str] = set()
        for number, chunk in enumerate(read_chunks(file, reading.wanted)):
            if number == 0:
                check_header(chunk, reading)
            slips = [slip for slip in misspelt(chunk, reading) if slip.problem not in known]
            known |= {slip.problem for slip in slips}  # a column is misspelt once a file
            faults = _count(report, chunk, reading)
            spoken = sorted([*slips, *faults], key=lambda fault: fault.number)
            report.first += [fault.sentence(file, chunk.unit) for fault in spoken][: most - len(report.first)]
            if out:
                out.writelines(_line(file, chunk, fault) for fault in faults)
        if report.read == 0:
            raise _empty(file)
    except UsageError as error:  # of the file as a whole: what was counted until then is shown too
        report.first.append(str(error))
    return report


def _count(report: FileReport, chunk: Chunk, reading: Reading) -> list[Fault]:
    """Add up a chunk; its bad records."""
    converted = convert(chunk, reading)
    faults = [fault for fault in converted.faults if fault.reason != BELOW]
    report.read += chunk.read
    report.good += len(converted.numbers)
    report.below += len(converted.faults) - len(faults)
    report.reasons.update(fault.reason for fault in faults)
    return faults


def _line(file: Path, chunk: Chunk, fault: Fault) -> bytes:
    values = {"file": str(file), chunk.unit: fault.number, **fault._asdict()}
    values.pop("number")
    return (json.dumps(values, ensure_ascii=False) + "\n").encode()


def _empty(file: Path) -> UsageError:
    return UsageError(f"{file} has no rows; give a file with at least one.")


def _guess(file: Path) -> Reading:
    """By the columns of the first records."""
    chunks = list(islice(read_chunks(file, []), 1))
    if not chunks:
        raise _empty(file)
    names = chunks[0].names
    for layout, tell in LAYOUT_OF.items():
        if tell <= names.keys():
            return Reading(layout)
    known = sorted(set().union(*LAYOUT_OF.values()))
    near = [
        (name, *found) for name in names if (found := difflib.get_close_matches(name, known, 1, MISSPELT))
    ]
    hint = f"{near[0][0]!r} may mean {near[0][1]!r}: " if near else ""
    raise UsageError(
        f"{file} has the columns {', '.join(map(repr, names)) or '(none)'}, expected 'query' and 'positive', 'text' "
        f"and 'label', or those of a record; {hint}rename them, or say with --format or --record what they are."
    )
