"""What mining came to: counts by source and language, a histogram of margins, and a sheet of rows to read.

A miner's mistakes do not show in a loss. They show in the share of documents that a margin drops, and to whoever
reads some of the negatives.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from f2llm.mine.block import MARGIN_EDGES
from f2llm.mine.choice import Fate
from f2llm.mine.pools import Reason

LONGEST = 300  # characters of a text in the sheet

FATES = {
    Fate.KEPT: "kept",
    Fate.ABSOLUTE_MARGIN: "absolute margin",
    Fate.RELATIVE_MARGIN: "relative margin",
    Fate.MAX_SCORE: "max score",
    Fate.NOT_NEEDED: "not needed",
}
REASONS = {
    Reason.POSITIVE: "a positive of the row",
    Reason.RIGHT_FOR_QUERY: "right for the same query",
    Reason.RIGHT_FOR_LABEL: "right for the same label",
    Reason.QUERY_ITSELF: "the query itself",
    Reason.GIVEN_NEGATIVE: "a negative it has",
}

COUNTS = ("candidates", "ranked", "passed_over")


class Sample(NamedTuple):
    """A row with what was mined for it."""

    source: str
    language: str
    query: str
    positives: list[str]
    positive_score: float
    """The lowest of theirs."""
    mined: list[tuple[str, float]]


def add_up(counted: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The counts of blocks of rows as one entry for each source and language, sorted by these."""
    total: dict[tuple[str, str], dict[str, Any]] = {}
    for one in counted:
        key = one["source"], one["language"]
        if key not in total:
            total[key] = {
                "rows": 0,
                "margins": [0] * len(one["margins"]),
                **{name: Counter() for name in COUNTS},
            }
        entry = total[key]
        entry["rows"] += one["rows"]
        entry["margins"] = [a + b for a, b in zip(entry["margins"], one["margins"], strict=True)]
        for name in COUNTS:
            entry[name].update(one[name])  # counts of 0 stay, so that all entries have the same keys
    return [
        {
            "source": source,
            "language": language,
            "rows": entry["rows"],
            "candidates": dict(sorted(entry["candidates"].items(), key=lambda item: int(item[0]))),
            "ranked": dict(entry["ranked"]),
            "passed_over": dict(entry["passed_over"]),
            "margins": entry["margins"],
        }
        for (source, language), entry in sorted(total.items())
    ]


def report_page(counts: Sequence[dict[str, Any]]) -> str:
    """The counts as Markdown, a line for each source and language and one for each source as a whole."""
    whole = add_up([{**one, "language": "all"} for one in counts])
    lines: dict[str, list[dict[str, Any]]] = {one["source"]: [one] for one in whole}
    for one in counts:
        lines[one["source"]].append(one)
    # A source in one language is one line.
    entries = [one for source in lines.values() for one in (source if len(source) > 2 else source[1:])]
    return "\n".join(
        [
            "# Mined negatives\n",
            "## What was kept\n",
            "Documents by what became of them, of all ranks that were looked at; rows by whether anything was left.\n",
            *_table(["rows", "rows with none", *FATES.values()], entries, _ranked),
            "\n## What was passed over\n",
            "Documents that would have been among the ranks but are known not to be negatives.\n",
            *_table(
                list(REASONS.values()),
                entries,
                lambda one: [one["passed_over"][r.name.lower()] for r in REASONS],
            ),
            "\n## Margins\n",
            "Negatives by the score of their row's lowest positive minus their own.\n",
            *_table(_bins(), entries, lambda one: one["margins"]),
            "",
        ]
    )


def _ranked(one: dict[str, Any]) -> list[int]:
    return [one["rows"], one["candidates"].get("0", 0), *(one["ranked"][fate.name.lower()] for fate in FATES)]


def _bins() -> list[str]:
    edges = [f"{edge:g}" for edge in MARGIN_EDGES]
    between = [f"{low} to {high}" for low, high in pairwise(edges)]
    return [f"below {edges[0]}", *between, f"{edges[-1]} and more"]


def _table(columns: list[str], entries: Sequence[dict[str, Any]], cells: Any) -> Iterator[str]:
    yield f"| {' | '.join(['source', 'language', *columns])} |"
    yield "| --- | --- |" + " ---: |" * len(columns)
    for one in entries:
        numbers = [f"{value:,}" for value in cells(one)]
        yield f"| {' | '.join([_cell(one['source']), _cell(one['language']), *numbers])} |"


def sample_sheet(samples: Iterable[Sample]) -> str:
    """Rows to read, as Markdown."""
    lines = [
        "# Rows with their mined negatives\n",
        "Is one of the negatives an answer? Then raise a margin.\n",
    ]
    for sample in samples:
        lines += [f"## {_cell(sample.source)}, {_cell(sample.language)}\n", f"**{_cell(sample.query)}**\n"]
        lines += ["| score | | text |", "| ---: | --- | --- |"]
        positives = [f"| {sample.positive_score:.4f} | positive | {_cell(sample.positives[0])} |"]
        positives += [f"| | positive | {_cell(text)} |" for text in sample.positives[1:]]
        mined = [f"| {score:.4f} | mined | {_cell(text)} |" for text, score in sample.mined]
        lines += [*positives, *mined, ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text on one line that is nothing but text to Markdown."""
    line = " ".join(text.split())
    line = line if len(line) <= LONGEST else line[:LONGEST] + " ..."
    for sign in "\\|`*_<>[]#":
        line = line.replace(sign, f"\\{sign}")
    return line
