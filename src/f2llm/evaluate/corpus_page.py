"""A corpus's figures to what the page shows of it: two kinds of bars, and the lines of its tables.

corpus_report.py counts; templates/corpus.html has the words.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from f2llm.data.language_id import AGREES, OTHER
from f2llm.evaluate.charts import NARROW, NO_BREAK, WIDE, Chart, linear, percent, shorten
from f2llm.languages import UNKNOWN

Figures = dict[str, Any]

SHARES = 6  # of a bar that have a colour of their own; there are as many in templates/style.css
ROW_HEIGHT = 30
BAR_HEIGHT = 14


def corpus_view(corpus: Figures) -> Figures:
    """All that templates/corpus.html takes beside the figures themselves."""
    stages = corpus["stages"]
    total = corpus["total"]
    return {
        "flow": [flow(stages, width) for width in (WIDE, NARROW)],
        "made_of": [
            {"title": title, **shares(counts)}
            for title, counts in (
                ("task", _added(corpus["sources"], "task")),
                ("language of the query", _languages(corpus["languages"])),
                ("licence", _added(corpus["sources"], "licence")),
                ("format", _added(corpus["sources"], "format")),
            )
        ],
        "reasons": [
            {"stage": stage["name"], "what": what, "reason": reason, "rows": rows, "of": stage["read"]}
            for stage in stages
            for what in ("rejected", "changed")
            for reason, rows in stage[what].items()
        ],
        "sources": [_line(line) for line in corpus["sources"]],
        "languages": [_line(line) for line in corpus["languages"]],
        "total": _line(total),
        "most": {
            what: max((line["share"] for line in corpus[what]), default=0.0)
            for what in ("sources", "languages")
        },
        "has": {
            "changed": bool(total["changed"]),
            "mined": total["mined"]["rows"] > 0,
            "checked": bool(total["checked"]),
            "tokens": total["tokens"] > 0,
        },
        "in_corpus": {
            what: sum(line["rows"] > 0 for line in corpus[what]) for what in ("sources", "languages")
        },
    }


def _added(lines: Iterable[Figures], name: str) -> Counter[str]:
    """Rows by what the sources say under this name."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts[line[name] or "unknown"] += line["rows"]
    return counts


def _languages(lines: Iterable[Figures]) -> Counter[str]:
    """Rows by name: a language and a macrolanguage may have the same one."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts["unknown" if line["language"] == UNKNOWN else line["name"] or line["language"]] += line["rows"]
    return counts


def _line(line: Figures) -> Figures:
    """A line with the sums that a table shows, and what they are sums of, largest first."""
    checked = line["checked"]
    other = {
        verdict.removeprefix(f"{OTHER}: "): texts
        for verdict, texts in checked.items()
        if verdict.startswith(OTHER)
    }
    untold = {
        verdict: texts
        for verdict, texts in checked.items()
        if verdict != AGREES and not verdict.startswith(OTHER)
    }
    mined = line["mined"]
    return {
        **line,
        "rejected": _sum(line["rejected"]),
        "changed": _sum(line["changed"]),
        "looked_at": sum(checked.values()),
        "untold": _sum({"": untold}),
        "other": _sum({"": other}),
        "each": mined["negatives"] / mined["rows"] if mined["rows"] else None,
    }


def _sum(by_stage: Mapping[str, Mapping[str, int]]) -> Figures:
    """How many, and of what: (stage, reason, count)."""
    parts = [(stage, reason, count) for stage, found in by_stage.items() for reason, count in found.items()]
    return {"count": sum(count for *_, count in parts), "parts": parts}


# --- Bars


def flow(stages: Sequence[Figures], width: int) -> Chart:
    """Of each stage a bar of what it kept and, after it, of what it rejected, all on one scale."""
    narrow = width <= NARROW
    left, right = (84 if narrow else 130), width - (86 if narrow else 220)
    x = linear(0, max((stage["read"] for stage in stages), default=0), left, right)
    rows = []
    for number, stage in enumerate(stages):
        rejected = stage["read"] - stage["kept"]
        text = f"{stage['kept']:,}"
        rows.append(
            {
                "y": number * ROW_HEIGHT + 8,
                "label": shorten(stage["name"], 11 if narrow else 18),
                "kept": (left, round(x(stage["kept"]) - left, 1)),
                "rejected": (
                    x(stage["kept"]),
                    round(max(1.5, x(stage["read"]) - x(stage["kept"])), 1) if rejected else 0,
                ),
                "text": text if narrow or not rejected else f"{text} kept, {rejected:,} rejected",
                "title": f"{stage['name']}: {text} kept, {rejected:,} rejected of {stage['read']:,}",
            }
        )
    return {
        "width": width,
        "height": len(stages) * ROW_HEIGHT + 4,
        "bar": BAR_HEIGHT,
        "right": right,
        "rows": rows,
    }


def shares(counts: Counter[str], width: int = WIDE) -> Chart:
    """One bar, divided by `counts`: the largest in colours, the others together in grey."""
    total = counts.total()
    largest = [(name, count) for name, count in counts.most_common(SHARES) if count]
    others = total - sum(count for _, count in largest)
    named: list[tuple[str, int, int | str]] = [(name, count, i) for i, (name, count) in enumerate(largest)]
    if others:
        rest = sum(count > 0 for count in counts.values()) - len(largest)
        named.append((f"{rest} other{'s' if rest > 1 else ''}", others, "grey"))
    x = linear(0, total, 0, width)
    parts, before = [], 0
    for name, count, colour in named:
        parts.append(
            {
                "x": x(before),
                "width": round(max(0.5, x(before + count) - x(before) - 1), 1),
                "colour": colour,
                "label": name,
                "share": share(count, total),
                "title": f"{name}: {count:,} rows, {share(count, total)}",
            }
        )
        before += count
    return {"width": width, "bar": BAR_HEIGHT, "parts": parts}


def share(count: float, total: float) -> str:
    """A share in per cent, with as many digits as say something."""
    part = count / total if total else 0.0
    if part and part < 0.0005:
        return f"<{NO_BREAK}0.1{NO_BREAK}%"
    return percent(part)
