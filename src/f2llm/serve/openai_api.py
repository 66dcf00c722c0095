"""OpenAI's routes: POST /v1/embeddings (also as /embeddings) and GET /v1/models."""

from typing import Any, Literal

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from f2llm.serve.errors import ApiError, OpenAIError, described
from f2llm.serve.inputs import Items, PromptFields, prepare
from f2llm.serve.models import Served
from f2llm.serve.precision import in_precision
from f2llm.serve.vectors import answer, compute, rooms, size, sized

router = APIRouter(tags=["OpenAI"], responses=described(OpenAIError))


class EmbeddingsRequest(PromptFields):
    """Texts to embed."""

    input: Items = Field(
        description="A text, up to 2,048 texts, or token arrays where the server takes them."
    )
    model: str | None = Field(None, description="Needed where several models are served.")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: little-endian float32.")
    dimensions: int | None = Field(
        None,
        json_schema_extra={"minimum": 1},
        description="Any size up to the model's width; unit length at each.",
    )
    user: str | None = Field(None, description="Ignored.")
    truncate: bool = Field(False, description="Cut texts that are too long; they are an error otherwise.")


class Embedding(BaseModel):
    """One vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens, with prompts and EOS, and how many texts were cut."""

    prompt_tokens: int
    total_tokens: int
    truncated_inputs: int


class EmbeddingsResponse(BaseModel):
    """Vectors in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    identity: str
    dimensions: int
    matryoshka_dimensions: list[int]
    max_input_tokens: int


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


@router.post("/v1/embeddings", response_model=EmbeddingsResponse)
@router.post("/embeddings", response_model=EmbeddingsResponse)
async def embeddings(request: Request, body: EmbeddingsRequest) -> Response:
    """Vectors of texts."""
    here = rooms(request)
    served = here.models.pick(body.model)
    size(served, body.dimensions, "dimensions")  # before any work
    prompt = body.prompt()
    computed = await compute(
        request,
        served,
        sum(map(len, body.input)),
        lambda: prepare(
            served.embedder,
            body.input,
            field="input",
            prompt=prompt,
            instruction=body.instruction,
            truncate=body.truncate,
            token_ids_of=here.token_ids_of,
        ),
        "input",
    )
    vectors_ND = sized(served, computed, body.dimensions, "dimensions")
    rows = await in_precision(vectors_ND, body.encoding_format, served.calibration)
    tokens = computed.prepared.tokens
    return answer(
        served,
        computed,
        {
            "object": "list",
            "data": [{"object": "embedding", "index": n, "embedding": row} for n, row in enumerate(rows)],
            "model": served.name,
            "usage": {
                "prompt_tokens": tokens,
                "total_tokens": tokens,
                "truncated_inputs": computed.prepared.cut,
            },
        },
    )


@router.get("/v1/models", response_model=ModelList)
async def models(request: Request) -> Response:
    """The models that are served."""
    cards = [_card(served) for served in rooms(request).models]
    return Response(orjson.dumps({"object": "list", "data": cards}), media_type="application/json")


@router.get("/v1/models/{model:path}", response_model=ModelCard)
async def model(request: Request, model: str) -> Response:
    """One of them, by its name."""
    for served in rooms(request).models:
        if served.name == model:
            return Response(orjson.dumps(_card(served)), media_type="application/json")
    raise ApiError(
        "model", "there is no such model here; GET /v1/models lists those there are.", field="model"
    )


def _card(served: Served) -> dict[str, Any]:
    embedder = served.embedder
    return {
        "id": served.name,
        "object": "model",
        "created": 0,
        "owned_by": "f2llm",
        "identity": embedder.identity,
        "dimensions": embedder.dim,
        "matryoshka_dimensions": embedder.sizes,
        "max_input_tokens": embedder.max_length,
    }
