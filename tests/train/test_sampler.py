"""Batches as a pure function of (seed, step): what is in them, and what never is."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
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


def words(batch: Batch, rows: np.ndarray) -> list[str]:
    return [batch.texts[row] for row in rows.ravel()]


def content(batch: Batch) -> tuple[Any, ...]:
    arrays = (batch.query_B, batch.positive_B, batch.negative_BK, batch.same_BB)
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


def test_hard_negatives_are_as_many_as_the_poorest_row_of_the_batch_has() -> None:
    table = retrieval(8, negatives=[["a", "b", "c"]] * 7 + [["d"]])
    assert sampler(table, [source("pairs")])[0].negative_BK.shape == (8, 1)
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


def test_same_marks_positives_that_may_be_right_too() -> None:
    """Against a double loop, on rows that share queries, positives, labels, and each other's texts."""
    table = retrieval(
        12,
        query=["a", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"],
        positives=[
            ["1"],
            ["2"],
            ["1"],
            ["a"],
            ["c"],
            ["3", "4"],
            ["4"],
            ["5"],
            ["6"],
            ["7"],
            ["8", "5"],
            ["9"],
        ],
        label=[None, None, None, None, None, None, None, "x", "x", None, None, "y"],
    )
    by_query: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        by_query.setdefault(row["query"], []).append(row)
    batches = sampler(table, [source("pairs")], batch_size=12)
    undrawn = 0
    for step in range(40):
        batch = batches[step]
        queries, positives = words(batch, batch.query_B), words(batch, batch.positive_B)
        drawn = []
        for query, positive in zip(queries, positives, strict=True):
            drawn += [row for row in by_query[query] if positive in row["positives"]]
        for i, mine in enumerate(drawn):
            for j, other in enumerate(drawn):
                expected = (
                    (mine["label"] is not None and mine["label"] == other["label"])
                    or mine["query"] == other["query"]
                    or positives[i] == positives[j]
                    or positives[j] == mine["query"]
                    or positives[j] in mine["positives"]
                )
                assert batch.same_BB[i, j] == expected, (mine, other)
                undrawn += i != j and positives[j] in mine["positives"] and positives[i] != positives[j]
    assert undrawn > 0


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


# --- Refusals


def test_an_unknown_source_in_the_weights_is_named() -> None:
    with pytest.raises(UsageError, match="'pears'.*'pairs'"):
        sampler(retrieval(4), [source("pairs")], source_weights={"pears": 1.0})


def test_weights_that_leave_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="weight above 0"):
        sampler(retrieval(4), [source("pairs")], source_weights={"pairs": 0.0})


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
