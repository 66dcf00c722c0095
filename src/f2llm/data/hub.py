"""Datasets of the Hugging Face hub as a stream of tables, through the library `datasets` and nothing downloaded twice.

The one module that knows that library, which is an extra and slow to import; it is imported when rows are asked for.
Loading scripts are not run: what strangers publish is data.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa

from f2llm.data.records import UNKNOWN, SourceRecord
from f2llm.errors import F2Error, UsageError
from f2llm.files import ROWS_IN_A_GROUP

HUB = re.compile(r"(https?://)?huggingface\.co/datasets/(?P<name>[\w.-]+/[\w.-]+)/?")
PART_BYTES = 1 << 28  # a part ends with this much data, or with as many rows as a row group holds
BATCH = 1024  # rows; divides those of a row group
BY_HAND = "download it by hand and write a record of it with 'files' and 'columns'"


class Rows(NamedTuple):
    """A split of a hub dataset, opened."""

    stream: Any
    """datasets.IterableDataset"""
    revision: str
    """Commit."""
    licence: str
    """As the dataset card has it."""
    total: int | None
    """Rows of the split, where the card says how many."""
    label_names: dict[str, dict[str, str]]
    """Of columns that hold numbers of labels: {"label": {"0": "negative"}}."""


def open_rows(record: SourceRecord, name: str, revision: str | None) -> Rows:
    """The rows of the hub dataset `name` in the record's configuration and split; of the newest revision if None.

    Raises UsageError for what the hub does not have or does not give, F2Error where it cannot be reached.
    """
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise UsageError(
            "fetching from the hub needs the library 'datasets', which is missing; "
            "install it with: pip install 'f2llm[data]'."
        ) from None
    with _hub_answers(record, name, revision):
        facts = huggingface_hub.HfApi().dataset_info(name, revision=revision)
        sha = facts.sha or UNKNOWN
        try:
            splits = datasets.load_dataset(name, record.config, revision=sha, streaming=True)
        except ValueError as error:
            configs = datasets.get_dataset_config_names(name, revision=sha)
            if len(configs) < 2 or record.config in configs:
                raise error
            raise UsageError(
                f"{name} has no configuration {record.config or 'of its own choice'!r}; give one with --config: "
                f"{', '.join(configs)}."
            ) from None
    if record.split not in splits:
        raise UsageError(
            f"{name} has no split {record.split!r}; give one with --split: {', '.join(map(str, splits))}."
        )
    stream = splits[record.split]
    known = (stream.info.splits or {}).get(record.split)
    total = known.num_examples if known else None
    return Rows(stream, sha, _licence(facts.card_data), total or None, _label_names(stream.features))


def tables(rows: Rows, name: str, done: int, limit: int | None) -> Iterator[tuple[pa.Table, bool]]:
    """Successive parts of the rows after the first `done`, up to `limit`, each with whether it is known to be the last.

    A part has 65,536 rows, or fewer where they are long; the last may be empty. Raises F2Error where the hub fails.
    """
    stream = rows.stream.skip(done)
    stream = stream if limit is None else stream.take(limit - done)
    batches = iter(stream.with_format("arrow").iter(BATCH))
    held: list[pa.Table] = []
    batch: pa.Table | None
    while True:
        with _stopped(name, done):
            batch = next(batches, None)
        if batch is not None:
            held.append(batch.replace_schema_metadata(None))
        full = sum(map(len, held)) >= ROWS_IN_A_GROUP or sum(part.nbytes for part in held) >= PART_BYTES
        if batch is not None and not full:
            continue
        with _stopped(name, done):
            table = pa.concat_tables(held) if held else pa.table({})
        held = []
        done += table.num_rows
        yield table, batch is None and (limit is None or done < limit)
        if batch is None:
            return


def _licence(card: Any) -> str:
    said = getattr(card, "license", None)
    if said == "other":
        said = getattr(card, "license_name", None) or said
    return ", ".join(said) if isinstance(said, list) else said or UNKNOWN


def _label_names(features: Any) -> dict[str, dict[str, str]]:
    return {
        column: {str(number): label for number, label in enumerate(feature.names)}
        for column, feature in (features or {}).items()
        if type(feature).__name__ == "ClassLabel"
    }


@contextmanager
def _hub_answers(record: SourceRecord, name: str, revision: str | None) -> Iterator[None]:
    """What the hub or the library has against a dataset, in one sentence."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors

    try:
        yield
    except F2Error:
        raise
    except (DatasetNotFoundError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        if isinstance(error, errors.GatedRepoError) or "is a gated dataset" in str(error):
            raise UsageError(
                f"{name} asks for an agreement; accept it at https://huggingface.co/datasets/{name} and log in with "
                "`hf auth login`."
            ) from None
        if isinstance(error, errors.HfHubHTTPError) and not isinstance(
            error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError
        ):
            raise _unreachable(name, error) from error
        which = f" in revision {revision}" if revision else ""
        raise UsageError(
            f"the hub has no public dataset {name}{which}; correct 'location' or 'revision' of {record.name}, or "
            "log in with `hf auth login`."
        ) from None
    except (
        RuntimeError,
        ValueError,
        FileNotFoundError,
    ) as error:  # a loading script, no files, files not known
        raise UsageError(
            f"{name} cannot be read as it is on the hub ({_first_line(error)}); {BY_HAND}."
        ) from error
    except Exception as error:  # a broken connection comes as the error of whichever client the library has
        raise _unreachable(name, error) from error


@contextmanager
def _stopped(name: str, done: int) -> Iterator[None]:
    """What breaks off a stream, in one sentence."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        stopped = f"{name} stopped after {done:,} rows ({_first_line(error)})"
        if isinstance(error, TypeError | ValueError | pa.ArrowException):
            # Where no card declares a column's type, the library takes it from the first rows.
            raise UsageError(f"{stopped}: rows differ in the types of their columns; {BY_HAND}.") from error
        raise F2Error(
            f"{stopped}, which are kept; mend the connection and run the same command again to go on."
        ) from error


def _unreachable(name: str, error: Exception) -> F2Error:
    return F2Error(
        f"the hub, which has {name}, cannot be reached ({_first_line(error)}); mend the connection, unset "
        f"HF_HUB_OFFLINE, or {BY_HAND}."
    )


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line.rstrip('.')}" if line else type(error).__name__
