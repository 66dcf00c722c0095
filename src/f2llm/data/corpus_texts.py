"""Texts from whatever a user points to: a folder of canonical rows, or a file with a column of texts."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from f2llm.data.parts import parts, read_part
from f2llm.data.rows import ROWS_FILE
from f2llm.data.user_files import iterate_texts
from f2llm.errors import UsageError
from f2llm.languages import UNKNOWN

FIELDS = (("query", "query_lang"), ("positives", "positive_lang"), ("negatives", "positive_lang"))


def iterate_corpus(
    corpus: Sequence[Path], languages: Collection[str] | None = None, column: str = "text"
) -> Iterator[tuple[str, str]]:
    """Language and text of all queries and documents; a part of the rows in memory at a time.

    Args:
        corpus: folders of canonical rows, and files of texts (`iterate_texts`), whose language is UNKNOWN.
        languages: as rows name them; the others are left out. All without it.
        column: of files that are no rows.

    Raises:
        UsageError: a path is missing, or languages were asked for, but a file does not say of what language its texts
            are.
    """
    for path in corpus:
        if not path.exists():
            raise UsageError(f"{path} is missing; give a folder of rows or a file of texts.")
        if (path / ROWS_FILE).exists():
            yield from _of_rows(path, languages)
        elif languages is not None:
            raise UsageError(
                f"{path} does not say of what language its texts are; leave out the languages, or give a folder of "
                "rows (a stage's output)."
            )
        else:
            yield from ((UNKNOWN, text) for text in iterate_texts(path, column))


def _of_rows(folder: Path, languages: Collection[str] | None) -> Iterator[tuple[str, str]]:
    for part in parts(folder):
        rows = read_part(part, [name for field in FIELDS for name in field])
        for texts, of in FIELDS:
            for text, language in zip(rows[texts].to_pylist(), rows[of].to_pylist(), strict=True):
                if languages is None or language in languages:
                    yield from ((language, one) for one in ([text] if isinstance(text, str) else text))
