"""Cohere's route: POST /v2/embed.

Where this server does otherwise: what is too long is an error unless `truncate` is END (START is refused: a text is
cut behind its prompt only), a request may have 2,048 texts, and `output_dimension` any size up to the model's width.
Sizes that are no multiple of 8 have their last byte of bits filled up with zeros.
"""

import uuid
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from f2llm.serve.errors import ApiError, CohereError, described
from f2llm.serve.inputs import Body, InputType, PromptFields, Texts, prepare, well_formed
from f2llm.serve.precision import Precision, in_precision
from f2llm.serve.vectors import answer, compute, rooms, size, sized

router = APIRouter(tags=["Cohere"], responses=described(CohereError))


class Content(Body):
    """A part of an input."""

    type: str
    text: str | None = None


class Input(Body):
    """A text in parts, which are joined by spaces."""

    content: list[Content]


class CohereEmbedRequest(PromptFields):
    """Texts to embed."""

    model: str
    input_type: InputType | Literal["image"] = Field(description="search_query puts the prompt in front.")  # type: ignore[assignment]
    texts: Texts | None = Field(None, description="Up to 2,048 texts.")
    inputs: list[Input] | None = Field(None, description="The same, in parts.")
    images: list[str] | None = Field(None, description="Refused: the models embed texts only.")
    embedding_types: list[Precision] | None = Field(None, description="float by default.")
    truncate: Literal["NONE", "START", "END"] = Field("NONE", description="END cuts; START is refused.")
    max_tokens: int | None = Field(None, ge=1, description="Fewer tokens for each text than the model takes.")
    output_dimension: int | None = Field(
        None,
        json_schema_extra={"minimum": 1},
        description="Any size up to the model's width; unit length at each.",
    )
    priority: int | None = Field(None, description="Ignored: clients take turns.")


class Embeddings(BaseModel):
    """The vectors of all texts, by type."""

    float_: list[list[float]] | None = Field(None, alias="float")
    int8: list[list[int]] | None = None
    uint8: list[list[int]] | None = None
    binary: list[list[int]] | None = None
    ubinary: list[list[int]] | None = None
    base64: list[str] | None = None


class CohereEmbedResponse(BaseModel):
    """Vectors in the order of the texts."""

    id: str
    response_type: Literal["embeddings_by_type"]
    embeddings: Embeddings
    texts: list[str]
    meta: dict[str, Any]


@router.post("/v2/embed", response_model=CohereEmbedResponse)
async def embed(request: Request, body: CohereEmbedRequest) -> Response:
    """Vectors of texts, in one or several precisions."""
    served = rooms(request).models.pick(body.model)
    size(served, body.output_dimension, "output_dimension")  # before any work
    texts, field = _texts(body)
    if body.truncate == "START":
        raise ApiError(
            "invalid", "`truncate` is START; this server cuts texts at their end only: END.", field="truncate"
        )
    prompt = body.prompt()
    computed = await compute(
        request,
        served,
        sum(map(len, texts)),
        lambda: prepare(
            served.embedder,
            texts,
            field=field,
            prompt=prompt,
            instruction=body.instruction,
            truncate=body.truncate == "END",
            limit=body.max_tokens,
        ),
        field,
    )
    vectors_ND = sized(served, computed, body.output_dimension, "output_dimension")
    wanted: set[Precision] = set(body.embedding_types or ["float"])
    prepared = computed.prepared
    return answer(
        served,
        computed,
        {
            "id": str(uuid.uuid4()),
            "response_type": "embeddings_by_type",
            "embeddings": {one: await in_precision(vectors_ND, one, served.calibration) for one in wanted},
            "texts": [well_formed(text) for text in texts],
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"input_tokens": prepared.tokens},
                "warnings": [f"{prepared.cut} of the texts cut"] if prepared.cut else [],
            },
        },
    )


def _texts(body: CohereEmbedRequest) -> tuple[list[str], str]:
    """The texts, and the field that has them; ApiError for images and for none or several of the fields."""
    if body.images is not None or body.input_type == "image":
        raise ApiError("invalid", "images cannot be embedded by this model; send `texts`.", field="images")
    if (body.texts is None) == (body.inputs is None):
        raise ApiError("invalid", "one of `texts` and `inputs` is needed; give one of them.", field="texts")
    if body.texts is not None:
        return body.texts, "texts"
    parts = [[part.text for part in one.content] for one in body.inputs or []]
    if any(None in part for part in parts):
        raise ApiError("invalid", "`inputs` may have parts of type text only.", field="inputs")
    return [" ".join(filter(None, part)) for part in parts], "inputs"
