"""Batches as a pure function of (seed, step): what is in them, and what never is."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from f2llm.data.rows import Source, read_rows, rows_table
from f2llm.errors import F2Error, UsageError
from f2llm.train.sampler import Batch, Sampler, load_sources, source_schedule

FORMATS = ["retrieval", "clustering", "classification"]
COUNTS = {"retrieval": 2, "clustering": 3, "classification": 1}
PREFIX = "Instruct: {}\nQuery: "


def source(name: str, format: Any = "retrieval", symmetric: bool = True) -> Source:
    return Source(
        name=name,
        format=format,
        task="t",
        symmetric=symmetric,
        instruction=f"Do {name}",
        licence="CC0-1.0",
    )


def retrieval(count: int, name: str = "pairs", **changes: Any) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "query": [f"{name} q{i}" for i in range(count)],
        "positives": [[f"{name} p{i}", f"{name} r{i}"] for i in range(count)],
        "negatives": [[f"{name} n{i}.{k}" for k in range(3)] for i in range(count)],
        "query_lang": ["und"] * count,
        **changes,
    }
    return rows_table(source(name), columns)


def labelled(format: str, labels: list[str], name: str) -> tuple[pa.Table, Source]:
    count = len(labels)
    columns = {"query": [f"{name} {i}" for i in range(count)], "label": labels, "query_lang": ["und"] * count}
    one = source(name, format)
    return rows_table(one, columns), one


def sampler(table: pa.Table, sources: list[Source], **changes: Any) -> Sampler:
    settings: dict[str, Any] = {
        "seed": 3,
        "steps": 40,
        "batch_size": 8,
        "hard_negatives": COUNTS,
        "instructions": False,
        "document_instruction_rate": 0.3,
        **changes,
    }
    return Sampler(load_sources(table, sources, FORMATS), **settings)


def every(batches: Sampler) -> list[Batch]:
    return [batches[step] for step in range(len(batches))]


def words(batch: Batch, rows: np.ndarray) -> list[str]:
    return [batch.texts[row] for row in rows.ravel()]


def content(batch: Batch) -> tuple[Any, ...]:
    arrays = (batch.query_B, batch.positive_B, batch.negative_BK, batch.same_BB, batch.known_P2)
    return (batch.source, tuple(batch.texts), *(a.tobytes() + str(a.shape).encode() for a in arrays))


# --- A pure function of (seed, step)


def test_batches_depend_on_seed_and_step_alone(rows_folder: Path) -> None:
    """A new object each, asked in a random order, gives what one object gives in order."""
    table, sources = read_rows(rows_folder)
    changes = {"instructions": True, "steps": 12}
    straight = sampler(table, sources, **changes)
    expected = [content(straight[step]) for step in range(12)]
    for step in np.random.default_rng(0).permutation(12):
        assert content(sampler(table, sources, **changes)[int(step)]) == expected[step]
    assert len(set(expected)) == 12
    other = sampler(table, sources, **changes, seed=4)
    assert all(content(other[step]) != expected[step] for step in range(12))


def test_every_row_comes_once_an_epoch() -> None:
    batches = sampler(retrieval(20), [source("pairs")], steps=15, batch_size=8)  # 6 epochs of 2.5 batches
    drawn = [text for step in range(15) for text in words(batches[step], batches[step].query_B)]
    epochs = [drawn[start : start + 20] for start in range(0, 120, 20)]
    assert all(sorted(epoch) == sorted(f"pairs q{i}" for i in range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_schedule_gives_each_source_its_exact_share() -> None:
    schedule = source_schedule([600, 300, 100], 50, seed=1)
    assert np.bincount(schedule).tolist() == [30, 15, 5]
    assert not np.array_equal(schedule, np.sort(schedule))
    assert np.array_equal(schedule, source_schedule([600, 300, 100], 50, seed=1))
    assert not np.array_equal(schedule, source_schedule([600, 300, 100], 50, seed=2))


@pytest.mark.parametrize("steps", [1, 7, 11, 100])
def test_schedule_is_never_off_by_a_whole_step(steps: int) -> None:
    sizes = np.array([5.0, 3.0, 3.0, 0.0, 1.0])
    counts = np.bincount(source_schedule(list(sizes), steps, seed=0), minlength=5)
    assert counts.sum() == steps and counts[3] == 0
    assert np.abs(counts - sizes / sizes.sum() * steps).max() < 1


def test_source_weights_multiply_the_number_of_rows() -> None:
    table = pa.concat_tables([retrieval(30, "many"), retrieval(10, "few")])
    sources = [source("many"), source("few")]

    def shares(weights: dict[str, float]) -> Counter[str]:
        batches = sampler(table, sources, source_weights=weights)
        return Counter(batches[step].source for step in range(40))

    assert shares({}) == {"many": 30, "few": 10}
    assert shares({"few": 3.0}) == {"many": 20, "few": 20}
    assert shares({"many": 0.0}) == {"few": 40}


def test_another_process_makes_the_same_batches(rows_folder: Path) -> None:
    """Python mixes the order of sets anew in every process; no batch may depend on it."""
    code = (
        "import hashlib, sys; from pathlib import Path; from f2llm.data.rows import read_rows\n"
        "from f2llm.train.sampler import Sampler, load_sources\n"
        "rows = load_sources(*read_rows(Path(sys.argv[1])), ['retrieval', 'clustering', 'classification'])\n"
        f"counts = {COUNTS}\n"
        "batches = Sampler(rows, seed=3, steps=12, batch_size=8, hard_negatives=counts, instructions=True,\n"
        "                  document_instruction_rate=0.3)\n"
        "print(hashlib.sha256(repr([(b.source, b.texts, *(a.tolist() for a in (b.query_B, b.positive_B, b.negative_BK,"
        " b.same_BB, b.known_P2))) for b in batches]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(rows_folder)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1 and len(digests.pop().strip()) == 64


# --- What a batch holds


def test_texts_are_distinct_and_roles_point_to_them() -> None:
    repeated = retrieval(9, positives=[["same"]] * 9, negatives=[["same", "n", "m"]] * 9)
    batch = sampler(repeated, [source("pairs")], batch_size=9)[0]
    assert len(set(batch.texts)) == len(batch.texts)
    assert set(words(batch, batch.positive_B)) == {"same"}
    assert batch.query_B.shape == batch.positive_B.shape == (9,)
    assert batch.negative_BK.shape == (9, 2) and batch.same_BB.shape == (9, 9)


def test_retrieval_draws_from_the_rows_own_texts() -> None:
    batches = sampler(retrieval(20), [source("pairs")])
    drawn = set()
    for step in range(40):
        batch = batches[step]
        assert batch.in_batch
        for i, text in enumerate(words(batch, batch.query_B)):
            number = text.removeprefix("pairs q")
            positive, negatives = batch.texts[batch.positive_B[i]], words(batch, batch.negative_BK[i])
            assert positive in (f"pairs p{number}", f"pairs r{number}")
            assert len(set(negatives)) == 2
            assert set(negatives) <= {f"pairs n{number}.{k}" for k in range(3)}
            drawn |= {positive, *negatives}
    assert len(drawn) == 20 * (2 + 3)  # all of them, sooner or later


def test_each_row_brings_the_hard_negatives_it_has() -> None:
    """Up to two of them, -1 where there is none; the batch is as wide as its richest row."""
    counts = [3, 0, 1, 2, 0, 1, 3, 0]
    table = retrieval(8, negatives=[[f"n{i}.{k}" for k in range(count)] for i, count in enumerate(counts)])
    batch = sampler(table, [source("pairs")])[0]
    assert batch.negative_BK.shape == (8, 2) and batch.negative_BK.dtype == np.int64
    for query, row in zip(words(batch, batch.query_B), batch.negative_BK.tolist(), strict=True):
        number = int(query.removeprefix("pairs q"))
        there = min(2, counts[number])
        assert all(batch.texts[text].startswith(f"n{number}.") for text in row[:there])
        assert row[there:] == [-1] * (2 - there)
    poor = sampler(table.filter(pc.less(pc.list_value_length(table["negatives"]), 2)), [source("pairs")])
    assert all(poor[step].negative_BK.shape == (8, 1) for step in range(5))
    bare = retrieval(8, negatives=[[]] * 8)
    assert sampler(bare, [source("pairs")])[0].negative_BK.shape == (8, 0)


def test_clustering_draws_positives_of_the_label_and_negatives_of_others() -> None:
    labels = ["a", "b", "c", "a", "b", "c", "a", "b"]
    table, one = labelled("clustering", labels, "kinds")
    batches = sampler(table, [one])
    drawn = set()
    for step in range(40):
        batch = batches[step]
        assert not batch.in_batch and batch.negative_BK.shape == (8, 3)
        for i, text in enumerate(words(batch, batch.query_B)):
            own = labels[int(text.split()[1])]
            positive = batch.texts[batch.positive_B[i]]
            assert labels[int(positive.split()[1])] == own
            for negative in words(batch, batch.negative_BK[i]):
                assert labels[int(negative.split()[1])] != own
                drawn.add(negative)
    assert len(drawn) == len(labels)


def test_classification_draws_the_label_and_the_other_label() -> None:
    table, one = labelled("classification", ["yes", "no", "yes", "no"], "answers")
    batches = sampler(table, [one])
    for step in range(40):
        batch = batches[step]
        assert not batch.in_batch
        for i, text in enumerate(words(batch, batch.query_B)):
            own, other = ("yes", "no") if int(text.split()[1]) % 2 == 0 else ("no", "yes")
            assert batch.texts[batch.positive_B[i]] == own
            assert words(batch, batch.negative_BK[i]) == [other]


@pytest.mark.parametrize("instructions", [False, True])
def test_documents_known_to_be_right_are_marked_in_every_form(instructions: bool) -> None:
    """Against a double loop, on rows that share queries, positives, labels, and each other's texts.

    A document may stand in a batch bare and with its instruction; a hard negative of one row may be right for another.
    """
    table = retrieval(
        12,
        query=["a", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"],
        positives=[[t] for t in "121ac34567"] + [["8", "5"], ["9"]],
        negatives=[
            ["5", "a"],
            ["6", "c"],
            ["2"],
            ["8"],
            ["9"],
            ["4"],
            ["3"],
            ["1"],
            ["2"],
            ["b"],
            ["d"],
            ["7"],
        ],
        label=[None] * 7 + ["x", "x", None, None, "y"],
    )
    rows = table.to_pylist()
    batches = sampler(table, [source("pairs")], batch_size=12, instructions=instructions)
    prefix = PREFIX.format("Do pairs") if instructions else ""
    beyond_positives = 0
    for step in range(20):
        batch = batches[step]
        queries = [text.removeprefix(prefix) for text in words(batch, batch.query_B)]
        positives = [text.removeprefix(prefix) for text in words(batch, batch.positive_B)]
        bare = [text.removeprefix(prefix) for text in batch.texts]
        assert sorted(queries) == sorted(table["query"].to_pylist())
        known = set()
        for i, query in enumerate(queries):
            labels = {row["label"] for row in rows if row["query"] == query} - {None}
            right = {t for r in rows if r["query"] == query or r["label"] in labels for t in r["positives"]}
            documents = {*positives, *(bare[n] for n in batch.negative_BK.ravel() if n >= 0)}
            known |= {(i, n) for n, text in enumerate(bare) if text in (right | {query}) & documents}
            for j, other in enumerate(queries):
                alike = positives[j] in right | {query} or positives[j] == positives[i] or query == other
                shared = labels & {row["label"] for row in rows if row["query"] == other}
                assert batch.same_BB[i, j] == (alike or bool(shared))
        assert batch.known_P2.tolist() == [list(pair) for pair in sorted(known)]
        beyond_positives += len({text for _, text in known} - set(batch.positive_B.tolist()))
    assert beyond_positives > 0


def test_no_query_is_set_against_its_own_text() -> None:
    """Names are the same in many languages: a positive that equals a query's text is never its negative."""
    table = retrieval(6, query=list("abcdef"), positives=[["b"], ["c"], ["d"], ["e"], ["f"], ["a"]])
    batches = sampler(table, [source("pairs")], batch_size=6)
    for step in range(10):
        batch = batches[step]
        for i, query in enumerate(words(batch, batch.query_B)):
            for j, positive in enumerate(words(batch, batch.positive_B)):
                assert query != positive or batch.same_BB[i, j]


# --- Instructions


def test_instructions_stand_before_queries_and_before_some_documents() -> None:
    """Symmetric sources have them on about 30 % of their documents."""
    batches = sampler(retrieval(100), [source("pairs")], instructions=True, batch_size=50)
    prefix = PREFIX.format("Do pairs")
    documents: list[str] = []
    for step in range(40):
        batch = batches[step]
        assert all(text.startswith(prefix) for text in words(batch, batch.query_B))
        assert all(text.count("Instruct: ") <= 1 for text in batch.texts)
        documents += words(batch, batch.positive_B) + words(batch, batch.negative_BK)
    share = sum(text.startswith(prefix) for text in documents) / len(documents)
    assert len(documents) == 40 * 50 * 3
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / len(documents)) ** 0.5


def test_documents_of_sources_that_are_not_symmetric_stay_bare() -> None:
    batches = sampler(retrieval(20), [source("pairs", symmetric=False)], instructions=True)
    for step in range(40):
        batch = batches[step]
        assert all("Instruct: " in text for text in words(batch, batch.query_B))
        assert not any("Instruct: " in text for text in words(batch, batch.positive_B))
        assert not any("Instruct: " in text for text in words(batch, batch.negative_BK))


def test_without_instructions_every_text_is_bare(rows_folder: Path) -> None:
    table, sources = read_rows(rows_folder)
    batches = sampler(table, sources, instructions=False)
    assert not any("Instruct: " in text for step in range(40) for text in batches[step].texts)


def test_instructions_leave_rows_and_masks_as_they_are() -> None:
    """What may be right for a query depends on texts, not on the prompts in front of them."""
    with_them = sampler(retrieval(20), [source("pairs")], instructions=True)
    bare = sampler(retrieval(20), [source("pairs")])
    for step in range(10):
        assert np.array_equal(with_them[step].same_BB, bare[step].same_BB)
        queries = words(with_them[step], with_them[step].query_B)
        assert [text.split("Query: ")[1] for text in queries] == words(bare[step], bare[step].query_B)


# --- How long a run is, and what it draws from


@pytest.mark.parametrize(
    ("epochs", "batch_size", "weights", "steps"),
    [
        (1.0, 10, {}, 4),
        (1.1, 4, {}, 11),  # 1.1 * 40 / 4 in floating point is above 11
        (2.5, 8, {}, 13),
        (0.001, 8, {}, 1),
        (1.0, 10, {"many": 0.0}, 1),
        (1.0, 10, {"many": 0.1, "few": 2.7}, 3),
        (3, 10, {"few": 3}, 18),
    ],
)
def test_epochs_are_turned_into_steps(
    epochs: float, batch_size: int, weights: dict[str, float], steps: int
) -> None:
    table = pa.concat_tables([retrieval(30, "many"), retrieval(10, "few")])
    batches = sampler(
        table,
        [source("many"), source("few")],
        steps=None,
        epochs=epochs,
        batch_size=batch_size,
        source_weights=weights,
    )
    assert batches.steps == len(batches) == steps
    for step in (-1, steps):
        with pytest.raises(IndexError, match=f"step {step} .* {steps} steps"):
            batches[step]


def test_one_epoch_has_every_row_of_every_source_once() -> None:
    table = pa.concat_tables([retrieval(32, "many"), retrieval(8, "few")])
    for seed in range(5):
        batches = sampler(table, [source("many"), source("few")], steps=None, epochs=1.0, seed=seed)
        drawn = [text for batch in every(batches) for text in words(batch, batch.query_B)]
        assert sorted(drawn) == sorted(table["query"].to_pylist())


def test_sources_have_steps_by_their_capped_rows() -> None:
    """Of 60 and 20 rows 20 each are left by a cap of the source; by language 5 x 10 = 50 and 10."""
    many = retrieval(60, "many", query_lang=[f"l{i % 5}" for i in range(60)])
    few = retrieval(20, "few")
    table, sources = pa.concat_tables([many, few]), [source("many"), source("few")]

    def shares(**changes: Any) -> Counter[str]:
        return Counter(batch.source for batch in every(sampler(table, sources, steps=48, **changes)))

    assert shares() == {"many": 36, "few": 12}
    assert shares(cap=20) == {"many": 24, "few": 24}
    assert shares(cap=10, cap_by="language") == {"many": 40, "few": 8}
    assert shares(cap=10, cap_by="language", source_weights={"few": 5}) == {"many": 24, "few": 24}
    capped = sampler(table, sources, steps=None, epochs=2.0, batch_size=10, cap=10, cap_by="language")
    assert len(capped) == 12


def test_cap_and_temperature_decide_what_a_run_sees() -> None:
    """An epoch of 30 out of 90 + 10 rows at T = 2 has 3 : 1 of the languages: 22 or 23, and 7 or 8."""
    table = retrieval(100, query_lang=["big"] * 90 + ["small"] * 10)
    batches = sampler(
        table, [source("pairs")], steps=None, epochs=3, batch_size=10, cap=30, language_temperature=2.0
    )
    drawn = [
        int(text.removeprefix("pairs q")) for batch in every(batches) for text in words(batch, batch.query_B)
    ]
    for epoch in (drawn[:30], drawn[30:60], drawn[60:]):
        assert len(set(epoch)) == 30 and sum(number >= 90 for number in epoch) in (7, 8)
    assert len(set(drawn)) > 40


def test_batch_neighbours_share_no_text() -> None:
    """Every query twice and every positive four times; by chance nearly every batch would have a clash."""
    table = retrieval(
        200, query=[f"q{i // 2}" for i in range(200)], positives=[[f"p{i % 50}"] for i in range(200)]
    )
    for batch in every(sampler(table, [source("pairs")], batch_size=16, steps=60)):
        assert len(set(batch.query_B.tolist())) == len(set(batch.positive_B.tolist())) == 16


def test_sources_without_a_step_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    tables = [retrieval(1000, "large"), retrieval(3, "tiny"), retrieval(2, "least"), retrieval(2, "unwanted")]
    table, sources = (
        pa.concat_tables(tables),
        [source(name) for name in ("large", "tiny", "least", "unwanted")],
    )
    batches = sampler(table, sources, steps=20, source_weights={"unwanted": 0.0})
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "20 steps" in said and "tiny, least;" in said
    assert "large" not in said and "unwanted" not in said
    assert {batch.source for batch in every(batches)} == {"large"}
    sampler(table, sources, steps=20, source_weights={"unwanted": 0.0, "tiny": 50.0, "least": 80.0})
    assert capsys.readouterr().err == ""


# --- Refusals


def test_an_unknown_source_in_the_weights_is_named() -> None:
    with pytest.raises(UsageError, match="'pears'.*'pairs'"):
        sampler(retrieval(4), [source("pairs")], source_weights={"pears": 1.0})


def test_weights_that_leave_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="weight above 0"):
        sampler(retrieval(4), [source("pairs")], source_weights={"pairs": 0.0})


@pytest.mark.parametrize("length", [{}, {"steps": 3, "epochs": 1.0}])
def test_the_length_is_given_in_one_way(length: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="in steps or in epochs"):
        sampler(retrieval(4), [source("pairs")], **{"steps": None, **length})


@pytest.mark.parametrize("format", ["clustering", "classification"])
def test_a_source_of_one_label_is_refused(format: str) -> None:
    table, one = labelled(format, ["only", "only"], "kinds")
    with pytest.raises(F2Error, match="kinds .* 1 label"):
        sampler(table, [one])


def test_formats_choose_the_sources(rows_folder: Path) -> None:
    table, sources = read_rows(rows_folder)
    assert [rows.source.name for rows in load_sources(table, sources, ["clustering"])] == ["kinds"]
    with pytest.raises(F2Error, match="retrieval"):
        load_sources(table, [one for one in sources if one.format != "retrieval"], ["retrieval"])
