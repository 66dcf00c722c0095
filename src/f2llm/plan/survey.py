"""What a training stage's rows amount to, before any of them is trained on: rows in an epoch, tokens of a query.

Where the folder of canonical rows is there, rows are counted and a sample of each source is measured, with the
tokenizer if that is there too; the texts of a token store are measured already. Otherwise both are assumed: the rows
that the user gives, those published for the paper's two stages (told by the folder's name), or ROWS; and the same
number of tokens for every text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from f2llm.data.rows import ROWS_FILE, SOURCES_FILE, Source
from f2llm.data.token_store import open_store
from f2llm.data.token_store_format import STORE_FILE
from f2llm.errors import F2Error
from f2llm.family import STAGES
from f2llm.files import read_json
from f2llm.model.prompts import query_prefix
from f2llm.plan.cost import Load
from f2llm.recipe_train import TrainStage
from f2llm.rng import generator
from f2llm.tokenizer_file import load_tokenizer
from f2llm.train.sources import LARGEST_SHARE, Text

ROWS = 1_000_000  # of an epoch, where nothing tells
TOKENS_PER_TEXT = (
    128  # documents of retrieval data in 20 languages have 130 on average, queries 27 (Qwen3's tokenizer)
)
BYTES_PER_TOKEN = (
    3.5  # of UTF-8, where there is no tokenizer: the median over texts in 100 languages, 2.4 to 4.7
)
SAMPLE = 200  # rows of each source whose texts are measured
MEASURED = ["source", "query", "positives", "negatives", "label"]

CountTokens = Callable[[Sequence[Text]], list[int]]


@dataclass(frozen=True)
class Survey:
    """What is known or assumed of a stage's data."""

    rows: int  # in an epoch, after cap and validation
    held_out: int  # for validation
    query: Load  # a query with its positive and hard negatives, in the mean over the batches of an epoch
    basis: str  # where these numbers come from


def survey(
    stage: TrainStage, folder: Path, tokenizer: Path | None, rows: int | None, tokens_per_text: int
) -> Survey:
    """Count and measure the rows in `folder`, or assume them.

    Args:
        folder: of canonical rows, or a token store; it need not be there.
        tokenizer: a tokenizer.json that measures texts, or None.
        rows, tokens_per_text: what to assume where the folder is not there (rows: None for the defaults).
    """
    if (folder / STORE_FILE).is_file():
        return _measured(stage, folder, _of_store(stage, folder))
    if (folder / ROWS_FILE).exists():
        return _measured(stage, folder, _of_folder(stage, folder, tokenizer))
    return _assumed(stage, folder, rows, tokens_per_text)


def _assumed(stage: TrainStage, folder: Path, rows: int | None, tokens_per_text: int) -> Survey:
    published = STAGES.get(PurePath(folder).name)
    if rows is not None:
        basis = "rows as given"
    elif published:
        rows, basis = published.rows, "rows as in the paper"
    else:
        rows, basis = ROWS, f"{ROWS:,} rows assumed"
    negatives = stage.hard_negatives.model_dump()
    texts = 2 + (
        negatives["retrieval"] if "retrieval" in stage.formats else max(negatives[f] for f in stage.formats)
    )
    tokens = min(tokens_per_text, stage.max_length)
    basis = f"{folder} is not there: {basis}, {tokens} tokens a text"
    return Survey(rows, 0, Load.of([tokens]) * texts, basis)


class _Texts(NamedTuple):
    """Texts of some rows of one source: as they are, and behind its prompt."""

    query: tuple[list[Text], list[Text]]
    documents: tuple[list[list[Text]], list[list[Text]]]  # of each row the first positive, then its negatives
    label: tuple[list[Text], list[Text]]


class _Rows(NamedTuple):
    """Rows of a folder, as far as they are read to be counted."""

    sources: list[Source]
    source_of_row: np.ndarray  # index into `sources`
    language_of_row: np.ndarray
    sample: Callable[
        [list[tuple[Source, np.ndarray]]], Iterator[_Texts]
    ]  # texts of rows by number, by source
    count_tokens: CountTokens
    how: str  # tokens are counted


def _measured(stage: TrainStage, folder: Path, rows: _Rows) -> Survey:
    """Sources count as often as they are drawn: by their rows after the cap, times their weight."""
    own = [
        (source, numbers)
        for number, source in enumerate(rows.sources)
        if source.format in stage.formats
        and stage.source_weights.get(source.name, 1.0)
        and len(numbers := np.flatnonzero(rows.source_of_row == number))
    ]
    if not own:
        raise F2Error(
            f"{folder} has no rows to draw of the formats {list(stage.formats)}; name other formats or another folder."
        )
    picked = [(s, generator(0, "survey", s.name).permutation(numbers)[:SAMPLE]) for s, numbers in own]
    held_out, drawn, query = 0, 0.0, Load(0, 0, 0)
    for (source, numbers), texts in zip(own, rows.sample(picked), strict=True):
        kept_back = min(stage.validation.rows, len(numbers) // LARGEST_SHARE) if stage.validation else 0
        # Of the whole source where the cap is not by language.
        group_of_row = rows.language_of_row[numbers] * (stage.cap_by == "language")
        capped = min(
            int(np.minimum(np.bincount(group_of_row), stage.cap or len(numbers)).sum()),
            len(numbers) - kept_back,
        )
        held_out += kept_back
        weight = capped * stage.source_weights.get(source.name, 1.0)
        query, drawn = query + _query_load(stage, source, texts, rows.count_tokens) * weight, drawn + weight
    return Survey(
        round(drawn), held_out, query * (1 / drawn), f"counted in {folder}, texts sampled, {rows.how}"
    )


def _of_folder(stage: TrainStage, folder: Path, tokenizer: Path | None) -> _Rows:
    path = folder / ROWS_FILE
    sources = [Source(**values) for values in read_json(folder / SOURCES_FILE)]
    columns = pq.read_table(path, columns=["source", "query_lang"], read_dictionary=["source", "query_lang"])

    def sample(picked: list[tuple[Source, np.ndarray]]) -> Iterator[_Texts]:
        rows = np.sort(np.concatenate([numbers for _, numbers in picked]))
        table = ds.dataset(path).take(pa.array(rows), columns=MEASURED)
        for source, _ in picked:
            own = table.filter(pc.equal(table["source"], source.name)).to_pydict()
            prefix = query_prefix(source.instruction) if stage.instructions and source.instruction else ""
            documents = [
                [*given[:1], *others]
                for given, others in zip(own["positives"], own["negatives"], strict=True)
            ]
            yield _Texts(
                (own["query"], [prefix + text for text in own["query"]]),
                (documents, [[prefix + text for text in some] for some in documents]),
                (own["label"], [prefix + (label or "") for label in own["label"]]),
            )

    return _Rows(
        sources,
        _numbers(columns["source"], [source.name for source in sources]),
        _numbers(columns["query_lang"], columns["query_lang"].unique().to_pylist()),
        sample,
        _counter(tokenizer, stage.max_length),
        "with the tokenizer" if tokenizer else f"with {BYTES_PER_TOKEN} bytes a token",
    )


def _of_store(stage: TrainStage, folder: Path) -> _Rows:
    store = open_store(folder)

    def sample(picked: list[tuple[Source, np.ndarray]]) -> Iterator[_Texts]:
        for _, numbers in picked:
            rows = store.rows(np.sort(numbers))
            plain = [
                [*given[:1], *others] for given, others in zip(rows.positives, rows.negatives, strict=True)
            ]
            asked = zip(rows.positives_asked, rows.negatives_asked, strict=True)
            yield _Texts(
                (rows.query.tolist(), rows.query_asked.tolist()),
                (plain, [[*given[:1], *others] for given, others in asked]),
                (rows.label.tolist(), rows.label_asked.tolist()),
            )

    return _Rows(
        store.sources,
        store.column("source"),
        store.column("query_lang"),
        sample,
        lambda texts: [len(ids) for ids in store.tokens(texts, stage.max_length)],
        "as they are stored",
    )


def _numbers(column: pa.ChunkedArray, names: list[str]) -> np.ndarray:
    """int64 [rows]: the place of each row's value in `names`."""
    parts = [np.zeros(0, np.int64)]
    for chunk in column.chunks:
        place = np.asarray([names.index(name) for name in chunk.dictionary.to_pylist()], np.int64)
        parts.append(place[chunk.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(parts)


def _counter(tokenizer: Path | None, max_length: int) -> CountTokens:
    """A function from texts to their numbers of tokens, EOS included, cut at `max_length`."""
    if tokenizer is None:
        return lambda texts: [
            min(max_length, 1 + round(len(text.encode()) / BYTES_PER_TOKEN)) for text in texts
        ]
    loaded = load_tokenizer(tokenizer)
    # A language model's tokenizer appends no EOS yet.
    missing = 0 if loaded.encode("").ids else 1
    return lambda texts: [
        min(max_length, missing + len(encoded.ids)) for encoded in loaded.encode_batch_fast(list(texts))
    ]


def _query_load(stage: TrainStage, source: Source, texts: _Texts, count_tokens: CountTokens) -> Load:
    """The mean over sampled rows of what a query brings: itself, its positive and its hard negatives.

    Texts that a batch has twice are computed once; that is accounted for where it matters, in two-way
    classification, whose documents are the labels.
    """
    negatives = stage.hard_negatives.model_dump()[source.format]
    prompted = bool(stage.instructions and source.instruction)
    rate = stage.document_instruction_rate if prompted and source.symmetric else 0.0

    def documents(asked: bool) -> list[Text]:
        if source.format == "retrieval":
            return [text for some in texts.documents[asked] for text in some[: 1 + negatives]]
        return texts.query[asked] if source.format == "clustering" else sorted(set(texts.label[asked]))

    def mean(some: list[Text]) -> Load:
        return Load.of(count_tokens(some)) * (1 / len(some))

    count = len(documents(asked=False))
    if source.format == "retrieval":
        per_query = count / len(texts.query[0])
    else:
        per_query = (
            1 + negatives if source.format == "clustering" else min(1 + negatives, count / stage.batch_size)
        )
    load = mean(texts.query[prompted]) + mean(documents(asked=False)) * (per_query * (1 - rate))
    return load + mean(documents(asked=True)) * (per_query * rate) if rate else load
