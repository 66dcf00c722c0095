"""Rows that repeat a row: what is planted is found, nothing else is, whoever works and however often it is stopped."""

from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.data.naive_texts import SENTENCES, fold, jaccard

from f2llm.data import near_duplicates
from f2llm.data.near_duplicates import REASONS, REPEATS, duplicate_reasons, find_duplicates
from f2llm.data.parts import write_part
from f2llm.data.rows import Source, rows_table
from f2llm.engine import Engine, using
from f2llm.errors import F2Error
from f2llm.rng import generator

FACTS: dict[str, Any] = {"task": "t", "symmetric": False, "instruction": "i", "licence": "CC0-1.0"}
PAIRS = Source(name="pairs", format="retrieval", **FACTS)
KINDS = Source(name="kinds", format="clustering", **FACTS)

Row = tuple[str, str | None, str | None]  # query, positive, label


def write(folder: Path, rows: list[Row], size: int = 1000) -> Path:
    """A folder of rows in parts of `size`."""
    for number, at in enumerate(range(0, len(rows), size)):
        some = rows[at : at + size]
        table = rows_table(
            PAIRS,
            {
                "query": [query for query, _, _ in some],
                "positives": [[] if positive is None else [positive, "another"] for _, positive, _ in some],
                "label": [label for _, _, label in some],
                "query_lang": ["und"] * len(some),
            },
        )
        write_part(folder, number, table)
    return folder


def found(folder: Path, rows: list[Row], threshold: float = 0.8) -> list[tuple[int, str | None]]:
    """Of each row the one that it repeats and why."""
    find_duplicates([write(folder / "rows", rows)], folder / "work", threshold)
    reasons = duplicate_reasons(folder / "work", 0, len(rows)).to_pylist()
    return list(zip(np.load(folder / "work" / REPEATS).tolist(), reasons, strict=True))


KEPT = (-1, None)
CONTEXT = "The ferry crosses the wide river every morning and brings the farmers of the valley to town. " * 4


def variants(count: int) -> list[Row]:
    """Sentences of seven scripts with up to 3 characters replaced, as query, positive or both."""
    rng = generator(0, "variants")
    texts = list(SENTENCES.values())
    rows: list[Row] = []
    for _ in range(count):
        sides = []
        for _ in range(2):
            characters = list(texts[rng.integers(len(texts))])
            for place in rng.integers(len(characters), size=rng.integers(4)):
                characters[place] = "abc"[rng.integers(3)]
            sides.append("".join(characters))
        rows.append(
            (sides[0], sides[1], None) if rng.random() < 0.7 else (sides[0], None, "ab"[rng.integers(2)])
        )
    return rows


def test_planted_duplicates_are_found_in_every_script(tmp_path: Path) -> None:
    rows: list[Row] = []
    for text in SENTENCES.values():
        rows += [
            (text, "answer one", None),
            ("something else", text, None),
            (f"  {text.upper()}\t", "Answer  one", None),
            (text[:-1], "answer one", None),
            (text, None, "a"),
            (text[:20] + "#" + text[21:], None, "a"),
        ]
    exact, near = "exact duplicate", "near duplicate"
    got = found(tmp_path, rows)
    for at, lang in zip(range(0, len(rows), 6), SENTENCES, strict=True):
        expected = [KEPT, KEPT, (at, exact), (at, near), KEPT, (at + 4, near)]
        assert got[at : at + 6] == expected, lang


def test_both_texts_must_be_near_and_labels_equal(tmp_path: Path) -> None:
    rows: list[Row] = [
        ("when does the ferry cross the river", CONTEXT, None),
        ("who is brought to the market town", CONTEXT, None),
        (CONTEXT, "when does the ferry cross the river", None),
        (CONTEXT, "who is brought to the market town", None),
        (CONTEXT, None, "travel"),
        (CONTEXT, None, "food"),
        (CONTEXT + CONTEXT[:10], None, "food"),
    ]
    assert found(tmp_path, rows) == [KEPT] * 6 + [(5, "near duplicate")]


def test_short_and_empty_texts_are_compared_like_others(tmp_path: Path) -> None:
    rows: list[Row] = [
        ("yes", "no", None),
        ("no", "yes", None),
        ("Yes", "no", None),
        ("", "no", None),
        (" ", "no", None),
    ]
    assert found(tmp_path, rows) == [KEPT, KEPT, (0, "exact duplicate"), KEPT, (3, "exact duplicate")]


def test_the_first_of_a_chain_is_kept(tmp_path: Path) -> None:
    places = list(range(0, 160, 4))
    chain = [
        "".join("#" if n in places[:end] else c for n, c in enumerate(CONTEXT)) for end in range(0, 40, 4)
    ]
    assert jaccard(chain[0], chain[-1]) < 0.8 < min(jaccard(*pair) for pair in pairwise(chain))
    rows: list[Row] = [(text, "answer", None) for text in [chain[-1], *chain[:-1]]]
    assert found(tmp_path, rows) == [KEPT] + [(0, "near duplicate")] * (len(chain) - 1)


def test_against_all_pairs(tmp_path: Path) -> None:
    rows = variants(400)
    similar = cache(jaccard)
    repeats = [first for first, _ in found(tmp_path, rows)]
    cluster = [first if first >= 0 else row for row, first in enumerate(repeats)]

    def near(one: Row, other: Row) -> bool:
        if (one[1] is None) != (other[1] is None) or (one[1] is None and one[2] != other[2]):
            return False
        return all(similar(one[side] or "", other[side] or "") > 0.8 for side in (0, 1))

    pairs = [(a, b) for a, b in combinations(range(len(rows)), 2) if near(rows[a], rows[b])]
    assert len(pairs) > 200
    together = [cluster[a] == cluster[b] for a, b in pairs]
    assert np.mean(together) >= 0.95
    with_partner = {row for pair in pairs if cluster[pair[0]] == cluster[pair[1]] for row in pair}
    assert all(row in with_partner for row, first in enumerate(repeats) if first >= 0)
    assert all(first < row and repeats[first] == -1 for row, first in enumerate(repeats) if first >= 0)


def test_exact_duplicates_are_those_that_fold_to_the_same(tmp_path: Path) -> None:
    rng = generator(0, "exact")
    forms = ["Straße", "STRASSE", "straße ", "a  b", "A B", "a b\n", "x\x1fy", "x y", "é", "É"]
    rows: list[Row] = [(*rng.choice(forms, size=2).tolist(), None) for _ in range(200)]
    keys = [(fold(query), fold(positive or "")) for query, positive, _ in rows]
    expected = [keys.index(key) if keys.index(key) < row else -1 for row, key in enumerate(keys)]
    exact = [
        first if why == "exact duplicate" else -1 for first, why in found(tmp_path, rows, threshold=0.99)
    ]
    assert exact == expected


def test_parts_workers_and_stops_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = variants(300)
    whole = find_duplicates([write(tmp_path / "one", rows)], tmp_path / "whole")
    folders = [write(tmp_path / "two", rows[:190], size=50), write(tmp_path / "three", rows[190:], size=70)]

    compare = near_duplicates._compare

    def stopped(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(near_duplicates, "_compare", stopped)
    with using(Engine(workers=1)), pytest.raises(KeyboardInterrupt):
        find_duplicates(folders, tmp_path / "cut")
    monkeypatch.setattr(near_duplicates, "_compare", compare)
    signed = tmp_path / "cut" / "parts" / "00000" / "keys.npy"
    before = signed.stat().st_mtime_ns
    monkeypatch.setattr(near_duplicates, "GROUP_ROWS", 40)
    monkeypatch.setattr(near_duplicates, "SLICE", 16)
    monkeypatch.setattr(near_duplicates, "PAIRS", 64)
    monkeypatch.setattr(near_duplicates, "ROWS_OF_FILE", 37)
    with using(Engine(workers=1)):
        assert find_duplicates(folders, tmp_path / "cut") == whole
        assert find_duplicates(folders, tmp_path / "again") == whole
    assert signed.stat().st_mtime_ns == before
    for name in (REPEATS, REASONS):
        arrays = [np.load(tmp_path / work / name) for work in ("whole", "cut", "again")]
        assert np.array_equal(arrays[0], arrays[1]) and np.array_equal(arrays[0], arrays[2])


@pytest.mark.slow
def test_worker_processes_make_no_difference(tmp_path: Path) -> None:
    rows = variants(200)
    folder = write(tmp_path / "rows", rows, size=60)
    for workers in (1, 2):
        with using(Engine(workers=workers)):
            find_duplicates([folder], tmp_path / str(workers))
    assert np.array_equal(*(np.load(tmp_path / work / REPEATS) for work in "12"))


def test_a_folder_of_other_rows_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", variants(5))
    find_duplicates([folder], tmp_path / "work")
    with pytest.raises(F2Error, match="other rows or of another threshold"):
        find_duplicates([folder], tmp_path / "work", threshold=0.7)


def test_no_rows(tmp_path: Path) -> None:
    write_part(tmp_path / "rows", 0, rows_table(PAIRS, {"query": [], "query_lang": []}))
    assert find_duplicates([tmp_path / "rows"], tmp_path / "work") == {"rows": 0, "exact": 0, "near": 0}
    assert duplicate_reasons(tmp_path / "work", 0, 0) == pa.array([], pa.string())


def test_groups_hold_equal_keys_in_the_order_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "GROUP_ROWS", 100)
    keys = generator(0, "groups").integers(1 << 64, size=300, dtype=np.uint64)[
        generator(1).integers(300, size=1000)
    ]
    groups: dict[int, list[int]] = {}
    for rows, begin in near_duplicates._groups(keys):
        for row, first in zip(rows.tolist(), rows[begin].tolist(), strict=True):
            groups.setdefault(first, []).append(row)
    expected: dict[int, list[int]] = {}
    for row, key in enumerate(keys.tolist()):
        expected.setdefault(key, []).append(row)
    assert sorted(groups.values()) == sorted(expected.values())


def test_clusters_are_connected_components() -> None:
    rng = generator(0, "clusters")
    one, other = rng.integers(400, size=(2, 300))
    first = np.arange(400)
    near_duplicates._unite(first, one, other)
    expected = list(range(400))
    for _ in range(400):
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            expected[a] = expected[b] = min(expected[a], expected[b])
    assert first.tolist() == expected
