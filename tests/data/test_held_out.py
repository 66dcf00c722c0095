"""Tasks of MTEB, the real package: what counts as a test text is what its own evaluation has a model encode."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from f2llm.data.held_out import _has_text, held_out_texts
from f2llm.errors import F2Error, UsageError

mteb = pytest.importorskip("mteb", reason="the package mteb is not installed")

from datasets import Dataset, DatasetDict  # noqa: E402
from mteb.abstasks import (  # noqa: E402
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models.model_meta import ModelMeta  # noqa: E402

SPLITS = ("test", "train")
TWO_LANGUAGES = {"deu": ["deu-Latn"], "hin": ["hin-Deva"]}
BASES = {
    "Retrieval": AbsTaskRetrieval,
    "Classification": AbsTaskClassification,
    "Clustering": AbsTaskClustering,
    "STS": AbsTaskSTS,
    "BitextMining": AbsTaskBitextMining,
}
SCORES = {
    "Retrieval": "ndcg_at_10",
    "Clustering": "v_measure",
    "STS": "cosine_spearman",
    "BitextMining": "f1",
}

Make = Callable[[str], Any]


def texts(about: str, count: int = 4) -> list[str]:
    return [f"{about}, sentence {number}" for number in range(count)]


def pairs(about: str) -> Dataset:
    scores = [0.0, 1.0, 3.0, 5.0]
    return Dataset.from_dict(
        {"sentence1": texts(f"{about} left"), "sentence2": texts(f"{about} right"), "score": scores}
    )


def labelled(about: str) -> Dataset:
    labels = ["a label that is a sentence of its own", "b", "c", "d"]
    return Dataset.from_dict({"text": texts(about), "label": labels})


def clusters(about: str) -> Dataset:
    return Dataset.from_dict({"sentences": texts(about), "labels": ["a label that is a sentence", "b"] * 2})


def collection(about: str) -> dict[str, Any]:
    """A retrieval split as MTEB has them, with ids that read like texts."""
    ids = [f"{about} identifier of the document {number}" for number in range(4)]
    asked = [f"{about} identifier of the query {number}" for number in range(4)]
    return {
        "corpus": Dataset.from_dict({"id": ids, "text": texts(f"{about} document")}),
        "queries": Dataset.from_dict({"id": asked, "text": texts(f"{about} query")}),
        "relevant_docs": {query: {document: 1} for query, document in zip(asked, ids, strict=True)},
        "top_ranked": dict.fromkeys(asked, ids),
    }


def split(make: Make, about: str) -> Any:
    """A test split and a training split."""
    both = {at: make(f"{about} {at}") for at in SPLITS}
    return both if make is collection else DatasetDict(both)


def by_language(make: Make) -> Any:
    return {language: split(make, language) for language in TWO_LANGUAGES}


def old_format(task: Any) -> None:
    """As older retrieval tasks load: dictionaries by split beside `dataset`, documents with a title or without."""
    for part, name in (("document", "corpus"), ("query", "queries")):
        given = {
            at: {f"{at} {part} {n}": text for n, text in enumerate(texts(f"{at} {part}"))} for at in SPLITS
        }
        setattr(task, name, given)
    task.relevant_docs = {
        at: {f"{at} query {n}": {f"{at} document {n}": 1} for n in range(4)} for at in SPLITS
    }


def parallel(task: Any) -> None:
    """As bitexts with one column for each language load."""
    task.parallel_subsets = True
    columns = {language: texts(language) for language in ("deu_Latn", "hin_Deva", "eng_Latn")}
    task.dataset = DatasetDict({"test": Dataset.from_dict(columns), "train": labelled("train")})


TASKS: dict[str, tuple[str, Any, Any]] = {
    # Type, languages, and the data or what sets it.
    "Search": ("Retrieval", ["eng-Latn"], {"default": split(collection, "eng")}),
    "SearchInTwo": ("Retrieval", TWO_LANGUAGES, by_language(collection)),
    "SearchOfOld": ("Retrieval", ["eng-Latn"], old_format),
    "Topics": ("Classification", ["eng-Latn"], split(labelled, "eng")),
    "TopicsInTwo": ("Classification", TWO_LANGUAGES, by_language(labelled)),
    "Groups": ("Clustering", ["eng-Latn"], split(clusters, "eng")),
    "Alike": ("STS", ["eng-Latn"], split(pairs, "eng")),
    "AlikeInTwo": ("STS", TWO_LANGUAGES, by_language(pairs)),
    "Bitext": ("BitextMining", TWO_LANGUAGES, by_language(pairs)),
    "BitextInColumns": (
        "BitextMining",
        {"deu_Latn-hin_Deva": ["deu-Latn", "hin-Deva"], "hin_Deva-eng_Latn": ["hin-Deva", "eng-Latn"]},
        parallel,
    ),
}


def make_task(name: str) -> Any:
    """A task of MTEB of our own: a class of the kind that its authors write, but that it loads what is here."""
    kind, languages, data = TASKS[name]

    def load_data(self: Any, **settings: Any) -> None:
        if callable(data):
            data(self)
        else:
            self.dataset = data
        self.data_loaded = True

    metadata = TaskMetadata(
        name=name,
        description=name,
        dataset={"path": "none", "revision": "none"},
        type=kind,
        eval_splits=["test"],
        eval_langs=languages,
        main_score=SCORES.get(kind, "accuracy"),
    )
    more = {"max_fraction_of_documents_to_embed": None} if kind == "Clustering" else {}
    return type(name, (BASES[kind],), {"metadata": metadata, "load_data": load_data, **more})()


class Recorder:
    """A model that says what MTEB has it encode of the splits that are scored."""

    mteb_model_meta = ModelMeta.create_empty()

    def __init__(self) -> None:
        self.encoded: set[str] = set()
        self.rng = np.random.default_rng(0)

    def encode(self, inputs: Any, *, hf_split: str, **settings: Any) -> Any:
        rows = [text for batch in inputs for text in batch["text"]]
        if hf_split != "train":
            self.encoded.update(rows)
        return self.rng.normal(size=(len(rows), 4))

    def similarity(self, one: Any, other: Any) -> Any:
        import torch

        return torch.as_tensor(np.asarray(one) @ np.asarray(other).T)

    def similarity_pairwise(self, one: Any, other: Any) -> Any:
        import torch

        return torch.as_tensor((np.asarray(one) * np.asarray(other)).sum(-1))


def given(name: str) -> list[str]:
    batches = list(held_out_texts([], [name]))
    assert {batch.name for batch in batches} == {name}
    return [text for batch in batches for text in batch.texts]


@pytest.mark.filterwarnings("ignore")  # of so few texts, scores are hard to make
@pytest.mark.parametrize("name", TASKS)
def test_what_is_held_out_is_what_mteb_encodes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mteb, "get_task", make_task)
    recorder = Recorder()
    make_task(name).evaluate(recorder, "test", encode_kwargs={"batch_size": 2})
    found = given(name)
    assert len(recorder.encoded) >= 4
    assert {text.strip() for text in found} - {""} == {text.strip() for text in recorder.encoded}
    assert not any("train" in text or "identifier" in text or "label" in text for text in found)


class Hub:
    """What the library `datasets` would fetch: (repository, configuration) -> splits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, data: dict[tuple[str, str | None], Any]) -> None:
        self.data = data
        loader = sys.modules["mteb.abstasks.retrieval_dataset_loaders"]
        monkeypatch.setattr(sys.modules["mteb.abstasks.abstask"], "load_dataset", self.load)
        monkeypatch.setattr(loader, "load_dataset", self.load)
        monkeypatch.setattr(loader, "get_dataset_config_names", self.configurations)
        monkeypatch.setattr(loader, "get_dataset_split_names", self.splits)

    def load(self, path: str, name: str | None = None, split: str | None = None, **settings: Any) -> Any:
        found = self.data[path, name]
        return DatasetDict(found) if split is None else found[split]

    def configurations(self, path: str, revision: str) -> list[str]:
        return [name for repository, name in self.data if repository == path and name]

    def splits(self, path: str, *, config_name: str, **settings: Any) -> list[str]:
        return list(self.data[path, config_name])


def search_on_hub(repository: str, about: str) -> dict[tuple[str, str | None], Any]:
    """A retrieval dataset: queries of all splits together, told apart by the relevant documents of each split."""
    documents = [
        {"_id": f"d{n}", "title": f"{about} title {n}", "text": f"{about} text {n}"} for n in range(3)
    ]
    queries = [{"_id": f"{at}{n}", "text": f"{about} {at} query {n}"} for at in SPLITS for n in range(2)]
    relevant = {
        at: Dataset.from_list([{"query-id": f"{at}{n}", "corpus-id": f"d{n}", "score": 1} for n in range(2)])
        for at in SPLITS
    }
    return {
        (repository, "corpus"): {"corpus": Dataset.from_list(documents)},
        (repository, "queries"): {"queries": Dataset.from_list(queries)},
        (repository, "default"): relevant,
    }


def of_search(about: str) -> list[str]:
    documents = [f"{about} {part} {n}" for part in ("title", "text") for n in range(3)]
    return sorted(documents + [f"{about} test query {n}" for n in range(2)])


def test_a_retrieval_task_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, search_on_hub("mteb/scifact", "science"))
    assert sorted(given("SciFact")) == of_search("science")


def test_a_task_made_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    members = mteb.get_task("CQADupstackRetrieval").tasks
    paths = {task.metadata.name: task.metadata.dataset["path"] for task in members}
    data = [search_on_hub(path, name) for name, path in paths.items()]
    Hub(monkeypatch, {key: splits for one in data for key, splits in one.items()})
    found = {batch.name: sorted(batch.texts) for batch in held_out_texts([], ["CQADupstackRetrieval"])}
    assert len(found) > 10 and found == {name: of_search(name) for name in paths}


def test_a_task_of_several_languages_and_splits_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    task = mteb.get_task("AmazonCounterfactualClassification")
    path, splits = task.metadata.dataset["path"], [*task.metadata.eval_splits, "train"]
    data = {
        language: {
            at: Dataset.from_dict({"text": texts(f"{language} {at}", 40), "label": [0, 1] * 20})
            for at in splits
        }
        for language in task.hf_subsets
    }
    Hub(monkeypatch, {(path, language): one for language, one in data.items()})
    wanted = [f"{language} {at}" for language in data for at in splits if at != "train"]
    found = given("AmazonCounterfactualClassification")
    assert len(wanted) >= 4 and sorted(found) == sorted(text for one in wanted for text in texts(one, 40))


def test_pictures_are_neither_decoded_nor_read() -> None:
    file = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    assert [_has_text(kind) for kind in (file, pa.list_(file), pa.int64(), pa.list_(pa.float32()))] == [
        False
    ] * 4
    turns = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    assert [_has_text(kind) for kind in (pa.string(), pa.large_string(), turns)] == [True] * 3


def test_a_test_set_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(error: Exception) -> None:
        def fail(*arguments: Any, **settings: Any) -> None:
            raise error

        monkeypatch.setattr(sys.modules["mteb.abstasks.abstask"], "load_dataset", fail)

    answer(ConnectionError("no network"))
    with pytest.raises(F2Error, match=r"STS12 could not be loaded \(no network\)"):
        given("STS12")
    with pytest.raises(UsageError, match=r"no task 'STS21'.*Did you mean: 'STS\d+'"):
        given("STS21")
    Hub(monkeypatch, {("mteb/sts12-sts", None): {"train": pairs("train")}})
    with pytest.raises(F2Error, match="lacks the split 'test' of 'default'"):
        given("STS12")
    Hub(monkeypatch, {("mteb/sts12-sts", None): {"test": Dataset.from_dict({"score": [1.0]})}})
    with pytest.raises(F2Error, match="has no text"):
        given("STS12")
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(UsageError, match="needs the package mteb"):
        given("STS12")
