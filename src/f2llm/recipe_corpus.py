"""The stages of a recipe that make a corpus: settings alone; what they do is in data/, synthetic/ and mine/."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from f2llm.languages import tag
from f2llm.recipe_errors import problem
from f2llm.recipe_fields import DATA, DATA_OR_FOLDER, FILES, STAGE_OR_MODEL, TRAINED_OR_MODEL, Strict, Takes

PersonalAction = Literal["keep", "mask", "drop"]
Contamination = Literal["exact", "containment", "n-gram", "near duplicate"]
CONTAMINATIONS: tuple[Contamination, ...] = get_args(Contamination)
PoolOf = Literal["source", "language", "corpus"]
KindName = Literal[
    "short-long",
    "long-short",
    "short-short",
    "long-long",
    "paraphrase",
    "bitext",
    "classification",
    "clustering",
]
ALL_KINDS: list[KindName] = list(get_args(KindName))


class SourcesStage(Strict):
    """Rows of sources, from files that lie on this machine, as their records say."""

    stage: Literal["sources"]
    records: Annotated[list[str], FILES] = Field(
        min_length=1, description="files with records of sources, or folders of them"
    )
    root: str | None = Field(
        None,
        min_length=1,
        description="what the records' files are relative to; to the record's own folder, if left out",
    )
    sources: list[str] | None = Field(
        None, min_length=1, description="only these, by name; all of the records, if left out"
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="most records read of a source, drawn at random; of parallel texts, most pairs",
    )


class SyntheticStage(Strict):
    """Rows that a language model writes: first it proposes tasks for a language and a kind, then rows for each."""

    stage: Literal["synthetic"]
    model: str = Field(
        min_length=1,
        description="its name at the url; without a url, a folder or a hub name for transformers in this process",
    )
    url: str | None = Field(
        None,
        pattern=r"^https?://[^\s@?#]+$",
        description="an OpenAI-compatible server, such as http://localhost:8000/v1",
    )
    api_key_env: str | None = Field(
        None,
        min_length=1,
        description="environment variable that holds the key; it is never written anywhere",
    )
    languages: list[str] = Field(min_length=1, description="ISO 639-3 with an optional script: deu, zho_Hant")
    kinds: list[KindName] = Field(ALL_KINDS, min_length=1, description="kinds of task")
    other_language: str = Field("eng", description="what bitext translates into")
    tasks: int = Field(20, ge=1, description="tasks for each language and kind")
    rows: int = Field(20, ge=1, description="rows asked for each task")
    prompts: Annotated[str | None, FILES] = Field(
        None, min_length=1, description="folder of prompt files to use in place of those of the same names"
    )
    answers: str | None = Field(
        None,
        min_length=1,
        description="folder that keeps all answers, so that no run pays for one again; the stage's own if left out",
    )
    temperature: float = Field(1.0, ge=0, description="of the model's sampling")
    max_tokens: int = Field(2048, ge=1, description="most tokens of an answer")
    seed: int = Field(0, ge=0, description="of what is drawn for prompts, and sent to the server")
    concurrency: int = Field(16, ge=1, description="requests at once")
    timeout: float = Field(180.0, gt=0, description="seconds for an answer")
    retries: int = Field(5, ge=0, description="further attempts at a request")
    retry_pause: float = Field(
        1.0, gt=0, description="seconds before the second attempt, doubled with each further one"
    )
    price_in: float = Field(0.0, ge=0, description="money for a million tokens that are sent")
    price_out: float = Field(0.0, ge=0, description="money for a million tokens that are answered")
    budget_tokens: int | None = Field(None, ge=1, description="most tokens, of all runs with these answers")
    budget_money: float | None = Field(None, gt=0, description="most money, in the unit of the prices")
    licence: str = Field("unknown", min_length=1, description="SPDX name, by the terms of the model")
    language_sure: float | None = Field(
        0.9,
        gt=0,
        le=1,
        description="a text found to be of another language with this probability is rejected; null: nobody looks",
    )
    embedder: Annotated[str | None, TRAINED_OR_MODEL] = Field(
        None, description="model that must find the positive above the negative; nobody looks if left out"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.budget_money is not None and not (self.price_in or self.price_out):
            raise problem("'budget_money' needs 'price_in' and 'price_out'", "budget_money")
        for name in ("languages", "kinds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise problem(f"{name!r} has a value twice", name)
        for language in (*self.languages, self.other_language):
            if tag(language) != language:
                raise problem(f"{language!r} is written {tag(language)!r}", "languages")
        return self


class CleanStage(Strict):
    """Rows fit to be trained on. What is dropped is told by reason, source and language in report.json."""

    stage: Literal["clean"]
    data: Annotated[list[str], DATA] = Field(
        min_length=1,
        description="stages whose rows to clean; of repeats the first is kept, so put the best first",
    )
    min_characters: int = Field(1, ge=1, description="shortest text")
    max_characters: int | None = Field(100_000, ge=1, description="longest text; no limit if null")
    too_long: Literal["drop", "cut"] = Field("drop", description="what becomes of longer texts")
    equal_pairs: Literal["keep", "drop"] = Field(
        "drop", description="positives that are the very text of their query"
    )
    duplicates: Literal["keep", "exact", "near"] = Field(
        "exact", description="which rows that repeat an earlier row to drop; near: the exact ones too"
    )
    near_above: float = Field(
        0.8, gt=0, lt=1, description="similarity of texts (Jaccard, of short runs of characters) that is near"
    )
    language_tags: Literal["keep", "individual", "macrolanguage"] = Field(
        "keep", description="one name for languages with two, cmn or zho; keep: as the sources have them"
    )
    language_check: Literal["off", "report", "drop"] = Field(
        "off", description="tell the language of each query and first positive; drop rows tagged as another"
    )
    language_sure: float = Field(
        0.9, gt=0, le=1, description="probability of another language that counts against the tag"
    )
    emails: PersonalAction = Field("keep", description="texts with e-mail addresses")
    phones: PersonalAction = Field("keep", description="texts with international phone numbers")
    keys: PersonalAction = Field("mask", description="texts with access keys and private keys")
    cards: PersonalAction = Field("mask", description="texts with numbers of payment cards")
    ibans: PersonalAction = Field("mask", description="texts with bank account numbers (IBAN)")
    commercial_only: bool = Field(
        False, description="drop rows whose licence is not known to allow commercial use"
    )
    opt_out: Annotated[list[str], FILES] = Field(
        [], description="files of texts, row hashes and names of sources to leave out, one a line"
    )
    rows_per_source: int | None = Field(None, ge=1, description="most rows of one source")
    rows_per_language: int | None = Field(None, ge=1, description="most rows of one language of a source")


class Limits(Strict):
    """From how many words on texts are compared; 2 ideographs or 5 letters of Thai count as one word."""

    exact_words: int = Field(3, ge=1, description="shortest text for exact equality and near duplicates")
    contained_words: int = Field(8, ge=1, description="shortest text that may stand within another")
    ngram_words: int = Field(13, ge=1, description="length of a run of words that two texts may not share")
    threshold: float = Field(
        0.8, gt=0, lt=1, description="Jaccard similarity above which texts are near duplicates"
    )


class DecontaminateStage(Strict):
    """Rows without those that hold a test text."""

    stage: Literal["decontaminate"]
    data: Annotated[list[str], DATA] = Field(min_length=1, description="stages whose rows are judged")
    against: Annotated[list[str], FILES] = Field(
        [], description="files, folders and globs of test texts: Parquet, JSONL, CSV, TSV or plain text"
    )
    mteb_tasks: list[str] = Field([], description="tasks of MTEB whose test splits are not to be seen")
    methods: list[Contamination] = Field(
        list(CONTAMINATIONS), min_length=1, description="ways of looking for test texts"
    )
    limits: Limits = Field(Limits(), description="from how many words on texts are compared")

    @model_validator(mode="after")
    def _against_something(self) -> Self:
        if not self.against and not self.mteb_tasks:
            raise problem("give test texts: 'against' (files or folders) or 'mteb_tasks'")
        return self


class MineStage(Strict):
    """Hard negatives for retrieval rows: the most similar documents that are not right, by a model's judgement."""

    stage: Literal["mine"]
    data: Annotated[list[str], DATA_OR_FOLDER] = Field(
        min_length=1, description="stages with rows, or paths (with a slash) of folders of rows"
    )
    model: Annotated[str, STAGE_OR_MODEL] = Field(
        description="the miner: a train or prune stage, the path (with a slash) of a model folder, or a model of the "
        "hub, as owner/name or owner/name@revision"
    )
    candidates: int = Field(24, ge=1, description="most negatives mined for a row")
    skip_ranks: int = Field(
        0, ge=0, description="most similar documents that are passed over, as too likely to be right"
    )
    last_rank: int = Field(100, ge=1, description="how many of the most similar documents are looked at")
    absolute_margin: float | None = Field(
        None, ge=0, description="a negative scores at least this much less than the row's lowest positive"
    )
    relative_margin: float | None = Field(
        0.05, ge=0, description="the same as a share of the size of that positive's score"
    )
    max_score: float | None = Field(None, description="a negative scores at most this")
    cross_encoder: str | None = Field(
        None,
        min_length=1,
        description="a cross-encoder (folder or hub name) whose scores replace those of the model within the ranks",
    )
    pool: PoolOf = Field(
        "source",
        description="where negatives come from: rows of the same source, of the same language of documents, all",
    )
    given_negatives: Literal["keep", "replace"] = Field(
        "keep", description="whether mined negatives come behind those that a row has, or in their place"
    )
    instructions: bool = Field(True, description="whether queries carry their source's instruction")
    dim: int | None = Field(
        None, ge=1, description="how many dimensions of the vectors are compared; all if left out"
    )
    samples: int = Field(10, ge=0, description="rows of each source on the sheet to read")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.candidates > self.last_rank - self.skip_ranks:
            raise problem(
                f"'last_rank' ({self.last_rank}) must leave at least {self.candidates} 'candidates' after "
                f"'skip_ranks' ({self.skip_ranks})",
                "last_rank",
            )
        return self


class TokeniseStage(Strict):
    """Token ids of every distinct text of the rows, stored once, for training that reads them from disk."""

    stage: Literal["tokenise"]
    data: Annotated[list[str], DATA_OR_FOLDER] = Field(
        min_length=1,
        description="stages or folders of rows; put new ones last, and the others are not done again",
    )
    tokenizer: Annotated[str, Takes(("tokenizer", "train"), or_path=True)] = Field(
        description="stage or folder that has the tokenizer.json"
    )
    instructions: bool = Field(
        True, description="keep queries, and documents of symmetric sources, behind their instruction as well"
    )
