"""Training from a token store: the batches and the weights that its rows give, in memory that stays flat."""

import json
import os
import shutil
import tracemalloc
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.train.runs import MakeModel, Settings, Stopped, interrupt, same_bits, weights, whole_log
from tokenizers import Tokenizer

from f2llm.data.rows import Source, read_rows, rows_table, write_rows
from f2llm.data.token_store import TokenStore, open_store
from f2llm.data.token_store_build import build as build_store
from f2llm.engine import Engine, using
from f2llm.errors import UsageError
from f2llm.model.folder import load_model, save_model
from f2llm.model.prompts import query_prefix
from f2llm.recipe_train import HardNegatives, TrainStage, Validation
from f2llm.train.sampler import Batch, Sampler
from f2llm.train.sources import NumberedRows, SourceRows, hold_out, load_sources
from f2llm.train.stage import make_sampler, split, train_stage
from f2llm.train.terms import Read, token_ids
from f2llm.train.trainer import train
from f2llm.train.training import reader_of
from f2llm.train.trials import Trial, prepare

CUT = 28  # tokens; leaves a few of every query behind its instruction
FORMATS = ["retrieval", "clustering", "classification"]
LANGUAGES = ["swa", "eng", "zho", "hin"]
RICH: dict[str, Any] = {
    "batch_size": 9,
    "hard_negatives": HardNegatives(retrieval=3, clustering=2, classification=2),
}


class Folders(NamedTuple):
    """The same rows twice."""

    rows: Path
    store: Path


def build(rows: Path, store: Path, prompts: dict[str, str]) -> None:
    """A token store of a folder of rows; the tokenizer lies beside that folder."""
    with using(Engine(workers=1)):
        build_store([rows], rows.parent / "tokenizer.json", store, prompts)


def texts(rng: np.random.Generator, names: list[str], count: int) -> list[str]:
    return [names[i] for i in rng.integers(len(names), size=count)]


def some_rows(rng: np.random.Generator, names: list[str], name: str, format: Any, **facts: Any) -> Any:
    """Rows that share queries, positives, labels and each other's texts; labels are not in the order of numbers."""
    given = {"task": "t", "symmetric": True, "instruction": f"Do {name}", "licence": "CC0-1.0", **facts}
    source = Source(name=name, format=format, **given)
    count = 90
    columns: dict[str, list[Any]] = {
        "query": texts(rng, names, count),
        "query_lang": [LANGUAGES[min(i, 3)] for i in rng.geometric(0.5, count) - 1],
    }
    labels = ["zebra", "été", "Wasser", names[3], "水", "a b"]
    if format == "retrieval":
        columns["positives"] = [texts(rng, names, int(rng.integers(1, 4))) for _ in range(count)]
        columns["negatives"] = [texts(rng, names, int(rng.integers(0, 6))) for _ in range(count)]
        columns["label"] = [None if i > 20 else f"thing {i}" for i in rng.integers(40, size=count)]
    else:
        columns["label"] = texts(rng, labels, count)
    return source, rows_table(source, columns)


@pytest.fixture(scope="module")
def folders(names: list[str], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Six sources whose rows are mixed and lie in four parts, one in another order than the sources."""
    folder = tmp_path_factory.mktemp("both")
    rng = np.random.default_rng(0)
    made = [
        some_rows(rng, names, "pairs", "retrieval"),
        some_rows(rng, names, "asked", "retrieval", symmetric=False),
        some_rows(rng, names, "bare", "retrieval", instruction=""),
        some_rows(rng, names, "groups", "clustering"),
        some_rows(rng, names, "kinds", "classification"),
        some_rows(rng, names, "answers", "classification", symmetric=False),
    ]
    sources = [source for source, _ in made]
    table = pa.concat_tables([rows for _, rows in made])
    table = table.take(rng.permutation(table.num_rows))
    write_rows(folder / "rows", table, sources)
    (folder / "rows" / "rows.parquet").unlink()
    (folder / "rows" / "rows.parquet").mkdir()
    for number, start in enumerate(range(0, table.num_rows, 150)):
        part = folder / "rows" / "rows.parquet" / f"part-{number:05}.parquet"
        pq.write_table(table.slice(start, 150), part)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    prompts = {source.name: query_prefix(source.instruction) for source in sources if source.instruction}
    build(folder / "rows", folder / "store", prompts)
    return Folders(folder / "rows", folder / "store")


def loaded(folder: Path, formats: Sequence[str] = FORMATS) -> list[SourceRows]:
    if folder.name == "store":
        store = open_store(folder)
        return load_sources(store, store.sources, formats)
    return load_sources(*read_rows(folder), formats)


def ids_of(model: Any, store: TokenStore | None, some: Sequence[Any]) -> list[list[int]]:
    read: Read = reader_of(store) if store else token_ids
    return [list(ids) for ids in read(model, some, 30)]


def content(batch: Batch) -> list[Any]:
    """All of a batch but its texts."""
    arrays = (batch.query_B, batch.positive_B, batch.negative_BK, batch.same_BB, batch.known_P2)
    return [batch.source, batch.in_batch, *(array.tolist() for array in arrays)]


# --- The same rows, batches and questions


def test_rows_of_a_store_are_the_rows_it_was_made_of(
    folders: Folders, tokenizer: Tokenizer, make_model: MakeModel
) -> None:
    """Texts by their token ids, which for these names are as different as the texts."""
    model, store = make_model(), open_store(folders.store)
    for listed, stored in zip(loaded(folders.rows), loaded(folders.store), strict=True):
        assert isinstance(stored, NumberedRows) and stored.source == listed.source
        assert list(stored.query_lang) == listed.query_lang
        assert ids_of(model, store, list(stored.query)) == ids_of(model, None, listed.query)
        for name in ("positives", "negatives"):
            for numbers, strings in zip(getattr(stored, name), getattr(listed, name), strict=True):
                assert ids_of(model, store, numbers) == ids_of(model, None, strings)
        labelled = [row for row, label in enumerate(listed.label) if label is not None]
        assert [row for row, label in enumerate(stored.label) if label is not None] == labelled
        known = [listed.label[row] for row in labelled]
        assert ids_of(model, store, [stored.label[row] for row in labelled]) == ids_of(model, None, known)
        assert {k: v.tolist() for k, v in stored.rows_by_language.items()} == {
            k: v.tolist() for k, v in listed.rows_by_language.items()
        }
        assert list(stored.rows_by_language) == list(dict.fromkeys(listed.query_lang))
        assert np.array_equal(stored.query_keys(), listed.query_keys())
        if not listed.is_retrieval:
            assert [m.tolist() for m in stored.rows_of_label] == [m.tolist() for m in listed.rows_of_label]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"instructions": False},
        {"document_instruction_rate": 1.0},
        {"cap": 35, "cap_by": "language", "language_temperature": 2.0},
        {"source_weights": {"groups": 3.0, "pairs": 0.0}, "steps": 40, "batch_size": 31},
        {"formats": ["retrieval"], "validation": Validation(rows=7, every=5)},
        {"validation": Validation(rows=9, every=5), "steps": 60},
    ],
    ids=str,
)
def test_batches_from_a_store_are_those_from_its_rows(
    folders: Folders, settings: Settings, make_model: MakeModel, changes: dict[str, Any]
) -> None:
    config = settings(**{**RICH, "steps": 50, **changes})
    model, store = make_model(), open_store(folders.store)
    divided = [split(config, loaded(folder, config.formats), seed=5) for folder in folders]
    from_rows, from_store = (make_sampler(config, rows, 5) for rows, _ in divided)
    drawn = set()
    for step in range(config.steps or 0):
        expected, batch = from_rows[step], from_store[step]
        assert content(batch) == content(expected)
        assert ids_of(model, store, batch.texts) == ids_of(model, None, expected.texts)
        drawn.add(batch.source)
    assert len(drawn) == 3 if config.formats == ["retrieval"] else len(drawn) >= 5
    if config.validation:
        same_trials([prepare(config, held, 5) for _, held in divided], store, model)


def same_trials(both: list[list[Trial]], store: TokenStore, model: Any) -> None:
    for expected, trial in zip(*both, strict=True):
        assert (trial.source, trial.rows) == (expected.source, expected.rows) and trial.rows > 0
        assert ids_of(model, store, trial.texts) == ids_of(model, None, expected.texts)
        assert trial.candidate_C.tolist() == expected.candidate_C.tolist()
        for one, other in zip(trial.questions, expected.questions, strict=True):
            assert (one.text, one.lang, one.own) == (other.text, other.lang, other.own)
            assert one.right_R.tolist() == other.right_R.tolist()
        for (batch, place_N), (other_batch, other_N) in zip(trial.batches, expected.batches, strict=True):
            assert content(batch) == content(other_batch) and place_N.tolist() == other_N.tolist()


@pytest.mark.parametrize("count", [1, 4, 9])
def test_the_same_rows_are_held_out(folders: Folders, count: int) -> None:
    """By what they are, since parts of a store know the hashes of their rows' texts."""
    for listed, stored in zip(loaded(folders.rows), loaded(folders.store), strict=True):
        for seed in range(5):
            pairs = zip(hold_out(listed, count, seed), hold_out(stored, count, seed), strict=True)
            for some, numbered in pairs:
                assert len(some) == len(numbered)
                assert np.array_equal(some.query_keys(), numbered.query_keys())
        assert 0 < len(hold_out(stored, 9, 0)[1]) <= 9


# --- The same weights


def run(
    folder: Path, settings: TrainStage, base: Path, out: Path, teacher: Path | None = None
) -> dict[str, torch.Tensor]:
    train_stage(
        settings, data=folder, base=base, tokenizer=None, teacher=teacher, out=out, seed=5, recipe_hash="0"
    )
    return weights(load_model(out))


@pytest.mark.parametrize("taught", [False, True])
def test_weights_from_a_store_are_those_from_its_rows(
    folders: Folders,
    settings: Settings,
    model_folder: Path,
    make_model: MakeModel,
    tmp_path: Path,
    taught: bool,
) -> None:
    """With validation that stops early, and with a teacher of the same tokenizer; the logs are the same too."""
    given: dict[str, Any] = {"validation": Validation(rows=6, every=3, patience=2), "steps": 12}
    teacher = None
    if taught:
        save_model(teacher := tmp_path / "teacher", make_model(seed=1, hidden_size=32))
        given = {"teacher": "teacher", "steps": 8}
    config = settings(**RICH, **given, max_length=CUT)
    expected = run(folders.rows, config, model_folder, tmp_path / "rows", teacher)
    found = run(folders.store, config, model_folder, tmp_path / "stored", teacher)
    assert same_bits(found, expected)
    assert whole_log(tmp_path / "stored") == whole_log(tmp_path / "rows")
    store = open_store(folders.store)
    assert sum(len(ids) > CUT for ids in store.tokens(np.arange(len(store)))) > 50
    assert not same_bits(found, weights(load_model(model_folder)))


def test_a_run_from_a_store_that_was_cut_goes_on_to_the_same_weights(
    folders: Folders, settings: Settings, make_model: MakeModel, tmp_path: Path
) -> None:
    config = settings(**RICH, steps=9, checkpoint_every=2, validation=Validation(rows=6, every=4))
    expected = make_model()
    rows, held_out = split(config, loaded(folders.rows), 5)
    train(config, expected, make_sampler(config, rows, 5), None, tmp_path / "rows", held_out=held_out)
    for cut in (5, 7, None):  # steps 0 to 4, 4 to 6, and 6 to the end
        model, store = make_model(), open_store(folders.store)
        stored, held_out = split(config, load_sources(store, store.sources, FORMATS), 5)
        sampler: Sampler = Stopped(make_sampler(config, stored, 5), {cut: interrupt} if cut else {})
        with suppress(KeyboardInterrupt):
            out = tmp_path / "stored"
            train(config, model, sampler, None, out, held_out=held_out, read=reader_of(store))
    assert isinstance(sampler, Stopped) and sampler.made == [6, 7, 8]
    assert same_bits(weights(model), weights(expected))
    assert whole_log(tmp_path / "stored") == whole_log(tmp_path / "rows")


# --- What a store cannot give


def test_another_tokenizer_is_refused_for_model_and_teacher(
    folders: Folders, settings: Settings, model_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    (other / "f2llm.json").unlink()  # a folder that is not ours may have any tokenizer that fits
    changed = json.loads(tokenizer.to_str())
    changed["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(UsageError, match=r"ids of another tokenizer.* than the model.*folder of rows itself"):
        run(folders.store, settings(), other, tmp_path / "out")
    with pytest.raises(UsageError, match="ids of another tokenizer.* than the teacher"):
        run(folders.store, settings(teacher="t/"), model_folder, tmp_path / "out", other)


def test_a_store_without_the_prompts_is_refused_where_they_are_wanted(
    folders: Folders, settings: Settings, model_folder: Path, tmp_path: Path
) -> None:
    build(folders.rows, tmp_path / "store", {"asked": query_prefix("Do asked")})
    with pytest.raises(
        UsageError, match=r"queries of pairs behind the prompt '', expected 'Instruct: Do pairs"
    ):
        run(tmp_path / "store", settings(), model_folder, tmp_path / "out")
    config = settings(steps=3, instructions=False)
    found = run(tmp_path / "store", config, model_folder, tmp_path / "bare")
    assert same_bits(found, run(folders.rows, config, model_folder, tmp_path / "rows"))


# --- Memory


def repeated(folder: Path, tokenizer: Tokenizer, times: int) -> Path:
    """A store whose one part of 4,000 rows is there `times` times."""
    rng, count = np.random.default_rng(0), 4000
    source = Source(
        name="s", format="retrieval", task="t", symmetric=True, instruction="Find", licence="CC0-1.0"
    )
    columns: dict[str, list[Any]] = {
        "query": [f"q{i}" for i in range(count)],
        "query_lang": ["eng", "fra"] * (count // 2),
        "positives": [[f"p{i}"] for i in range(count)],
        "negatives": [[f"p{i}" for i in some] for some in rng.integers(count, size=(count, 7)).tolist()],
    }
    write_rows(folder / "rows", rows_table(source, columns), [source])
    tokenizer.save(str(folder / "tokenizer.json"))
    build(folder / "rows", folder / "store", {"s": query_prefix("Find")})
    header = json.loads((folder / "store" / "store.json").read_text())
    header["parts"] *= times
    (folder / "store" / "store.json").write_text(json.dumps(header))
    for number in range(1, times):
        os.link(folder / "store" / "part-00000.bin", folder / "store" / f"part-{number:05}.bin")
    return folder / "store"


def test_memory_of_a_store_is_a_few_bytes_a_row(
    tokenizer: Tokenizer, settings: Settings, tmp_path: Path
) -> None:
    """200,000 rows with eight documents each: what stays in memory, of Python's objects and NumPy's arrays.

    Numbers of rows and of queries take 4 bytes each, an order by language 4, queries that come again 8, and an epoch 12
    for each row in it.
    """
    folder = repeated(tmp_path, tokenizer, 50)
    config = settings(**{**RICH, "batch_size": 500, "steps": 5, "cap": 20_000})
    tracemalloc.start()
    try:
        store = open_store(folder)
        before, _ = tracemalloc.get_traced_memory()
        sampler = make_sampler(config, load_sources(store, store.sources, FORMATS), 5)
        batch = sampler[0]
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(batch.query_B) == 500 and store.row_count == 200_000
    assert (after - before) / store.row_count < 32
    assert (peak - before) / store.row_count < 100
