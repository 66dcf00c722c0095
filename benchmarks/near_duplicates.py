"""Finding duplicates, ours against datasketch: speed, how many are found and rightly so, and memory with many rows.

Rows are pairs of the development data's retrieval files, repeated in random order with a few characters replaced, left
out or put in. datasketch gets the same shingles, made in the fastest way that Python has, the same bands and rows, a
fast hash (CRC-32) and as many processes as ours. For the same quality its candidates have to be compared exactly, as
ours does, here by sorted arrays of hashes; its time without that, at a lower precision, is a figure of its own. What
is right is decided by a join on sets of strings that shares no code with ours: every pair whose
prefixes by rarity meet is compared (Bayardo, Ma and Srikant, 2007).
"""

import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from f2llm.data.minhash import SHINGLE, WIDE_SHINGLE, plan
from f2llm.data.near_duplicates import REPEATS, find_duplicates
from f2llm.data.parts import parts, read_part, write_part
from f2llm.data.rows import SCHEMA
from f2llm.engine import Engine, using
from f2llm.files import ROWS_IN_A_GROUP
from f2llm.rng import generator
from harness import SHARED, Figure, Part, PeerMissing, Row, measured, skipped

FIRST_WIDE = "\u2e80"
WIDE_CHARACTER = re.compile("[\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff]")
THRESHOLD = 0.8
COPIES = 3  # of an original on average, where there are enough originals
WORKERS = 2
EDITED = (0.0, 0.002, 0.01, 0.02, 0.03)  # shares of characters, one drawn for each row
SYNTHETIC = ["water mountain to read between", "вода гора читать между семь", "水山读书之间七傍晚很快道路"]

SPEED = Row("rows/s of finding duplicates, peer datasketch with its candidates compared", bar=5)
SPEED_OF_CANDIDATES = Row("rows/s of finding duplicates, peer datasketch with its candidates as they are")
RECALL = Row("share of near texts in one cluster", bar=0.95)
PAIRS_RECALL = Row("share of near rows of query and positive in one cluster", bar=0.95)
PEER_RECALL = Row("share of near texts in one cluster, datasketch")
PRECISION = Row("share of duplicates found that have a near text in their cluster", bar=0.99)
PAIRS_PRECISION = Row("share of duplicates found that have a near row in their cluster", bar=0.99)
PEER_PRECISION = Row("share of duplicates found that have a near text in their cluster, datasketch")
DIRECT = Row("share of duplicates found that are near the very text they repeat")
MEMORY = Row("peak memory in GB of finding duplicates, all processes", bar=1.5, better="lower")
ROWS_PER_SECOND = Row("rows/s of finding duplicates among many rows")


def speed(folder: Path, rows: int) -> Part:
    """Rows of one text each (query and positive joined), by ours and by datasketch, `WORKERS` processes each."""
    make_rows(folder / "rows", rows, joined=True)
    ours = _alone("ours", folder / "rows", folder / "work")
    inputs = {"speed": {"rows": rows, **_describe(folder / "rows")}}
    workers, figures = {"ours": ours}, []
    for row, who in ((SPEED, "datasketch"), (SPEED_OF_CANDIDATES, "datasketch, candidates alone")):
        try:
            workers[who] = _alone(who, folder / "rows", folder / "peer.npy")
            figures.append(measured(row, rows / ours["seconds"], rows / workers[who]["seconds"]))
        except PeerMissing as missing:
            figures.append(skipped(row, str(missing)))
    return Part(figures, inputs, workers)


def quality(folder: Path, rows: int, joined: bool) -> Part:
    """What is found among `rows` rows, beside all that there is."""
    make_rows(folder / "rows", rows, joined)
    _alone("ours", folder / "rows", folder / "work")
    near = exact_pairs(folder / "rows")
    bars = (RECALL, PRECISION) if joined else (PAIRS_RECALL, PAIRS_PRECISION)
    figures = _quality(np.load(folder / "work" / REPEATS), near, *bars)
    if joined:
        try:
            _alone("datasketch", folder / "rows", folder / "peer.npy")
            figures += _quality(np.load(folder / "peer.npy"), near, PEER_RECALL, PEER_PRECISION)
        except PeerMissing as missing:
            figures += [skipped(PEER_RECALL, str(missing)), skipped(PEER_PRECISION, str(missing))]
    name = "quality, texts" if joined else "quality, pairs"
    return Part(figures, {name: {"rows": rows, "near_pairs": len(near), **_describe(folder / "rows")}}, {})


def _quality(
    repeats: np.ndarray[Any, Any], near: set[tuple[int, int]], recall: Row, precision: Row
) -> list[Figure]:
    cluster = np.where(repeats < 0, np.arange(len(repeats)), repeats)
    found = sum(bool(cluster[one] == cluster[other]) for one, other in near)
    partners = {row for pair in near if cluster[pair[0]] == cluster[pair[1]] for row in pair}
    duplicates = np.flatnonzero(repeats >= 0).tolist()
    figures = [
        measured(recall, found / max(len(near), 1)),
        measured(precision, sum(row in partners for row in duplicates) / max(len(duplicates), 1)),
    ]
    if recall is RECALL:
        direct = sum((int(repeats[row]), row) in near for row in duplicates)
        figures.append(measured(DIRECT, direct / max(len(duplicates), 1)))
    return figures


def memory(folder: Path, rows: int) -> Part:
    """Peak memory of all processes of ours together, and the speed, with many rows of query and positive."""
    make_rows(folder / "rows", rows, joined=False)
    ours = _alone("ours", folder / "rows", folder / "work")
    figures = [measured(MEMORY, ours["gigabytes"]), measured(ROWS_PER_SECOND, rows / ours["seconds"])]
    return Part(figures, {"memory": {"rows": rows, **_describe(folder / "rows")}}, {"ours, many rows": ours})


def make_rows(out: Path, rows: int, joined: bool) -> None:
    """A folder of rows: pairs of the development data with small edits; `joined`, as texts that share a label."""
    originals = _originals(max(rows // COPIES, 1))
    for number, first in enumerate(range(0, rows, ROWS_IN_A_GROUP)):
        rng = generator(0, "near duplicates", number)
        count = min(ROWS_IN_A_GROUP, rows - first)
        # Half of the rows go through the data in turn, half are drawn: so most have a few copies, some have many.
        drawn = rng.integers(len(originals), size=count)
        chosen = np.where(rng.random(count) < 0.5, drawn, (first + np.arange(count)) % len(originals))
        rates = rng.choice(EDITED, size=count)
        pairs = [
            [_edited(text, rate, rng) for text in originals[row]]
            for row, rate in zip(chosen.tolist(), rates.tolist(), strict=True)
        ]
        write_part(out, number, _table(pairs, joined))


def _originals(count: int) -> list[tuple[str, str]]:
    """At most `count` pairs of the development data, in random order; of no meaning where that is absent."""
    files = sorted((SHARED / "data" / "retrieval").glob("*.parquet"))
    tables = [pq.read_table(file, columns=["query", "positive"]) for file in files]
    pairs = [pair for table in tables for pair in zip(*table.to_pydict().values(), strict=True)]
    if not pairs:
        texts = [f"{text} {number} {number * 7919 % 1000}" for number in range(5000) for text in SYNTHETIC]
        pairs = [(text, text[::-1]) for text in texts]
    order = generator(0, "originals").permutation(len(pairs))[:count]
    return [pairs[row] for row in order.tolist()]


def _edited(text: str, rate: float, rng: np.random.Generator) -> str:
    edits = rng.binomial(len(text), rate)
    if not edits:
        return text
    characters = list(text)
    for place, kind in zip(rng.integers(len(text), size=edits), rng.integers(3, size=edits), strict=True):
        characters[place] = ("", "o", characters[place] + "e")[kind]
    return "".join(characters)


def _table(pairs: list[list[str]], joined: bool) -> pa.Table:
    columns = {
        "query": ["\n".join(pair) if joined else pair[0] for pair in pairs],
        "positives": [[] if joined else [pair[1]] for pair in pairs],
        "negatives": [[]] * len(pairs),
        "label": ["one" if joined else None] * len(pairs),
    }
    rest = {name: [name] * len(pairs) for name in SCHEMA.names if name not in columns}
    return pa.table({**columns, **rest}, schema=SCHEMA)


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Query and first positive of each row."""
    for part in parts(folder):
        table = read_part(part, ["query", "positives"])
        for query, positives in zip(table["query"].to_pylist(), table["positives"].to_pylist(), strict=True):
            yield query, positives[0] if positives else ""


def _describe(folder: Path) -> dict[str, float]:
    lengths = [len(query) + len(positive) for query, positive in _texts(folder)]
    return {"characters_per_row": round(sum(lengths) / len(lengths), 1)}


def shingle_set(text: str) -> set[str]:
    """What ours hashes, as strings: made apart."""
    folded = " ".join("".join(_folded(character) for character in text).split())
    return {folded[i : i + (WIDE_SHINGLE if _is_wide(c) else SHINGLE)] for i, c in enumerate(folded)}


def _folded(character: str) -> str:
    return min(
        character.casefold(),
        character.lower(),
        key=lambda folded: (len(folded) != 1, folded != character.casefold()),
    )


def _is_wide(character: str) -> bool:
    code = ord(character)
    return 0x2E80 <= code <= 0xA4CF or 0xAC00 <= code <= 0xD7A3 or 0xF900 <= code <= 0xFAFF or code >= 0x20000


def exact_pairs(folder: Path) -> set[tuple[int, int]]:
    """All pairs of rows whose queries and whose positives have a Jaccard similarity above THRESHOLD."""
    fields = [(shingle_set(query), shingle_set(positive)) for query, positive in _texts(folder)]
    # The similarity of the union of both fields, kept apart by a mark, is at least the lower one of the two.
    both = [{("q", one) for one in query} | {("p", one) for one in positive} for query, positive in fields]
    frequency = Counter(one for row in both for one in row)
    postings: dict[tuple[str, str], list[int]] = defaultdict(list)
    near = set()
    for row, marks in enumerate(both):
        rarest = sorted(marks, key=lambda mark: (frequency[mark], mark))
        prefix = rarest[: len(marks) - math.ceil(THRESHOLD * len(marks)) + 1]
        candidates = {other for mark in prefix for other in postings[mark]}
        for mark in prefix:
            postings[mark].append(row)
        for other in candidates:
            shorter, longer = sorted((len(both[other]), len(marks)))
            if shorter >= THRESHOLD * longer and all(map(_near, fields[row], fields[other])):
                near.add((other, row))
    return near


def _near(one: set[str], other: set[str]) -> bool:
    common = len(one & other)
    return not (one or other) or common > THRESHOLD * (len(one) + len(other) - common)


def _alone(who: str, rows: Path, out: Path) -> dict[str, Any]:
    """Seconds and peak memory of one contender in a process of its own."""
    command = [sys.executable, __file__, who, str(rows), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.05)
        answer = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise PeerMissing(f"{who} ended with exit code {process.returncode}")
    facts = {**json.loads(answer.splitlines()[-1]), "gigabytes": peak / 2**30}
    print(f"{who}: {facts}", flush=True)
    return facts


def _resident(process: int) -> int:
    """Bytes of a process and of those that it started; what they share counts once for each."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(_resident(int(child)) for child in children)


def _find_ours(rows: Path, out: Path) -> dict[str, int]:
    with using(Engine(workers=WORKERS)):
        return find_duplicates([rows], out, THRESHOLD)


def fast_shingles(text: str) -> set[str]:
    """The same shingles as fast as Python makes them; case is folded a little more than ours does."""
    folded = " ".join(text.casefold().split())
    if not WIDE_CHARACTER.search(folded):
        return {folded[i : i + SHINGLE] for i in range(len(folded))}
    return {
        folded[i : i + (WIDE_SHINGLE if c >= FIRST_WIDE and _is_wide(c) else SHINGLE)]
        for i, c in enumerate(folded)
    }


def _sign_for_datasketch(texts: list[str]) -> list[tuple[Any, Any]]:
    """The MinHash of each text, and its sorted hashed shingles to compare candidates by."""
    import datasketch  # type: ignore[import-untyped]

    bands = plan(THRESHOLD)
    sets = [[shingle.encode() for shingle in fast_shingles(text)] for text in texts]
    hashes = datasketch.MinHash.bulk(sets, num_perm=bands.bands * bands.rows, hashfunc=zlib.crc32)
    compared = [np.unique(np.array([zlib.crc32(one) for one in some], np.uint32)) for some in sets]
    return [(datasketch.LeanMinHash(one), some) for one, some in zip(hashes, compared, strict=True)]


def _similar(one: Any, other: Any) -> bool:
    shorter, longer = sorted((len(one), len(other)))
    if shorter < THRESHOLD * longer:
        return False
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common > THRESHOLD * (shorter + longer - common)


def _find_datasketch(rows: Path, out: Path, compare: bool) -> dict[str, Any]:
    """What a row's candidates join is a cluster, if `compare` only those that are near; none is compared needlessly."""
    import datasketch

    bands = plan(THRESHOLD)
    index = datasketch.MinHashLSH(num_perm=bands.bands * bands.rows, params=tuple(bands))
    texts = [query for query, _ in _texts(rows)]
    first = list(range(len(texts)))
    sets: list[Any] = []

    def root(row: int) -> int:
        while first[row] != row:
            first[row] = first[first[row]]
            row = first[row]
        return row

    chunks = [texts[at : at + 1000] for at in range(0, len(texts), 1000)]
    row = 0
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        for signed in pool.imap(_sign_for_datasketch, chunks):
            for sketch, shingles in signed:
                for other in index.query(sketch):
                    low, high = sorted((root(other), root(row)))
                    if low != high and (not compare or _similar(sets[other], shingles)):
                        first[high] = low
                index.insert(row, sketch, check_duplication=False)
                if compare:
                    sets.append(shingles)
                row += 1
    repeats = [-1 if root(row) == row else root(row) for row in range(len(texts))]
    np.save(out, np.array(repeats))
    return {"rows": len(texts), "near": sum(row >= 0 for row in repeats)}


CONTENDERS: dict[str, Callable[[Path, Path], dict[str, int]]] = {
    "ours": _find_ours,
    "datasketch": partial(_find_datasketch, compare=True),
    "datasketch, candidates alone": partial(_find_datasketch, compare=False),
}


def contend(who: str, rows: Path, out: Path) -> None:
    """Print the facts of one contender's work; the process ends with 3 where its library is missing."""
    try:
        began = time.perf_counter()
        facts = CONTENDERS[who](rows, out)
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(3)
    print(json.dumps({**facts, "seconds": time.perf_counter() - began}))


def near_duplicates(folder: Path, small: bool) -> list[Part]:
    """All four comparisons, each in a folder of its own below `folder`."""
    rows, sample, many = (2000, 1000, 3000) if small else (1_000_000, 50_000, 8_000_000)
    return [
        speed(folder / "speed", rows),
        quality(folder / "joined", sample, joined=True),
        quality(folder / "apart", sample, joined=False),
        memory(folder / "memory", many),
    ]


if __name__ == "__main__":  # a contender, in a process of its own (`_alone`)
    contend(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
