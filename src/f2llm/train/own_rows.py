"""A user's own rows, read and divided: to train on, to choose the weights by (dev), and to report from (test).

Rows are divided by a hash of their query (`hold_out`), so rows with the same query are in one part, whatever the order
of the files. The test rows are taken first, the dev rows from the rest, as the training stage takes them.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from f2llm.data.rows import Source, rows_table
from f2llm.data.user_files import guess_format, has_texts_alone, import_files, iterate_texts
from f2llm.errors import F2Error, UsageError
from f2llm.languages import UNKNOWN
from f2llm.progress import say
from f2llm.recipe_fields import Format
from f2llm.recipe_train import TrainStage
from f2llm.train.sources import SourceRows, hold_out, load_sources
from f2llm.train.trials import Trial, prepare

SOURCE = "files"
TEXTS_ALONE = "learning from a teacher"  # the task of texts without pairs
FEWEST_ROWS = 40  # a tenth of fewer is nothing to report from
FEWEST_TO_CHOOSE = 20  # questions; with fewer, the best of several scores is the luckiest one
MOST_HELD_OUT = 1000  # dev rows, and as many test rows


class Parts(NamedTuple):
    """Rows, divided; each part has at most MOST_HELD_OUT, and at most a tenth, but the first."""

    rest: SourceRows  # training and dev rows, which the training stage divides as they were divided here
    train: int  # how many of them to train on
    dev: int  # and how many to choose by
    test: int
    trial: Trial | None  # what the test rows ask


def read_own(files: list[Path], form: Format | None, texts_alone: bool = False) -> tuple[SourceRows, str]:
    """The rows of the files as one source without an instruction, and their number and hash in words.

    Args:
        texts_alone: whether files may have a column `text` and nothing else, or be lines of a .txt; each text is then
            its own positive, which is enough to learn a teacher's vectors by.

    Raises UsageError for what `import_files` refuses, and for rows among which nothing is to be told apart.
    """
    if not files:
        raise UsageError("no file of rows was given; give one or more.")
    alone = texts_alone and form is None and has_texts_alone(files[0])
    source = Source(
        name=SOURCE,
        format=form or ("retrieval" if alone else guess_format(files[0])),
        task=TEXTS_ALONE if alone else "fine-tuning",
        symmetric=False,
        instruction="",
        licence="unknown",
    )
    table = _rows_of_texts(files, source) if alone else import_files(files, source)
    rows = load_sources(table, [source], [source.format])[0]
    if not alone:
        _check_rows(rows, ", ".join(map(str, files)))
    content = hashlib.sha256("".join(table["hash"].to_pylist()).encode()).hexdigest()
    return rows, f"{len(rows):,} rows ({content[:16]})"


def asks_nothing(source: Source) -> bool:
    """Whether the rows are texts alone, of which none is the answer to another."""
    return source.task == TEXTS_ALONE


def _rows_of_texts(files: list[Path], source: Source) -> pa.Table:
    texts = list(dict.fromkeys(text for file in files for text in iterate_texts(file) if text.strip()))
    if len(texts) < 2:
        raise UsageError(
            f"{', '.join(map(str, files))}: expected two or more different texts, got {len(texts)}; give more."
        )
    columns: dict[str, list[Any]] = {
        "query": texts,
        "positives": [[text] for text in texts],
        "query_lang": [UNKNOWN] * len(texts),
    }
    return rows_table(source, columns)


def _check_rows(rows: SourceRows, where: str) -> None:
    """Refuse rows among which nothing is to be told apart; warn of those whose query is its own answer."""
    if len(set(rows.query)) < 2:
        raise UsageError(
            f"{where}: expected two or more different queries, got {rows.query[0]!r:.60} alone (in "
            f"{len(rows):,} row(s)); give more rows."
        )
    if not rows.is_retrieval:
        _check_labels(rows, where)
        return
    documents = {text for texts in (*rows.positives, *rows.negatives) for text in texts}
    if len(documents) < 2:
        raise UsageError(
            f"{where}: expected two or more different positives, got {documents.pop()!r:.60} alone "
            f"(in {len(rows):,} rows); give more rows, or negatives."
        )
    own = sum(query in positives for query, positives in zip(rows.query, rows.positives, strict=True))
    if own == len(rows):
        raise UsageError(
            f"{where}: expected positives that answer the query, got {own:,} rows in which it is its own positive; "
            "give other positives."
        )
    if own:
        say(
            f"warning: in {own:,} of {len(rows):,} rows the query is its own positive, which teaches nothing."
        )


def _check_labels(rows: SourceRows, where: str) -> None:
    if rows.source.format == "clustering" and all(
        len(np.unique(rows.query_number[members])) < 2 for members in rows.rows_of_label
    ):
        raise UsageError(
            f"{where}: expected a label that two different texts have, got {len(rows.labels):,} labels of one text "
            "each; give more rows, or train with --format classification, where the label itself is to be found."
        )


def divide(rows: SourceRows, draft: TrainStage, seed: int, template: str) -> Parts:
    """Training, dev and test rows; a part that is too small for its purpose goes to training."""
    count = MOST_HELD_OUT if len(rows) >= FEWEST_ROWS and not asks_nothing(rows.source) else 0
    rest, test = hold_out(rows, count, seed)
    trial = _trial(draft, test, seed, template)
    if not trial:
        return Parts(rows, len(rows), 0, 0, None)
    train, dev = hold_out(rest, count, seed)
    chooser = _trial(draft, dev, seed, template)
    if not chooser or len(chooser.questions) < FEWEST_TO_CHOOSE:
        return Parts(rest, len(rest), 0, len(test), trial)
    return Parts(rest, len(train), len(dev), len(test), trial)


def _trial(config: TrainStage, rows: SourceRows, seed: int, template: str) -> Trial | None:
    """What rows ask; None if that is nothing."""
    try:
        return prepare(config, [rows], seed, template)[0]
    except F2Error:
        return None
