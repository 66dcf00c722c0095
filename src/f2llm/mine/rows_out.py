"""What mining leaves: the rows with their candidates, part by part, and some of them on a sheet to read.

Shape suffixes: B rows of a slice, C candidates, P candidates of all rows of a slice.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from f2llm.data.parts import DONE, KEPT, Part, Tally, read_part, write_part
from f2llm.data.rows import SCHEMA, row_hash
from f2llm.engine import map_items
from f2llm.files import read_json, write_json
from f2llm.mine.block import ROWS_AT_ONCE, Found, found_path
from f2llm.mine.pools import Pool
from f2llm.mine.report import Sample
from f2llm.mine.search import NO_DOCUMENT, Numbers
from f2llm.mine.texts import Corpus
from f2llm.rng import generator

SLICE_ROWS = 4096  # rows whose texts are strings at a time
PART_BYTES = 1 << 29  # of texts in a row group: a column of lists holds 2**31 at most


@dataclass(frozen=True)
class _Writing:
    number: int
    part: Part
    corpus: Corpus
    pools: tuple[Path, ...]
    keep_given: bool
    out: Path


def write_rows_out(
    found: Sequence[Part], corpus: Corpus, pools: Sequence[Path], keep_given: bool, out: Path
) -> Tally:
    """Write all rows, and how many there are of each source and language."""
    items = [_Writing(n, part, corpus, tuple(pools), keep_given, out) for n, part in enumerate(found)]
    tally: Tally = defaultdict(lambda: defaultdict(Counter))
    changed = 0
    for facts in map_items(_write_part, items, what="write rows"):
        changed += facts["changed"]
        for source, language, rows in facts["rows"]:
            tally[source][language][KEPT] += rows
    write_json(out / "tally.json", {"rows": tally, "changed": {"mined for": changed}})
    return tally


def _write_part(item: _Writing) -> dict[str, Any]:
    done = item.out / DONE / f"{item.number:05}.json"
    if done.exists():
        return dict(read_json(done))
    table = read_part(item.part, SCHEMA.names)
    is_mined = np.zeros(table.num_rows, bool)
    mined: Numbers = np.empty((table.num_rows, 0), np.int64)
    for row, text_BC in _found_in(item):
        if mined.shape[1] == 0:
            mined = np.full((table.num_rows, text_BC.shape[1]), NO_DOCUMENT)
        mined[row], is_mined[row] = text_BC, True
    waiting: list[pa.Table] = []
    written = 0
    for first in range(0, table.num_rows, SLICE_ROWS):
        rows = slice(first, first + SLICE_ROWS)
        piece = table.slice(first, SLICE_ROWS)
        waiting.append(_with_negatives(piece, item.corpus, mined[rows], is_mined[rows], item.keep_given))
        if sum(one.nbytes for one in waiting) > PART_BYTES or first + SLICE_ROWS >= table.num_rows:
            write_part(item.out, (item.number, written), pa.concat_tables(waiting))
            waiting, written = [], written + 1
    counts = Counter(zip(table["source"].to_pylist(), table["query_lang"].to_pylist(), strict=True))
    facts = {"rows": [[*key, rows] for key, rows in sorted(counts.items())], "changed": int(is_mined.sum())}
    write_json(done, facts)
    return facts


def _found_in(item: _Writing) -> Iterator[tuple[Numbers, Numbers]]:
    """Rows of the part and their candidates, block by block."""
    for folder in item.pools:
        pool = Pool.load(folder)
        low, high = np.searchsorted(pool.part, [item.number, item.number + 1]).tolist()
        for first in range(low - low % ROWS_AT_ONCE, high, ROWS_AT_ONCE):
            start, stop = max(low, first), min(high, first + ROWS_AT_ONCE)
            if start < stop:
                found = Found.load(found_path(folder, first))
                yield np.asarray(pool.row[start:stop]), found.text_BC[start - first : stop - first]


def _with_negatives(
    table: pa.Table, corpus: Corpus, text_BC: Numbers, is_mined_B: npt.NDArray[np.bool_], keep_given: bool
) -> pa.Table:
    """The rows with their candidates; those that were not mined for stay as they are."""
    row_P, rank_P = np.nonzero(text_BC != NO_DOCUMENT)
    texts = corpus.texts(text_BC[row_P, rank_P]).to_pylist() if len(row_P) else []
    columns = table.to_pydict()
    negatives = [
        given if keep_given or not is_mined else []
        for given, is_mined in zip(columns["negatives"], is_mined_B.tolist(), strict=True)
    ]
    for row, text in zip(row_P.tolist(), texts, strict=True):
        negatives[row].append(text)
    columns["negatives"] = negatives
    hashed = ("query", "positives", "negatives", "label", "source")
    hashes = [row_hash(*row) for row in zip(*(columns[name] for name in hashed), strict=True)]
    columns["hash"] = np.where(is_mined_B, hashes, columns["hash"]).tolist()
    return pa.table(columns, schema=SCHEMA)


# --- The sheet to read


def draw_samples(
    count: int,
    seed: int,
    corpus: Corpus,
    pools: Sequence[Path],
    prefixes: Mapping[str, str],
    languages: Sequence[str],
) -> Iterator[Sample]:
    """`count` rows of each source, or as many as it has, in the order of the rows."""
    for number, (source, prefix) in enumerate(prefixes.items()):
        rows_of = [np.flatnonzero(np.load(pool / "source.npy", mmap_mode="r") == number) for pool in pools]
        starts = np.concatenate([[0], np.cumsum([len(rows) for rows in rows_of])])
        drawn = generator(seed, "samples", source).permutation(int(starts[-1]))[:count]
        for place in np.sort(drawn).tolist():
            which = int(np.searchsorted(starts, place, side="right")) - 1
            row = int(rows_of[which][place - starts[which]])
            yield _sample(source, prefix, corpus, pools[which], row, languages)


def _sample(
    source: str, prefix: str, corpus: Corpus, folder: Path, row: int, languages: Sequence[str]
) -> Sample:
    pool, found = Pool.load(folder), Found.load(found_path(folder, row))
    place = row % ROWS_AT_ONCE
    texts = found.text_BC[place][found.text_BC[place] != NO_DOCUMENT]
    positives = pool.positive[pool.positive_starts[row] : pool.positive_starts[row + 1]]
    return Sample(
        source=source,
        language=languages[pool.language[row]],
        query=corpus.texts(pool.query[row : row + 1])[0].as_py()[len(prefix) :],
        positives=corpus.texts(positives).to_pylist(),
        positive_score=float(found.positive_B[place]),
        mined=list(zip(corpus.texts(texts).to_pylist(), found.score_BC[place].tolist(), strict=False)),
    )
