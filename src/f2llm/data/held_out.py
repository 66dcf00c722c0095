"""Texts that training must not see: a user's files, and tasks of MTEB.

files and tasks -> batches of texts, each of one test set. Every string in every column of a file counts, whatever its
name; of a task all but identifiers and labels, in the splits and languages that it is scored on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from f2llm.data.opening import find_files
from f2llm.data.readers import KINDS, ROWS, read_chunks
from f2llm.errors import F2Error, UsageError

RETRIEVAL = ("corpus", "queries", "instructions")
"""The parts of a retrieval task that hold texts; the others are identifiers."""


class Batch(NamedTuple):
    """Some texts of one test set."""

    name: str
    texts: list[str]


def held_out_texts(paths: Sequence[str], tasks: Sequence[str] = ()) -> Iterator[Batch]:
    """The texts of files, folders of files and globs, then those of tasks of MTEB.

    A test set is a file, named as in its folder, or a task. Raises UsageError for what cannot be read: a test text
    that is not read would not be found either.
    """
    for path in paths:
        root = Path(path) if Path(path).is_dir() else Path(path).parent
        for file in find_files([path], Path(), KINDS):
            name = str(file.relative_to(root)) if file.is_relative_to(root) else file.name
            for chunk in read_chunks(file):
                if chunk.faults:
                    raise UsageError(chunk.faults[0].sentence(file, chunk.unit))
                yield Batch(name, list(_strings(chunk.columns)))
    for name in tasks:
        for task in _find_tasks(name):
            yield from _task_batches(task)


def _find_tasks(name: str) -> list[Any]:
    """The task of MTEB of this name, or those that it is made of; none has loaded its data."""
    try:
        import mteb
    except ImportError:
        raise UsageError(
            f"the MTEB task {name} needs the package mteb; install f2llm[mteb], or give the "
            "task's texts as files."
        ) from None
    try:
        task = mteb.get_task(name)
    except KeyError as error:
        raise UsageError(f"MTEB has no task {name!r} ({error.args[0]}); check the name.") from None
    return list(task.tasks) if task.is_aggregate else [task]


def _task_batches(task: Any) -> Iterator[Batch]:
    """The texts that a task is scored on. Its data is loaded, and let go with the task."""
    name = task.metadata.name
    try:
        task.load_data()
    except Exception as error:  # whatever its loaders raise: no network, a script, a moved dataset
        raise F2Error(
            f"the data of the MTEB task {name} could not be loaded ({error}); load it once where there is a network, "
            "or give its texts as files."
        ) from error
    not_texts = {"id", "_id", "query-id", getattr(task, "label_column_name", "label")}
    texts = chain.from_iterable(_texts(data, not_texts) for data in _evaluated(task))
    if (first := next(texts, None)) is None:
        raise F2Error(f"the MTEB task {name} has no text in the splits it is scored on; leave it out.")
    yield from _batches(name, chain([first], texts))


def _evaluated(task: Any) -> list[Any]:
    """The datasets of the splits and languages that a loaded task is scored on, found as MTEB's evaluation does.

    Data is by language and split, by split alone for one language, and for some bitexts by split with a column for
    each language. Some retrieval tasks keep theirs as attributes beside an empty `dataset`.
    """
    beside = [getattr(task, part, None) for part in RETRIEVAL]
    holders = [data for data in beside if data] or [task.dataset]
    found: dict[int, Any] = {}  # a bitext of many columns is found again for each pair of languages
    for holder, language, split in product(holders, task.hf_subsets, task.metadata.eval_splits):
        data = holder.get(language, holder).get(split)
        if data is None:
            raise F2Error(
                f"the data of the MTEB task {task.metadata.name} lacks the split {split!r} of {language!r}, on which "
                "it is scored; give the task's texts as files."
            )
        parts = [data[part] for part in RETRIEVAL if part in data] if isinstance(data, Mapping) else []
        found.update((id(part), part) for part in parts or [data])
    return list(found.values())


def _texts(data: Any, not_texts: set[str]) -> Iterator[str]:
    """The strings of a dataset, or of what a task holds in its place."""
    if not hasattr(data, "with_format"):
        yield from _strings(data)
        return
    schema = data.features.arrow_schema
    names = [field.name for field in schema if field.name not in not_texts and _has_text(field.type)]
    for table in data.select_columns(names).with_format("arrow").iter(ROWS) if names else ():
        yield from _strings(table.to_pydict())


def _has_text(kind: pa.DataType) -> bool:
    """Whether values of this type hold strings; the path beside the bytes of an image or a sound is none."""
    if pa.types.is_struct(kind):
        kinds = [field.type for field in kind]
        return not any(map(pa.types.is_binary, kinds)) and any(map(_has_text, kinds))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _has_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _strings(value: Any) -> Iterator[str]:
    """All strings within a value: of a mapping the values, not the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, Iterable) and not isinstance(value, bytes):
        for inner in value:
            yield from _strings(inner)


def _batches(name: str, texts: Iterator[str]) -> Iterator[Batch]:
    batch = []
    for text in texts:
        batch.append(text)
        if len(batch) == ROWS:
            yield Batch(name, batch)
            batch = []
    if batch:
        yield Batch(name, batch)
