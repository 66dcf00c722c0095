"""What a training stage's rows amount to, before any of them is trained on: rows in an epoch, tokens of a query.

Where the folder of canonical rows is there, rows are counted and a sample of each source is measured, with the
tokenizer if that is there too. Otherwise both are assumed: the rows that the user gives, those published for the
paper's two stages (told by the folder's name), or ROWS; and the same number of tokens for every text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from f2llm.data.rows import ROWS_FILE, SOURCES_FILE, Source
from f2llm.errors import F2Error
from f2llm.family import STAGES
from f2llm.files import read_json
from f2llm.model.prompts import query_prefix
from f2llm.plan.cost import Load
from f2llm.recipe import TrainStage
from f2llm.rng import generator
from f2llm.tokenizer_file import load_tokenizer
from f2llm.train.sources import LARGEST_SHARE

ROWS = 1_000_000  # of an epoch, where nothing tells
TOKENS_PER_TEXT = (
    128  # documents of retrieval data in 20 languages have 130 on average, queries 27 (Qwen3's tokenizer)
)
BYTES_PER_TOKEN = (
    3.5  # of UTF-8, where there is no tokenizer: the median over texts in 100 languages, 2.4 to 4.7
)
SAMPLE = 200  # rows of each source whose texts are measured
MEASURED = ["source", "query", "positives", "negatives", "label"]

CountTokens = Callable[[Sequence[str]], list[int]]


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
        folder: of canonical rows; it need not be there.
        tokenizer: a tokenizer.json that measures texts, or None.
        rows, tokens_per_text: what to assume where the folder is not there (rows: None for the defaults).
    """
    if (folder / ROWS_FILE).is_file():
        return _measured(stage, folder, tokenizer)
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


def _measured(stage: TrainStage, folder: Path, tokenizer: Path | None) -> Survey:
    """Sources count as often as they are drawn: by their rows after the cap, times their weight."""
    path = folder / ROWS_FILE
    everything = [Source(**values) for values in read_json(folder / SOURCES_FILE)]
    columns = pq.read_table(path, columns=["source", "query_lang"], read_dictionary=["source", "query_lang"])
    source_of_row = _numbers(columns["source"], [source.name for source in everything])
    languages = columns["query_lang"].unique().to_pylist() if stage.cap_by == "language" else []
    language_of_row = (
        _numbers(columns["query_lang"], languages) if languages else np.zeros_like(source_of_row)
    )
    own = [
        (source, numbers)
        for number, source in enumerate(everything)
        if source.format in stage.formats
        and stage.source_weights.get(source.name, 1.0)
        and len(numbers := np.flatnonzero(source_of_row == number))
    ]
    if not own:
        raise F2Error(
            f"{folder} has no rows to draw of the formats {list(stage.formats)}; name other formats or another folder."
        )
    picked = [generator(0, "survey", s.name).permutation(numbers)[:SAMPLE] for s, numbers in own]
    sample = ds.dataset(path).take(pa.array(np.sort(np.concatenate(picked))), columns=MEASURED)
    count_tokens = _counter(tokenizer, stage.max_length)
    held_out, drawn, query = 0, 0.0, Load(0, 0, 0)
    for source, numbers in own:
        kept_back = min(stage.validation.rows, len(numbers) // LARGEST_SHARE) if stage.validation else 0
        per_language = np.bincount(language_of_row[numbers])
        capped = min(int(np.minimum(per_language, stage.cap or len(numbers)).sum()), len(numbers) - kept_back)
        held_out += kept_back
        weight = capped * stage.source_weights.get(source.name, 1.0)
        texts = sample.filter(pc.equal(sample["source"], source.name))
        query, drawn = query + _query_load(stage, source, texts, count_tokens) * weight, drawn + weight
    how = "the tokenizer" if tokenizer else f"{BYTES_PER_TOKEN} bytes a token"
    return Survey(
        round(drawn), held_out, query * (1 / drawn), f"counted in {folder}, texts sampled, with {how}"
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


def _query_load(stage: TrainStage, source: Source, sample: pa.Table, count_tokens: CountTokens) -> Load:
    """The mean over sampled rows of what a query brings: itself, its positive and its hard negatives.

    Texts that a batch has twice are computed once; that is accounted for where it matters, in two-way
    classification, whose documents are the labels.
    """
    negatives = stage.hard_negatives.model_dump()[source.format]
    texts = sample["query"].to_pylist()
    if source.format == "retrieval":
        lists = zip(sample["positives"].to_pylist(), sample["negatives"].to_pylist(), strict=True)
        documents = [text for positives, others in lists for text in (positives[0], *others[:negatives])]
        per_query = len(documents) / len(texts)
    elif source.format == "clustering":
        documents, per_query = texts, 1 + negatives
    else:
        documents = sorted(set(sample["label"].to_pylist()))
        per_query = min(1 + negatives, len(documents) / stage.batch_size)
    prefix = query_prefix(source.instruction) if stage.instructions and source.instruction else ""
    rate = stage.document_instruction_rate if prefix and source.symmetric else 0.0

    def mean(some: list[str]) -> Load:
        return Load.of(count_tokens(some)) * (1 / len(some))

    load = mean([prefix + text for text in texts]) + mean(documents) * (per_query * (1 - rate))
    return load + mean([prefix + text for text in documents]) * (per_query * rate) if rate else load
