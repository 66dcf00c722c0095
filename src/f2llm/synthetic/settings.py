"""The settings of the stage that has a language model write training data."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from f2llm.languages import tag
from f2llm.recipe_errors import problem
from f2llm.recipe_fields import FILES, TRAINED_OR_MODEL, Strict
from f2llm.synthetic.kinds import KindName

ALL_KINDS: list[KindName] = list(get_args(KindName))


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
