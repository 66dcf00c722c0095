"""The stages of a recipe that make rows of text: settings alone, what they do is in data/, mine/ and synthetic/."""

from typing import Annotated, Literal

from pydantic import Field

from f2llm.recipe_fields import FILES, Format, Strict


class NamesStage(Strict):
    """Names of territories, languages, scripts ... in every language, from Unicode CLDR, as training rows."""

    stage: Literal["names"]
    min_names: int = Field(100, ge=1, description="leave out languages with fewer names than this")
    held_out_pairs: float = Field(
        0.1, ge=0, lt=1, description="share of (thing, language) pairs kept for the score"
    )
    held_out_things: float = Field(
        0.1, ge=0, lt=1, description="share of things kept out of training altogether"
    )
    positives: int = Field(8, ge=1, description="most names of the same thing written beside each name")
    languages: list[str] | None = Field(
        None,
        min_length=1,
        description="only these languages (ISO 639-3, optional script: zho_Hant); all if left out",
    )


class FilesStage(Strict):
    """A user's own rows: JSONL, CSV, TSV or Parquet."""

    stage: Literal["files"]
    files: Annotated[list[str], FILES] = Field(
        min_length=1, description="paths, relative to the current directory"
    )
    format: Format = Field(description="how rows are trained on: retrieval, clustering or classification")
    task: str = Field(
        min_length=1, description="the kind of task, such as question answering or bitext mining"
    )
    instruction: str = Field(
        min_length=1, description="what stands in front of a query when instructions are on"
    )
    symmetric: bool = Field(False, description="whether query and positive may change places")
    licence: str = Field("unknown", min_length=1, description="SPDX name of the rows' licence")
    query_lang: str = Field(
        "und", min_length=1, description="language of the queries, such as deu or zho_Hant"
    )
    positive_lang: str = Field("und", min_length=1, description="language of the positives")
