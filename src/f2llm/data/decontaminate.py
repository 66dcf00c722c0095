"""Test texts out of training data: rows that hold one go, negatives that are one are taken off their lists.

test sets -> tables (`f2llm.data.contamination`) -> rows part by part: a row is dropped where its query or one of its
positives hits -> a folder of rows, what was rejected and why, a report that goes where the rows go, and sample pairs to
judge the judge by, which stay, since they show test texts.
"""

import hashlib
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from f2llm.data.contamination import METHODS, Shard, build_shards, judge, open_shards
from f2llm.data.folded import fold, starts_of
from f2llm.data.held_out import Batch, held_out_texts
from f2llm.data.parts import KEPT, REJECT_SCHEMA, REJECTS, Sifted, Tally, carry_decontamination, sift
from f2llm.data.rows import SCHEMA, row_hash
from f2llm.files import read_json, write_json
from f2llm.recipe_corpus import DecontaminateStage, Limits

SAMPLES_FILE = "samples.json"
SHARDS = "held_out"  # folder of tables, gone when the stage is done
SLICE = 1 << 12  # rows judged at a time
SAMPLES = 3  # pairs shown of each source, test set and method
SHOWN = 400  # characters of a text in a sample


class Judge(NamedTuple):
    """All that decides on a text; small, so that it can be sent to workers."""

    shards: str  # the folder
    limits: Limits
    methods: tuple[str, ...]

    def reasons(self, texts: pa.Array) -> "Reasons":
        """Of each text; equal ones are looked at once."""
        encoded = pc.dictionary_encode(pc.fill_null(texts, ""))
        shards = _shards(self.shards)
        hits = judge(fold(encoded.dictionary), shards, self.limits, self.methods)
        found = np.flatnonzero(hits.methods_T < len(METHODS))
        tests = list(zip(hits.shards_T[found].tolist(), hits.tests_T[found].tolist(), strict=True))
        keys = [
            (int(method), shards[shard].sets[test])
            for method, (shard, test) in zip(hits.methods_T[found], tests, strict=True)
        ]
        known = sorted(set(keys))
        numbers = np.full(len(encoded.dictionary), len(known))
        numbers[found] = [known.index(key) for key in keys]
        by_text = dict(zip(encoded.dictionary.take(pa.array(found)).to_pylist(), tests, strict=True))
        return Reasons(
            numbers[encoded.indices.to_numpy()], [f"{METHODS[m]}: {name}" for m, name in known], by_text
        )

    def test_text(self, shard: int, test: int) -> str:
        return _shards(self.shards)[shard].texts.slice(test, test + 1).strings()[0]


class Reasons(NamedTuple):
    """Why texts are not for training."""

    numbers_T: npt.NDArray[np.int64]  # into names; one past the last where there is no reason
    names: list[str]  # "exact: xquad.jsonl", the surest method first
    tests: dict[str, tuple[int, int]]  # text that hit -> shard and number of the test text


@cache
def _shards(folder: str) -> list[Shard]:
    return open_shards(Path(folder))


def decontaminate_stage(config: DecontaminateStage, folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Sift the rows of `folders` into `out`, and write DECONTAMINATION and SAMPLES_FILE there.

    Returns rows kept, and how many were contaminated.
    """
    built = out / SHARDS / "built.json"
    if not built.exists():
        sums: Counter[str] = Counter()
        texts = _summed(held_out_texts(config.against, config.mteb_tasks), sums)
        counts = build_shards(texts, out / SHARDS, config.limits)
        write_json(
            built, {name: {**count, "content": _hexadecimal(sums[name])} for name, count in counts.items()}
        )
    judged_by = Judge(str(out / SHARDS), config.limits, tuple(config.methods))
    tally = sift(folders, out, partial(decontaminate, judged_by), what="look for test texts")
    rows = _by_source(tally)
    report = {
        "methods": config.methods,
        "limits": config.limits.model_dump(),
        "test_sets": read_json(built),
        "rows": rows,
        "negatives_removed": _negatives_removed(read_json(out / "tally.json")["changed"]),
    }
    carry_decontamination(folders, out, report)
    write_json(out / SAMPLES_FILE, _samples(out, judged_by))
    built.unlink()  # first: what a kill leaves of the folder is then made anew
    shutil.rmtree(out / SHARDS)
    return {
        "rows": sum(source["kept"] for source in rows.values()),
        "contaminated": sum(source["read"] - source["kept"] for source in rows.values()),
    }


def _summed(batches: Iterable[Batch], sums: Counter[str]) -> Iterator[Batch]:
    """The batches; meanwhile the SHA-256 of all texts of each test set are added up, in whatever order they come."""
    for batch in batches:
        digests = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in batch.texts)
        sums[batch.name] += sum(int.from_bytes(digest) for digest in digests)
        yield batch


def _hexadecimal(total: int) -> str:
    """A sum of SHA-256 modulo 2^256, in 64 digits."""
    return f"{total % (1 << 256):064x}"


def decontaminate(judge: Judge, table: pa.Table) -> Sifted:
    """The rows of a part whose query and positives hold no test text, their negatives without those that do."""
    sifted = [_sift_rows(judge, table.slice(at, SLICE)) for at in range(0, max(len(table), 1), SLICE)]
    changed = sum((Counter(some.changed) for some in sifted), Counter())
    kept, rejected = (
        pa.concat_tables([getattr(some, name) for some in sifted]) for name in ("kept", "rejected")
    )
    return Sifted(kept, rejected, changed)


def _sift_rows(judge: Judge, table: pa.Table) -> Sifted:
    query, positives, negatives = (
        table[name].combine_chunks() for name in ("query", "positives", "negatives")
    )
    counts = [column.value_lengths().to_numpy() for column in (positives, negatives)]
    reasons = judge.reasons(pa.concat_arrays([query, positives.flatten(), negatives.flatten()]))
    of_query, of_positives, of_negatives = np.split(
        reasons.numbers_T, np.cumsum([len(query), counts[0].sum()])
    )
    numbers_R = of_query.copy()
    np.minimum.at(numbers_R, np.repeat(np.arange(len(table)), counts[0]), of_positives)
    none = len(reasons.names)
    named = pa.array([*reasons.names, None], pa.string()).take(pa.array(numbers_R))
    rejected = table.append_column(REJECT_SCHEMA.field("reason"), named).filter(pa.array(numbers_R < none))
    row_of = np.repeat(np.arange(len(table)), counts[1])
    goes = (of_negatives < none) & (numbers_R[row_of] == none)
    sources, languages = (table[name].to_pylist() for name in ("source", "query_lang"))
    changed = Counter(
        "\t".join((sources[row], languages[row], reasons.names[number]))
        for row, number in zip(row_of[goes].tolist(), of_negatives[goes].tolist(), strict=True)
    )
    shorter = _without(table, negatives, goes, row_of) if changed else table
    return Sifted(shorter.filter(pa.array(numbers_R == none)), rejected.cast(REJECT_SCHEMA), changed)


def _without(
    table: pa.Table, negatives: pa.ListArray, goes: npt.NDArray[np.bool_], row_of: npt.NDArray[np.int64]
) -> pa.Table:
    """The rows without these of their negatives, named anew."""
    left = np.bincount(row_of[~goes], minlength=len(table))
    offsets = pa.array(starts_of(left).astype(np.int32))
    lists = pa.ListArray.from_arrays(offsets, negatives.flatten().filter(pa.array(~goes)))
    hashes = table["hash"].to_pylist()
    rows = np.unique(row_of[goes])
    for row, new in zip(rows.tolist(), table.take(pa.array(rows)).to_pylist(), strict=True):
        kept = lists[row].as_py()
        hashes[row] = row_hash(new["query"], new["positives"], kept, new["label"], new["source"])
    columns = {
        **dict(zip(table.column_names, table.columns, strict=True)),
        "negatives": lists,
        "hash": hashes,
    }
    return pa.table(columns, schema=SCHEMA)


def _by_source(tally: Tally) -> dict[str, dict[str, Any]]:
    """Of each source, rows read and kept, and those contaminated by test set and method."""
    found: dict[str, dict[str, Any]] = {}
    for source, languages in tally.items():
        counts = sum(languages.values(), Counter())
        by_set: dict[str, dict[str, int]] = defaultdict(dict)
        for reason in sorted(set(counts) - {KEPT}):
            method, _, name = reason.partition(": ")
            by_set[name][method] = counts[reason]
        found[source] = {"read": counts.total(), "kept": counts[KEPT], "contaminated": by_set}
    return found


def _negatives_removed(changed: dict[str, int]) -> dict[str, Any]:
    """Of each source by test set and method, from counts by source, language and reason."""
    found: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for key, negatives in sorted(changed.items()):
        source, _, reason = key.split("\t", 2)
        method, _, name = reason.partition(": ")
        found[source][name][method] += negatives
    return found


def _samples(out: Path, judge: Judge) -> list[dict[str, str]]:
    """Some pairs of a training text and the test text that it holds, of each source, test set and method."""
    taken: Counter[tuple[str, str]] = Counter()
    samples = []
    for file in sorted((out / REJECTS).glob("part-*.parquet")):
        keys = pq.read_table(file, columns=["source", "reason"]).to_pydict()
        chosen = []
        for row, key in enumerate(zip(keys["source"], keys["reason"], strict=True)):
            taken[key] += 1
            if taken[key] <= SAMPLES:
                chosen.append(row)
        if chosen:
            table = pq.read_table(file).take(chosen)
            samples += [_sample(judge, row) for row in table.to_pylist()]
    return samples


def _sample(judge: Judge, row: dict[str, Any]) -> dict[str, str]:
    texts = [row["query"], *row["positives"]]
    reasons = judge.reasons(pa.array(texts, pa.string()))
    text = texts[int(reasons.numbers_T.argmin())]
    method, _, name = row["reason"].partition(": ")
    shown = {"training_text": text[:SHOWN], "test_text": judge.test_text(*reasons.tests[text])[:SHOWN]}
    return {"source": row["source"], "test_set": name, "method": method, **shown}
