"""The catalogue: a record of every public source of the corpus, a file of them for each task type (`sources/*.yaml`).

The files are kept by hand. Facts of the paper (arXiv 2603.19223, Tables 8-9) are all there; what nobody looked up yet,
as most licences and columns, is `unknown` until a fetch or a reader fills it in.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import NamedTuple

from f2llm import languages as lang
from f2llm.data.records import UNKNOWN, SourceRecord, read_records
from f2llm.errors import UsageError
from f2llm.recipe_fields import Format

FOLDER = Path(__file__).with_name("sources")


class Found(NamedTuple):
    """What a search of the catalogue gives."""

    records: list[SourceRecord]
    unlisted: list[SourceRecord]
    """Sources that fit but for their languages, of which nobody knows the list."""


@cache
def load(folder: Path = FOLDER) -> dict[str, SourceRecord]:
    """All records by name, in the order of the files.

    Raises UsageError with file and line for what is not a record, and for a name that stands twice.
    """
    places: dict[str, str] = {}
    records: dict[str, SourceRecord] = {}
    for path in sorted(folder.glob("*.yaml")):
        for record, place in read_records(path):
            if record.name in places:
                raise UsageError(
                    f"{place}: the name {record.name!r} stands at {places[record.name]} as well; rename one of them."
                )
            places[record.name] = place
            records[record.name] = record
    return records


def get(name: str) -> SourceRecord:
    """The record of a name; UsageError with the nearest names if there is none."""
    _check(name, load(), "source")
    return load()[name]


def find(
    *,
    language: str | None = None,
    task: str | None = None,
    format: Format | None = None,
    stage: int | None = None,
    name: str | None = None,
) -> Found:
    """Sources that have all that is asked for, in the order of the catalogue.

    Args:
        language: a natural language by any of its codes, or a programming language by its name. `zho` also finds
            `zho_Hant`, but a script that is asked for must be that of the source.
        task: a task type, such as "question answering".
        stage: 1 or 2, of the paper's training.

    Raises UsageError, with the nearest that there is, for a name, task or language that is not known.
    """
    records = [get(name)] if name is not None else list(load().values())
    if task is not None:
        _check(task, (record.task for record in load().values()), "task")
    fitting = [
        record
        for record in records
        if task in (None, record.task)
        and format in (None, record.format)
        and (stage is None or stage in record.stages)
    ]
    if language is None:
        return Found(fitting, [])
    if any(language.lower() in record.programming_languages for record in load().values()):
        spoken = [record for record in fitting if language.lower() in record.programming_languages]
    else:
        tag = lang.tag(language)
        spoken = [record for record in fitting if _speaks(record, tag)]
    unlisted = [record for record in fitting if record.languages == UNKNOWN and record not in spoken]
    return Found(spoken, unlisted)


def _speaks(record: SourceRecord, tag: str) -> bool:
    if record.languages == UNKNOWN:
        return False
    return any(tag in (language, language.partition("_")[0]) for language in record.languages)


def _check(wanted: str, known: Iterable[str], what: str) -> None:
    if wanted not in (names := list(dict.fromkeys(known))):
        near = get_close_matches(wanted.lower(), names) or get_close_matches(
            wanted.lower(), names, n=1, cutoff=0
        )
        raise UsageError(
            f"the catalogue has no {what} {wanted!r}, the nearest is {', then '.join(map(repr, near))}; "
            "`f2llm data list` shows all."
        )
