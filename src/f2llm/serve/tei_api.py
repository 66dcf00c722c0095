"""TEI's routes to vectors and what follows from them: /embed (also POST /), /similarity and /rerank.

Where this server does otherwise: what is too long is an error unless `truncate` is true (TEI's own default cuts in
silence); `truncation_direction` can only be right; /rerank compares vectors, so that its scores are cosines with or
without `raw_scores`. `input_type`, `instruction` and `model` are accepted as well. TEI's timing headers are in
milliseconds; x-inference-time has the time in the queue in it.
"""

import time
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from f2llm.serve.errors import ApiError, TEIError, described
from f2llm.serve.inputs import (
    Body,
    MixedItems,
    Prepared,
    PromptFields,
    Texts,
    check_count,
    prepare,
    well_formed,
)
from f2llm.serve.models import Served
from f2llm.serve.precision import in_precision
from f2llm.serve.vectors import (
    Computed,
    answer,
    compute,
    rooms,
    size,
    sized,
)

router = APIRouter(tags=["TEI"], responses=described(TEIError))

Direction = Literal["left", "Left", "right", "Right"]


class TruncationFields(Body):
    """What becomes of texts that are too long."""

    truncate: bool | None = Field(None, description="Cut them; they are an error otherwise.")
    truncation_direction: Direction = Field("right", description="Texts are cut at the right only.")

    def cuts(self) -> bool:
        """Whether to truncate; ApiError for the side that is not supported."""
        if self.truncate and self.truncation_direction.lower() == "left":
            raise ApiError(
                "invalid",
                "`truncation_direction` is left; this server cuts texts at the right only, so leave it out.",
                field="truncation_direction",
            )
        return bool(self.truncate)


class EmbedRequest(PromptFields, TruncationFields):
    """Texts to embed."""

    inputs: MixedItems = Field(
        description="A text, up to 2,048, or token arrays where the server takes them."
    )
    normalize: bool = Field(True, description="False gives vectors as the model computed them.")
    dimensions: int | None = Field(
        None,
        json_schema_extra={"minimum": 1},
        description="Any size up to the model's width; unit length at each.",
    )
    model: str | None = Field(None, description="Needed where several models are served.")


class SimilarityInputs(Body):
    """A text, and others."""

    source_sentence: str
    sentences: Texts


class SimilarityParameters(PromptFields, TruncationFields):
    """How the texts are embedded, all in the same way."""


class SimilarityRequest(Body):
    """Texts to compare one with."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None
    model: str | None = Field(None, description="Needed where several models are served.")


class RerankRequest(TruncationFields):
    """A query, and texts to put in order."""

    query: str
    texts: Texts
    raw_scores: bool = Field(False, description="Without effect: scores are cosines.")
    return_text: bool = False
    instruction: str | None = Field(
        None, description="The query's instruction instead of the model's default."
    )
    model: str | None = Field(None, description="Needed where several models are served.")


class Rank(BaseModel):
    """A text's number in the request, and its score."""

    index: int
    score: float
    text: str | None = None


@router.post("/embed", response_model=list[list[float]])
@router.post("/", response_model=list[list[float]])
async def embed(request: Request, body: EmbedRequest) -> Response:
    """Vectors of texts."""
    started = time.perf_counter()
    served = rooms(request).models.pick(body.model)
    size(served, body.dimensions, "dimensions")  # before any work
    prompt, cuts = body.prompt(), body.cuts()
    characters = sum(map(len, body.inputs))
    computed = await compute(
        request,
        served,
        characters,
        lambda: prepare(
            served.embedder,
            body.inputs,
            field="inputs",
            prompt=prompt,
            instruction=body.instruction,
            truncate=cuts,
            token_ids_of=rooms(request).token_ids_of,
        ),
        "inputs",
    )
    vectors_ND = sized(served, computed, body.dimensions, "dimensions", body.normalize)
    rows = await in_precision(vectors_ND, "float", served.calibration)
    return answer(served, computed, rows, _times(computed, started))


@router.post("/similarity", response_model=list[float])
async def similarity(request: Request, body: SimilarityRequest) -> Response:
    """Cosines of one text with others, all with the same prompt."""
    started = time.perf_counter()
    served = rooms(request).models.pick(body.model)
    parameters = body.parameters or SimilarityParameters()
    prompt, cuts = parameters.prompt(), parameters.cuts()
    check_count(body.inputs.sentences, "sentences")
    texts = [body.inputs.source_sentence, *body.inputs.sentences]

    def prepared(field: str, part: list[str]) -> Prepared:
        return prepare(
            served.embedder,
            part,
            field=field,
            prompt=prompt,
            instruction=parameters.instruction,
            truncate=cuts,
        )

    computed = await compute(
        request,
        served,
        sum(map(len, texts)),
        lambda: prepared("source_sentence", texts[:1]) + prepared("sentences", texts[1:]),
        "sentences",
    )
    scores = _cosines(served, computed)
    return answer(served, computed, scores, _times(computed, started))


@router.post("/rerank", response_model=list[Rank], response_model_exclude_none=True)
async def rerank(request: Request, body: RerankRequest) -> Response:
    """Texts in order of their cosine with a query, which carries its prompt."""
    started = time.perf_counter()
    served = rooms(request).models.pick(body.model)
    cuts = body.cuts()

    def prepared() -> Prepared:
        query = prepare(
            served.embedder,
            [body.query],
            field="query",
            prompt="query",
            instruction=body.instruction,
            truncate=cuts,
        )
        return query + prepare(served.embedder, body.texts, field="texts", prompt="document", truncate=cuts)

    computed = await compute(request, served, len(body.query) + sum(map(len, body.texts)), prepared, "texts")
    scores = _cosines(served, computed)
    ranks = [
        {"index": n, "score": scores[n], **({"text": well_formed(body.texts[n])} if body.return_text else {})}
        for n in sorted(range(len(scores)), key=lambda n: -scores[n])
    ]
    return answer(served, computed, ranks, _times(computed, started))


def _cosines(served: Served, computed: Computed) -> list[float]:
    """Of the first vector with each of the others."""
    vectors_ND = sized(served, computed, None, "dimensions")
    cosines: list[float] = (vectors_ND[1:] @ vectors_ND[0]).tolist()
    return cosines


def _times(computed: Computed, started: float) -> dict[str, str]:
    prepared = computed.prepared
    times = {
        "x-compute-time": computed.tokenizing + computed.computing,
        "x-total-time": time.perf_counter() - started,
        "x-tokenization-time": computed.tokenizing,
        "x-inference-time": computed.computing,
    }
    return {
        "x-compute-type": "cpu",
        "x-compute-characters": str(prepared.characters),
        "x-compute-tokens": str(prepared.tokens),
        **{name: str(round(1000 * seconds)) for name, seconds in times.items()},
    }
