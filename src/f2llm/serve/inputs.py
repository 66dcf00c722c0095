"""What a request brings, as token ids: texts or token arrays, with a prompt, within the limits.

Every route accepts the same three fields that choose a prompt (`PromptFields`). A text that is too long is an error
unless the client asks for truncation, and the answer says how many were cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from f2llm.embed.embedder import Embedder
from f2llm.errors import UsageError
from f2llm.model.tokenizer import fit
from f2llm.serve.errors import ApiError
from f2llm.serve.token_arrays import Item, TokenIds

InputType = Literal[
    "query", "document", "search_query", "search_document", "passage", "classification", "clustering"
]

MAX_TEXTS = 2048
MAX_TOKENS = 300_000
MAX_INSTRUCTION = 1000  # characters; the prompt comes back in a header, and proxies cut long headers

# Names that clients have for the two sides of a search. What is classified or clustered stays bare.
PROMPTS = {
    "query": "query",
    "search_query": "query",
    "document": "document",
    "search_document": "document",
    "passage": "document",
    "classification": None,
    "clustering": None,
}


class Body(BaseModel):
    """A request's JSON: unknown keys are ignored, since clients send some; wrong types are not."""

    model_config = ConfigDict(strict=True, extra="ignore")


class PromptFields(Body):
    """What chooses the prompt in front of each text; accepted by every route."""

    input_type: InputType | None = Field(
        None, description="What the texts are; query puts its prompt in front."
    )
    prompt_name: Literal["query", "document"] | None = Field(None, description="The same, as TEI calls it.")
    instruction: str | None = Field(
        None,
        max_length=MAX_INSTRUCTION,
        description="The query's instruction instead of the model's default.",
    )

    def prompt(self) -> str | None:
        """query, document or None; ApiError where two fields say different things."""
        named = {PROMPTS[name] for name in (self.input_type, self.prompt_name) if name is not None}
        if len(named) > 1:
            raise ApiError(
                "invalid",
                f"`input_type` is {self.input_type!r} and `prompt_name` is {self.prompt_name!r}; give one of them.",
                field="prompt_name",
            )
        return named.pop() if named else None


def _items(value: Any) -> list[Item]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if value and all(type(item) is int for item in value):
            return [value]
        wrong = next((n for n, item in enumerate(value) if not _is_item(item)), None)
        if wrong is None:
            return value
        got = f"item {wrong} is {_name(value[wrong])}"
    else:
        got = f"got {_name(value)}"
    raise _wrong("expected a string, an array of strings, or token ids as integers; " + got)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise _wrong(f"expected an array of strings; got {_name(value)}")
    wrong = next((n for n, item in enumerate(value) if not isinstance(item, str)), None)
    if wrong is not None:
        raise _wrong(f"expected an array of strings; item {wrong} is {_name(value[wrong])}")
    return value


def _text_or_texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else _texts(value)


def _id_arrays(value: Any) -> list[list[int]]:
    items = _items(value)
    wrong = next((n for n, item in enumerate(items) if isinstance(item, str)), None)
    if wrong is not None:
        raise _wrong("expected token ids, or arrays of them; got a string")
    return items  # type: ignore[return-value]


def _is_item(item: Any) -> bool:
    return isinstance(item, str) or (isinstance(item, list) and all(type(token) is int for token in item))


def _wrong(sentence: str) -> PydanticCustomError:
    return PydanticCustomError("inputs", sentence)


def _name(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", dict: "an object", list: "an array", str: "a string"}
    return names.get(type(value), "a number")


# What the OpenAPI document says of inputs; `check_count` enforces the numbers.
_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[int], Field(min_length=1)]
_TextArray = Annotated[list[_Text], Field(min_length=1, max_length=MAX_TEXTS)]
_IdsArray = Annotated[list[_Ids], Field(min_length=1, max_length=MAX_TEXTS)]
_MixedArray = Annotated[list[_Text | _Ids], Field(min_length=1, max_length=MAX_TEXTS)]

# Our own checks in one pass: of a union, pydantic would report every way in which every item is wrong.
Items = Annotated[
    list[Item], PlainValidator(_items, json_schema_input_type=_Text | _TextArray | _Ids | _IdsArray)
]
MixedItems = Annotated[list[Item], PlainValidator(_items, json_schema_input_type=_Text | _Ids | _MixedArray)]
Texts = Annotated[list[str], PlainValidator(_texts, json_schema_input_type=_TextArray)]
TextOrTexts = Annotated[list[str], PlainValidator(_text_or_texts, json_schema_input_type=_Text | _TextArray)]
IdArrays = Annotated[list[list[int]], PlainValidator(_id_arrays, json_schema_input_type=_Ids | _IdsArray)]


@dataclass(frozen=True)
class Prepared:
    """Token sequences that the model takes, and what the answer says of them."""

    ids: list[list[int]]
    prefix: str = ""
    """The prompt in front of each text."""
    cut: int = 0
    """How many were longer than the limit."""
    characters: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    def __add__(self, other: "Prepared") -> "Prepared":
        """Both, as one; the prompt is that of the first."""
        return Prepared(
            self.ids + other.ids, self.prefix, self.cut + other.cut, self.characters + other.characters
        )


def prepare(
    embedder: Embedder,
    items: Sequence[Item],
    *,
    field: str,
    prompt: str | None = None,
    instruction: str | None = None,
    truncate: bool = False,
    limit: int | None = None,
    token_ids_of: TokenIds | None = None,
) -> Prepared:
    """Token ids of a request's texts and token arrays, EOS included.

    Args:
        items: from 1 to MAX_TEXTS; none of them empty.
        field: what they are called in the request, for errors.
        prompt, instruction: as of `Embedder.encode`.
        truncate: cut what is too long instead of refusing it; EOS stays.
        limit: fewer tokens for each than the model takes.
        token_ids_of: what token arrays mean; None refuses them.

    Raises ApiError.
    """
    check_count(items, field)
    prefix = prefix_of(embedder, prompt, instruction)
    if all(isinstance(item, str) for item in items):
        ids = embedder.token_ids(items, prompt=prompt, instruction=instruction)  # type: ignore[arg-type]
    elif token_ids_of is None:
        raise ApiError(
            "invalid",
            f"`{field}` holds token ids, whose vocabulary this server cannot know; send texts (LangChain: "
            "OpenAIEmbeddings(check_embedding_ctx_length=False)), or start the server with --token-arrays.",
            field=field,
        )
    else:
        ids = token_ids_of(embedder, items, field, prompt, instruction)
    most = min(limit or embedder.max_length, embedder.max_length)
    if not truncate:
        _refuse_long(ids, most, field)
    ids, cut = fit(ids, most, "truncate")
    return Prepared(ids, prefix, cut, sum(map(len, items)))


def prefix_of(embedder: Embedder, prompt: str | None, instruction: str | None) -> str:
    """What stands in front of each text; ApiError for an instruction where none belongs."""
    try:
        return embedder.prefix(prompt, instruction)
    except UsageError as error:
        raise ApiError("invalid", str(error), field="instruction") from None


def check_count(items: Sequence[Item], field: str) -> None:
    """Refuse no texts, too many, and empty ones."""
    if not items:
        raise ApiError("empty", f"`{field}` cannot be empty; send at least one text.", field=field)
    if len(items) > MAX_TEXTS:
        raise ApiError(
            "invalid",
            f"`{field}`: batch size {len(items)} > maximum allowed batch size {MAX_TEXTS}; send several requests.",
            field=field,
        )
    empty = next((number for number, item in enumerate(items) if not item), None)
    if empty is not None:
        raise ApiError(
            "empty", f"`{field}` cannot be empty: text {empty} is; leave it out or fill it.", field=field
        )


def check_total(prepared: Prepared, field: str) -> None:
    """Refuse a request of more than MAX_TOKENS tokens."""
    if prepared.tokens > MAX_TOKENS:
        raise ApiError(
            "invalid",
            f"`{field}` has {prepared.tokens} tokens in all, the limit of a request is {MAX_TOKENS}; "
            "divide it into several.",
            field=field,
        )


def _refuse_long(ids: Sequence[Sequence[int]], most: int, field: str) -> None:
    for number, sequence in enumerate(ids):
        if len(sequence) > most:
            raise ApiError(
                "invalid",
                f"`{field}` must have at most {most} tokens a text, text {number} has {len(sequence)}; shorten it, "
                'or ask for truncation ("truncate": true, Cohere: "END").',
                field=field,
            )


def well_formed(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON in UTF-8 cannot give back."""
    return text.encode("utf-8", "replace").decode()
