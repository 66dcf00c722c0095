"""What a server is and how it fares: GET /info, /health (also as / and /ping) and /metrics, as TEI has them."""

from typing import Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

import f2llm
from f2llm.serve.errors import ApiError, TEIError, described
from f2llm.serve.inputs import MAX_TEXTS
from f2llm.serve.metrics import CONTENT_TYPE_LATEST
from f2llm.serve.vectors import TOKENIZING_THREADS, rooms

router = APIRouter(tags=["TEI"], responses=described(TEIError))


@router.get("/info")
async def info(request: Request, model: str | None = Query(None)) -> dict[str, Any]:
    """What is served, and within which limits."""
    served = rooms(request).models.pick(model)
    embedder = served.embedder
    return {
        "model_id": served.name,
        "model_sha": embedder.identity,
        "model_dtype": embedder.precision,
        "served_model_name": served.name,
        "model_type": {"embedding": {"pooling": "last_token"}},
        "max_concurrent_requests": 2**31 - 1,  # what waits is limited, in tokens; clients expect a number
        "max_input_length": embedder.max_length,
        "max_batch_tokens": served.scheduler.tokens_per_batch,
        "max_batch_requests": None,
        "max_client_batch_size": MAX_TEXTS,
        "auto_truncate": False,
        "tokenization_workers": TOKENIZING_THREADS,
        "version": f2llm.__version__,
        "sha": None,
        "docker_label": None,
        "dimensions": embedder.dim,
        "matryoshka_dimensions": embedder.sizes,
        "prompts": {"query": embedder.prefix("query", None), "document": ""},
        "parameters": embedder.parameters,
    }


@router.get("/health")
@router.get("/ping")
@router.get("/")
async def health(request: Request) -> dict[str, str]:
    """200 when every model has been warmed up, 503 before and while the server stops."""
    if not rooms(request).models.ready:
        raise ApiError("unready", "the models are not ready; ask again in a second.", retry_after=1)
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(rooms(request).metrics.page(), media_type=CONTENT_TYPE_LATEST)
