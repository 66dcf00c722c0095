"""Validation: figures against naive ones, what is asked and with which prompts, early stopping, and the table."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score
from torch import Tensor

from f2llm.data.rows import Source, read_rows, rows_table
from f2llm.errors import F2Error
from f2llm.recipe_train import TrainStage
from f2llm.rng import generator
from f2llm.train.sampler import Batch
from f2llm.train.sources import SourceRows, load_sources
from f2llm.train.trials import prepare
from f2llm.train.validate import MEASURES, Best, Figures, quality, ranks, table, validate

Settings = Callable[..., TrainStage]
FORMATS = ["retrieval", "clustering", "classification"]
PREFIX = "Instruct: Do {}\nQuery: "
DIM = 12


def held_out(name: str, format: Any, instruction: str | None = None, **columns: list[Any]) -> SourceRows:
    """Rows of one source; the language is "und" where none is given."""
    source = Source(
        name=name,
        format=format,
        task="t",
        symmetric=True,
        instruction=f"Do {name}" if instruction is None else instruction,
        licence="CC0-1.0",
    )
    columns = {"query_lang": ["und"] * len(columns["query"]), **columns}
    return load_sources(rows_table(source, columns), [source], FORMATS)[0]


def vector(text: str) -> Tensor:
    """A random vector that depends on the text alone."""
    return torch.from_numpy(generator(0, text).standard_normal(DIM)).float()


def at_random(texts: list[str]) -> Tensor:
    return torch.stack([vector(text) for text in texts])


def all_alike(texts: list[str]) -> Tensor:
    return torch.ones(len(texts), DIM)


def no_loss(batch: Batch, vectors_ND: Tensor) -> dict[str, float]:
    return {}


def by_name(vectors: dict[str, list[float]]) -> Callable[[list[str]], Tensor]:
    return lambda texts: torch.tensor([vectors[text] for text in texts])


# --- Figures against naive ones


def tangled_rows() -> SourceRows:
    """Forty queries, some of them twice, some of one thing, some a document as well; few texts, so that all meet."""
    rng = generator(1, "rows")
    texts = [f"text {i}" for i in range(30)]

    def some(low: int, high: int) -> list[str]:
        return [texts[i] for i in rng.permutation(30)[: rng.integers(low, high)]]

    rows = []
    for _ in range(40):
        positives = some(1, 4)
        negatives = [text for text in some(0, 6) if text not in positives]
        rows.append(
            (some(1, 2)[0] if rng.random() < 0.7 else f"query {rng.integers(9)}", positives, negatives)
        )
    return held_out(
        "tangled",
        "retrieval",
        query=[query for query, _, _ in rows],
        positives=[positives for _, positives, _ in rows],
        negatives=[negatives for _, _, negatives in rows],
        label=[f"thing {rng.integers(15)}" if rng.random() < 0.6 else None for _ in rows],
    )


def naive_ranking(query: str, candidates: set[str], right: set[str]) -> list[bool]:
    """Whether each candidate, best first, is right; by cosine, and the wrong ones first where it is the same."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / a.norm() / b.norm())

    scored = sorted((-cosine(vector(query), vector(text)), text in right) for text in candidates)
    return [is_right for _, is_right in scored]


def naive_quality(ranking: list[bool]) -> dict[str, float]:
    gains = [1 / math.log2(rank + 1) for rank, right in enumerate(ranking, 1) if right and rank <= 10]
    ideal = [1 / math.log2(rank + 1) for rank in range(1, min(10, sum(ranking)) + 1)]
    first = ranking.index(True) + 1
    return {
        "accuracy_at_1": float(first == 1),
        "mrr_at_10": 1 / first if first <= 10 else 0.0,
        "ndcg_at_10": sum(gains) / sum(ideal),
    }


def test_retrieval_figures_are_those_of_a_naive_ranking(settings: Settings) -> None:
    rows = tangled_rows()
    documents = {text for texts in (*rows.positives, *rows.negatives) for text in texts}
    expected = []
    for query, label in zip(rows.query, rows.label, strict=True):
        right = {
            text
            for other, thing, positives in zip(rows.query, rows.label, rows.positives, strict=True)
            if other == query or (thing == label and label is not None)
            for text in positives
        }
        ranking = naive_ranking(query, documents - {query}, right)
        if any(ranking):
            expected.append(naive_quality(ranking))
    found = validate(at_random, prepare(settings(instructions=False), [rows], 3), no_loss)
    figures = found["sources"]["tangled"]
    assert figures["queries"] == len(expected) >= 35
    assert figures["rows"] == 40
    for measure in MEASURES["retrieval"]:
        assert figures[measure] == pytest.approx(np.mean([each[measure] for each in expected]), abs=1e-4)
    assert found["score"] == figures[figures["measure"]] == figures["ndcg_at_10"]
    assert 0.1 < found["score"] < 0.9


def test_clustering_is_the_nearest_other_text(settings: Settings) -> None:
    """Texts that come twice, also under two labels, and a label with one text, which has nothing to find."""
    rng = generator(2, "rows")
    query = [f"text {i}" for i in range(30)] + ["text 3", "text 5", "text 6"]
    label = [f"label {rng.integers(4)}" for _ in range(30)]
    label += [label[3], "label 0", "label 1"]
    label[29] = "alone"
    labels_of = {text: {b for a, b in zip(query, label, strict=True) if a == text} for text in query}
    expected = []
    for text in query:
        others = {other for other in query if other != text}
        right = {other for other in others if labels_of[other] & labels_of[text]}
        if right:
            expected.append(naive_quality(naive_ranking(text, others, right))["accuracy_at_1"])
    rows = held_out("groups", "clustering", query=query, label=label)
    found = validate(at_random, prepare(settings(instructions=False), [rows], 3), no_loss)
    figures = found["sources"]["groups"]
    assert (figures["rows"], figures["queries"]) == (33, 32) and len(expected) == 32
    assert figures["accuracy_at_1"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert "ndcg_at_10" not in figures and figures["measure"] == "accuracy_at_1"


def test_classification_is_the_nearest_label(settings: Settings) -> None:
    """A text that reads like a label may still be taken for it."""
    vectors = {
        "yes": [1.0, 0.0],
        "no": [0.0, 1.0],
        "agreed": [2.0, 0.1],
        "never": [0.1, 0.3],
        "nope": [1.0, 0.9],  # nearer to yes
    }
    rows = held_out(
        "answers",
        "classification",
        query=["agreed", "never", "nope", "no"],
        label=["yes", "no", "no", "no"],
    )
    found = validate(by_name(vectors), prepare(settings(instructions=False), [rows], 3), no_loss)
    assert found["sources"]["answers"]["accuracy_at_1"] == 0.75
    assert found["sources"]["answers"]["queries"] == 4


@pytest.mark.parametrize("right", [1, 3, 15])
def test_ndcg_is_scikit_learns(right: int) -> None:
    for seed in range(20):
        rng = generator(seed, right)
        scores_C = rng.standard_normal(40).astype(np.float32)
        right_R = np.sort(rng.permutation(40)[:right])
        relevant_C = np.isin(np.arange(40), right_R)
        ours = quality(ranks(scores_C, right_R), right)["ndcg_at_10"]
        assert ours == pytest.approx(ndcg_score([relevant_C], [scores_C], k=10), abs=1e-9)


def test_ranks_put_wrong_candidates_first_where_scores_tie() -> None:
    for seed in range(50):
        rng = generator(seed, "ties")
        scores_C = rng.integers(0, 4, 12).astype(np.float32)
        right_R = np.sort(rng.permutation(12)[: rng.integers(1, 12)])
        order = sorted((-score, c in right_R) for c, score in enumerate(scores_C.tolist()))
        expected = [place for place, (_, right) in enumerate(order, 1) if right]
        assert ranks(scores_C, right_R).tolist() == expected[:10]


def test_a_collapsed_model_finds_nothing(settings: Settings, three: list[SourceRows]) -> None:
    assert validate(all_alike, prepare(settings(), three, 3), no_loss)["score"] == 0


def test_the_order_of_rows_does_not_matter(settings: Settings) -> None:
    rows = tangled_rows()
    shuffled = rows.take(np.arange(len(rows))[::-1])
    config = settings(instructions=False)
    one, other = (validate(at_random, prepare(config, [some], 3), no_loss) for some in (rows, shuffled))
    assert one == other


# --- All three formats at once


@pytest.fixture(scope="module")
def three(rows_folder: Path) -> list[SourceRows]:
    """The hand-written rows: 120 names of 20 things in six languages, their kinds, and whether they are countries."""
    content, sources = read_rows(rows_folder)
    return load_sources(content, sources, FORMATS)


def test_a_model_that_knows_everything_scores_one(settings: Settings, three: list[SourceRows]) -> None:
    """Every name gets its thing's vector, every label that of one of its things, and prompts none."""
    names, kinds, country = three
    thing = dict(zip(names.query, names.label, strict=True))
    kind = dict(zip(kinds.query, kinds.label, strict=True))
    is_country = dict(zip(country.query, country.label, strict=True))
    things, labels = sorted(set(names.label), key=str), sorted({*kinds.label, *country.label}, key=str)

    def encode(texts: list[str]) -> Tensor:
        vectors_ND = torch.zeros(len(texts), len(things) + len(labels))
        for row, text in enumerate(text.rpartition("\nQuery: ")[2] for text in texts):
            if text in thing:
                vectors_ND[row, things.index(thing[text])] = 2
                vectors_ND[row, len(things) + labels.index(kind[text])] = 1
            vectors_ND[row, len(things) + labels.index(is_country.get(text, text))] += 0.5
        return vectors_ND

    found = validate(encode, prepare(settings(), three, 3), no_loss)
    assert found["score"] == 1
    assert [figures["queries"] for figures in found["sources"].values()] == [120, 120, 120]


def test_queries_carry_the_instruction_and_documents_do_not(settings: Settings) -> None:
    asked: list[str] = []

    def encode(texts: list[str]) -> Tensor:
        asked.extend(texts)
        assert len(texts) == len(set(texts))
        return at_random(texts)

    sources = [
        held_out("find", "retrieval", query=["a", "b"], positives=[["c"], ["d"]], negatives=[["e"], ["b"]]),
        held_out("group", "clustering", query=["f", "g", "h", "i"], label=["1", "1", "2", "2"]),
        held_out("name", "classification", query=["j", "k"], label=["y", "n"]),
        held_out("bare", "retrieval", instruction="", query=["l", "m"], positives=[["n"], ["o"]]),
    ]
    queries = {"find": "ab", "group": "fghi", "name": "jk"}
    prefixed = {PREFIX.format(name) + text for name, texts in queries.items() for text in texts}
    bare = set("cdebfghiyn") | set("lmno")
    validate(encode, prepare(settings(document_instruction_rate=0), sources, 3), no_loss)
    assert set(asked) == prefixed | bare
    asked.clear()
    validate(encode, prepare(settings(instructions=False), sources, 3), no_loss)
    assert set(asked) == set("abcde") | set("fghi") | set("jkyn") | set("lmno")


def test_score_is_the_mean_over_sources_of_their_main_figure(
    settings: Settings, three: list[SourceRows]
) -> None:
    found = validate(at_random, prepare(settings(), three, 3), no_loss)
    names, kinds, country = found["sources"].values()
    main = [names["ndcg_at_10"], kinds["accuracy_at_1"], country["accuracy_at_1"]]
    assert found["score"] == pytest.approx(sum(main) / 3, abs=1e-4)


def test_figures_are_plain_and_a_function_of_weights_and_rows(
    settings: Settings, three: list[SourceRows]
) -> None:
    config = settings()
    weight = torch.ones(DIM, requires_grad=True)

    def encode(texts: list[str]) -> Tensor:
        return (at_random(texts) * weight).bfloat16()

    def loss_of(batch: Batch, vectors_ND: Tensor) -> dict[str, float]:
        assert not vectors_ND.requires_grad and vectors_ND.dtype == torch.float32
        return {"hard": float(vectors_ND.sum())}

    trials = prepare(config, three, 3)
    first = validate(encode, trials, loss_of)
    torch.manual_seed(1)
    assert validate(encode, trials, loss_of) == first == validate(encode, prepare(config, three, 3), loss_of)
    assert json.loads(json.dumps(first)) == first


# --- Languages


def test_rare_languages_are_pooled_and_none_is_lost(settings: Settings) -> None:
    count = {"deu": 12, "fra": 5, "swa": 4, "zho": 1, "hin": 3}
    langs = [lang for lang, number in count.items() for _ in range(number)]
    numbers = range(len(langs))
    rows = held_out(
        "pairs",
        "retrieval",
        query=[f"q{i}" for i in numbers],
        positives=[[f"p{i}"] for i in numbers],
        query_lang=langs,
    )
    found = validate(at_random, prepare(settings(instructions=False), [rows], 3), no_loss)
    figures = found["sources"]["pairs"]
    languages = figures["languages"]
    assert {lang: each["queries"] for lang, each in languages.items()} == {"deu": 12, "fra": 5, "other": 8}
    assert languages["other"]["languages"] == 3
    assert list(languages) == ["deu", "fra", "other"]
    for measure in MEASURES["retrieval"]:
        pooled = sum(each[measure] * each["queries"] for each in languages.values()) / 25
        assert pooled == pytest.approx(figures[measure], abs=1e-4)
    # A language's figure is that of its queries among all documents.
    alone = [
        naive_quality(naive_ranking(f"q{i}", {f"p{j}" for j in numbers}, {f"p{i}"}))["ndcg_at_10"]
        for i in numbers
        if langs[i] == "fra"
    ]
    assert languages["fra"]["ndcg_at_10"] == pytest.approx(np.mean(alone), abs=1e-4)


# --- The loss


def test_the_loss_sees_each_row_once_with_the_vectors_of_its_texts(
    settings: Settings, three: list[SourceRows]
) -> None:
    """Batches of 50 out of 120 rows: two of each source."""
    seen: dict[str, Counter[str]] = {}

    def loss_of(batch: Batch, vectors_ND: Tensor) -> dict[str, float]:
        torch.testing.assert_close(vectors_ND, at_random(batch.texts))
        counts = seen.setdefault(batch.source, Counter())
        counts.update(batch.texts[i].rpartition("\nQuery: ")[2] for i in batch.query_B)
        assert len(batch.query_B) == 50
        return {"hard": float(len(counts)), **({"in_batch": 7.0} if batch.in_batch else {})}

    found = validate(at_random, prepare(settings(batch_size=50), three, 3), loss_of)
    for rows in three:
        counts = seen[rows.source.name]
        assert counts.total() == 100
        assert not counts - Counter(rows.query)
    assert found["sources"]["names"]["loss"].keys() == {"hard", "in_batch"}
    assert found["sources"]["names"]["loss"]["in_batch"] == 7
    assert found["sources"]["kinds"]["loss"].keys() == {"hard"}
    # The number of different queries so far after each of two batches, and the mean of both.
    assert 25 < found["sources"]["kinds"]["loss"]["hard"] < len(set(three[1].query))


def test_few_rows_make_one_batch(settings: Settings) -> None:
    rows = held_out("few", "retrieval", query=["a", "b", "c"], positives=[["d"], ["e"], ["f"]])
    (trial,) = prepare(settings(batch_size=64), [rows], 3)
    ((batch, _),) = trial.batches
    assert len(batch.query_B) == 3


# --- What cannot be asked


def test_rows_without_a_question_are_told_and_do_not_count(settings: Settings) -> None:
    """A label of its own for each text; one label for all; a single pair; and one source that can be asked."""
    grouped = held_out("singles", "clustering", query=["a", "b", "c"], label=["1", "2", "3"])
    labelled = held_out("labelled", "classification", query=["d", "e", "f"], label=["y", "y", "n"])
    one_label = labelled.take(np.asarray([0, 1]))
    pair = held_out("pair", "retrieval", query=["g"], positives=[["h"]])
    nothing = pair.take(np.asarray([], dtype=np.int64))
    config = settings(instructions=False)
    with pytest.raises(F2Error, match=r"^the 6 rows held out .* raise validation.rows"):
        prepare(config, [grouped, one_label, pair, nothing], 3)
    good = held_out("good", "retrieval", query=["i", "j"], positives=[["k"], ["l"]])
    result = validate(at_random, prepare(config, [grouped, one_label, good], 3), lambda batch, v: {"x": 1.0})
    assert result["score"] == result["sources"]["good"]["ndcg_at_10"]
    for name, rows in (("singles", 3), ("labelled", 2)):
        figures = result["sources"][name]
        assert (figures["rows"], figures["queries"], figures["languages"]) == (rows, 0, {})
        assert "accuracy_at_1" not in figures
    assert result["sources"]["labelled"]["loss"] == {}  # no other label to draw negatives from
    assert result["sources"]["singles"]["loss"] == {"x": 1.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_vectors_that_are_not_finite_stop_the_run(
    value: float, settings: Settings, three: list[SourceRows]
) -> None:
    def encode(texts: list[str]) -> Tensor:
        vectors_ND = at_random(texts)
        vectors_ND[-1, 3] = value
        return vectors_ND

    with pytest.raises(F2Error, match=r"'names' gives vectors that are not finite.*learning_rate"):
        validate(encode, prepare(settings(), three, 3), no_loss)


# --- Early stopping


@pytest.mark.parametrize(
    ("scores", "patience", "best_step", "stops_at"),
    [
        ([0.1, 0.2, 0.3, 0.4], 1, 30, None),
        ([0.5, 0.4, 0.6, 0.5, 0.5], 2, 20, 40),
        ([0.5, 0.4, 0.6, 0.5], 2, 20, None),
        ([0.5, 0.5, 0.5], 2, 0, 20),  # no better is a miss
        ([0.5, 0.4, 0.3, 0.2, 0.1], None, 0, None),
        ([0.5, 0.4], 1, 0, 10),
        ([0.0, 0.0, 0.1], 3, 20, None),  # a score of zero is a score
        ([0.5, math.nan, 0.6], 2, 20, None),
    ],
)
def test_early_stopping(
    scores: Sequence[float], patience: int | None, best_step: int, stops_at: int | None
) -> None:
    best, stopped = Best(patience), None
    for number, score in enumerate(scores):
        best = best.after(score, 10 * number)
        if best.stop and stopped is None:
            stopped = 10 * number
    assert stopped == stops_at
    assert best.step == best_step and best.score == scores[best_step // 10]


# --- The table


def test_table_sets_before_and_after_side_by_side() -> None:
    def figures(main: float, german: float, other: float) -> Figures:
        languages = {
            "deu": {"queries": 7, "ndcg_at_10": german},
            "other": {"languages": 3, "queries": 5, "ndcg_at_10": other},
        }
        names = {"measure": "ndcg_at_10", "queries": 12, "ndcg_at_10": main, "languages": languages}
        nothing = {"measure": "accuracy_at_1", "queries": 0, "languages": {}}
        return {"score": main, "sources": {"名前": names, "silent": nothing}}

    text = table(figures(0.25, 0.5, 0.125), figures(0.75, 0.375, 0.125))
    assert [line.split() for line in text.splitlines()] == [
        "measure queries before after difference".split(),
        "名前 ndcg_at_10 12 0.2500 0.7500 +0.5000".split(),
        "deu ndcg_at_10 7 0.5000 0.3750 -0.1250".split(),
        "other (3 languages) ndcg_at_10 5 0.1250 0.1250 +0.0000".split(),
        "silent accuracy_at_1 0 - - -".split(),
        "mean over sources score 0.2500 0.7500 +0.5000".split(),
    ]
    # Numbers end in one column; the two wide letters take four places on the screen.
    ends = {len(line) + (2 if "名前" in line else 0) for line in text.splitlines()}
    assert len(ends) == 1
