"""What became of every source and every language of a corpus, from the counts that a run's stages left.

manifests and tallies -> of each stage, counts by source and language -> a line of each source, each language and all
together, in which the same things are counted.

Nothing is counted here that a stage has counted itself: no rows are read, save those of stages without a tally and of
folders from outside the run. A language is that of rows' queries; texts (checked, stored) have their own.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from f2llm.data.parts import KEPT, parts, read_part
from f2llm.data.rows import Source, read_sources
from f2llm.errors import UsageError
from f2llm.files import read_json
from f2llm.languages import english_name

CORPUS = {"sources", "synthetic", "clean", "decontaminate", "mine", "tokenise"}
"""Kinds of stages that make a run's report tell of a corpus."""

Line = dict[str, Any]
Key = tuple[str, str]
"""Source and language."""


class Counts(defaultdict[Key, Counter[str]]):
    """Of each source and language how many of what."""

    def __init__(self) -> None:
        super().__init__(Counter)

    def by(self, name: Callable[[Key], str]) -> dict[str, Counter[str]]:
        """Added up over the keys that have the same name."""
        added: dict[str, Counter[str]] = defaultdict(Counter)
        for key, counts in self.items():
            added[name(key)].update(counts)
        return added


@dataclass(frozen=True)
class Counted:
    """What a stage counted."""

    name: str
    kind: str
    reads: list[str]
    sources: list[Source] = field(default_factory=list)
    records: dict[str, int] = field(default_factory=dict)
    """Of each source what it gave: records of its files, answers of a language model."""
    rows: Counts = field(default_factory=Counts)
    """By fate: KEPT, or the reason why not."""
    changed: Counts = field(default_factory=Counts)
    """By what was done to them. A row may be changed in several ways."""
    checked: Counts = field(default_factory=Counts)
    """Texts, by what the language detector says of their tags."""
    mined: Counts = field(default_factory=Counts)
    """`rows` that were mined for, those `with_any` negative found, and these `negatives`."""
    stored: Counts = field(default_factory=Counts)
    """Distinct `texts` of a token store and their `tokens`."""


def corpus_report(run: Path, manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What `report.json` says of the corpus of a run; None where no stage makes one, or none met a row.

    Returns:
        `stages` in their order, each with what it read, kept, rejected by reason and changed; `last`, the stages
        whose rows no further stage makes rows of, which are the corpus; `total`, and lines of `sources` and
        `languages`, most rows first. `_line` says what is in a line.
    """
    meant = {name for one in manifests if one["stage"] in CORPUS for name in (one["name"], *_reads(one))}
    stages = [_from_outside(name) for name in sorted(meant) if "/" in name]
    stages += [_counted(run, manifest) for manifest in manifests if manifest["name"] in meant]
    read = {name for stage in stages if stage.kind != "tokenise" for name in stage.reads}
    last = [stage.name for stage in stages if stage.kind != "tokenise" and stage.name not in read]
    total = _lines(stages, last, lambda key: "all").get("all")
    if total is None:
        return None
    sources = {source.name: source for stage in stages for source in stage.sources}
    of_source = _lines(stages, last, lambda key: key[0])
    of_language = _lines(stages, last, lambda key: key[1])
    languages_of = _sets(stages, last, lambda key: key)
    sources_of = _sets(stages, last, lambda key: key[::-1])
    records: Counter[str] = Counter()
    for stage in stages:
        records.update(stage.records)
    return {
        "stages": [_stage(stage) for stage in stages if stage.kind != "tokenise"],
        "last": last,
        "total": {**total, "records": records.total()},
        "sources": _sorted(
            {
                "source": name,
                **_facts(sources.get(name)),
                "languages": len(languages_of[name]),
                "records": records[name],
                **line,
            }
            for name, line in of_source.items()
        ),
        "languages": _sorted(
            {"language": tag, "name": _name(tag), "sources": len(sources_of[tag]), **line}
            for tag, line in of_language.items()
        ),
    }


def _facts(source: Source | None) -> dict[str, str | None]:
    """What is known of a source; nothing, where all its rows went in the stage that they came with."""
    names = ("task", "format", "licence")
    return {name: getattr(source, name) if source else None for name in names}


def _name(tag: str) -> str | None:
    """In English; None for a language that the table of languages does not have."""
    try:
        return english_name(tag)
    except UsageError:
        return None


def _sorted(lines: Iterable[Line]) -> list[Line]:
    """Most rows first, of equal ones most that were made; else as they come, which is by name."""
    return sorted(lines, key=lambda line: (-line["rows"], -line["made"]))


def _sets(
    stages: Sequence[Counted], last: Sequence[str], pair: Callable[[Key], tuple[str, ...]]
) -> dict[str, set[str]]:
    """What stands beside what in the rows of the last stages."""
    found: dict[str, set[str]] = defaultdict(set)
    for stage in stages:
        for key, fates in stage.rows.items():
            if stage.name in last and fates[KEPT]:
                one, other = pair(key)
                found[one].add(other)
    return found


# --- Lines


def _lines(stages: Sequence[Counted], last: Sequence[str], name: Callable[[Key], str]) -> dict[str, Line]:
    """A line for each name that keys have."""
    grouped = [
        {what: getattr(stage, what).by(name) for what in ("rows", "changed", "checked", "mined", "stored")}
        for stage in stages
    ]
    names = {one for groups in grouped for group in groups.values() for one in group}
    total = sum(
        fates[KEPT]
        for stage, groups in zip(stages, grouped, strict=True)
        if stage.name in last
        for fates in groups["rows"].values()
    )
    return {one: _line(one, stages, grouped, last, total) for one in sorted(names)}


def _line(
    name: str,
    stages: Sequence[Counted],
    grouped: Sequence[dict[str, dict[str, Counter[str]]]],
    last: Sequence[str],
    total: int,
) -> Line:
    """All that was counted of a source, a language, or all.

    Returns:
        made: rows that came into the run.
        rows, share: those of the corpus, and their share of it.
        kept: rows after each stage that met any.
        rejected, changed: by stage and reason; `sources` rejects records, all others rows.
        checked: texts whose language was looked at, by verdict.
        mined: rows that were mined for, those with any negative found, and these negatives.
        texts, tokens: distinct ones in token stores.
    """
    kept: dict[str, int] = {}
    by_stage: dict[str, dict[str, Counter[str]]] = {"rejected": {}, "changed": {}}
    added: dict[str, Counter[str]] = {what: Counter() for what in ("checked", "mined", "stored")}
    for stage, groups in zip(stages, grouped, strict=True):
        fates = groups["rows"].get(name, Counter())
        if fates:
            kept[stage.name] = fates[KEPT]
        rejected = Counter({reason: rows for reason, rows in fates.items() if reason != KEPT})
        changed = groups["changed"].get(name, Counter())
        for what, counts in (("rejected", rejected), ("changed", changed)):
            if counts := +counts:
                by_stage[what][stage.name] = Counter(dict(counts.most_common()))
        for what, counts in added.items():
            counts.update(groups[what].get(name, Counter()))
    rows = sum(kept.get(stage, 0) for stage in last)
    return {
        "made": sum(kept.get(stage.name, 0) for stage in stages if not stage.reads),
        "rows": rows,
        "share": rows / total if total else 0.0,
        "kept": kept,
        **by_stage,
        "checked": dict(added["checked"].most_common()),
        "mined": {what: added["mined"][what] for what in ("rows", "with_any", "negatives")},
        **{what: added["stored"][what] for what in ("texts", "tokens")},
    }


def _stage(stage: Counted) -> Line:
    rows, changed = (sum(counts.values(), Counter[str]()) for counts in (stage.rows, stage.changed))
    return {
        "name": stage.name,
        "stage": stage.kind,
        "reads": stage.reads,
        "read": rows.total(),
        "kept": rows[KEPT],
        "rejected": {reason: count for reason, count in rows.most_common() if reason != KEPT and count},
        "changed": dict(changed.most_common()),
    }


# --- What stages counted


def _counted(run: Path, manifest: Mapping[str, Any]) -> Counted:
    folder, kind = run / manifest["name"], manifest["stage"]
    sources = [] if kind == "tokenise" else read_sources(folder)
    stage = Counted(manifest["name"], kind, _reads(manifest), sources)
    _READ.get(kind, _read_rows)(stage, folder, manifest["facts"])
    return stage


def _reads(manifest: Mapping[str, Any]) -> list[str]:
    """The stages and folders of rows that a stage takes."""
    return list(manifest["config"].get("data", []))


def _from_outside(folder: str) -> Counted:
    stage = Counted(folder, "folder", [], read_sources(Path(folder)))
    _read_rows(stage, Path(folder), {})
    return stage


def _read_rows(stage: Counted, folder: Path, facts: Mapping[str, Any]) -> None:
    """Of a stage that rejects nothing and left no tally: its rows, part by part."""
    for part in parts(folder):
        keys = read_part(part, ["source", "query_lang"]).group_by(["source", "query_lang"])
        for row in keys.aggregate([([], "count_all")]).to_pylist():
            stage.rows[row["source"], row["query_lang"]][KEPT] += row["count_all"]
    _count_records(stage)


def _count_records(stage: Counted) -> None:
    """Where all that a source gave is rows, or rejects that would have been one."""
    for source, fates in stage.rows.by(lambda key: key[0]).items():
        stage.records[source] = fates.total()


def _read_tally(stage: Counted, folder: Path) -> dict[str, Any]:
    """The fates of rows; returns all that is in the tally."""
    tally: dict[str, Any] = read_json(folder / "tally.json")
    for source, languages in tally["rows"].items():
        for language, fates in languages.items():
            stage.rows[source, language].update(fates)
    return tally


def _read_imported(stage: Counted, folder: Path, facts: Mapping[str, Any]) -> None:
    _read_tally(stage, folder)
    stage.records.update({source: found["read"] for source, found in facts["sources"].items()})


def _read_synthetic(stage: Counted, folder: Path, facts: Mapping[str, Any]) -> None:
    _read_tally(stage, folder)
    _count_records(stage)


def _read_cleaned(stage: Counted, folder: Path, facts: Mapping[str, Any]) -> None:
    report = read_json(folder / "report.json")
    for source, languages in report["sources"].items():
        for language, found in languages.items():
            stage.rows[source, language].update({KEPT: found["kept"], **found["dropped"]})
            stage.changed[source, language].update(found["changed"])
    for source, languages in report["language_check"].items():
        for language, verdicts in languages.items():
            stage.checked[source, language].update(verdicts)


def _read_decontaminated(stage: Counted, folder: Path, facts: Mapping[str, Any]) -> None:
    for key, negatives in _read_tally(stage, folder)["changed"].items():
        source, language, reason = key.split("\t", 2)
        stage.changed[source, language][f"negative left out: {reason}"] += negatives


def _read_mined(stage: Counted, folder: Path, facts: Mapping[str, Any]) -> None:
    _read_tally(stage, folder)
    for one in read_json(folder / "report.json")["counts"]:
        found = {int(negatives): rows for negatives, rows in one["candidates"].items()}
        stage.mined[one["source"], one["language"]].update(
            rows=one["rows"],
            with_any=one["rows"] - found.get(0, 0),
            negatives=sum(negatives * rows for negatives, rows in found.items()),
        )


def _read_stored(stage: Counted, folder: Path, facts: Mapping[str, Any]) -> None:
    for source, languages in facts["sources"].items():
        for language, counts in languages.items():
            stage.stored[source, language].update(texts=counts["distinct"], tokens=counts["tokens"])


_READ: dict[str, Callable[[Counted, Path, Mapping[str, Any]], None]] = {
    "sources": _read_imported,
    "synthetic": _read_synthetic,
    "clean": _read_cleaned,
    "decontaminate": _read_decontaminated,
    "mine": _read_mined,
    "tokenise": _read_stored,
}
