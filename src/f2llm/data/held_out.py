"""Texts that training must not see: a user's files, and tasks of MTEB.

files and tasks -> batches of texts, each of one test set. Every string in every column counts, whatever its name.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from f2llm.data.opening import find_files
from f2llm.data.readers import KINDS, ROWS, read_chunks
from f2llm.errors import F2Error, UsageError


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
    for task in tasks:
        yield from _batches(task, _strings(_evaluated(load_task(task))))


def load_task(name: str) -> Any:
    """A task of MTEB with its data loaded."""
    try:
        import mteb  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError(
            f"the MTEB task {name} needs the package mteb; install it, or give the task's texts as files."
        ) from None
    try:
        task = mteb.get_task(name)
    except KeyError as error:
        raise UsageError(f"MTEB has no task {name!r} ({error}); check the name.") from None
    try:
        task.load_data()
    except Exception as error:  # whatever its loaders raise: no network, a script, a moved dataset
        raise F2Error(
            f"the data of the MTEB task {name} could not be loaded ({error}); load it once where there is a network, "
            "or give its texts as files."
        ) from error
    return task


def _evaluated(task: Any) -> Iterator[Any]:
    """The splits that the task is scored on; its training split may be trained on."""
    splits = set(task.metadata.eval_splits)

    def walk(data: Any) -> Iterator[Any]:
        for key, value in data.items():
            if key in splits:
                yield value
            elif isinstance(value, Mapping):  # by language, or by what it is
                yield from walk(value)

    # Older retrieval tasks keep their texts beside `dataset`, by split as well.
    for name in ("dataset", "corpus", "queries"):
        if isinstance(data := getattr(task, name, None), Mapping):
            yield from walk(data)


def _strings(value: Any) -> Iterator[str]:
    """All strings within a value: of a mapping the values, not the keys; of a dataset its rows."""
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
