"""The HTTP application: the routes of three families behind one gate, and the life of the models behind them.

    gate (id, key, body, log) -> route (a family's words) -> inputs (texts -> token ids) -> scheduler -> precision

Routes differ in words only: all go through `f2llm.serve.vectors`.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TextIO

from fastapi import FastAPI
from fastapi.routing import APIRoute

import f2llm
from f2llm.serve import cohere_api, openai_api, status_api, tei_api, tokens_api
from f2llm.serve.errors import install_handlers
from f2llm.serve.gate import Gate
from f2llm.serve.metrics import Metrics
from f2llm.serve.models import Models, Served
from f2llm.serve.token_arrays import TokenArrays, token_policy
from f2llm.serve.vectors import TOKENIZING_THREADS, Rooms


def make_app(
    served: Sequence[Served],
    *,
    keys: Sequence[str] = (),
    token_arrays: TokenArrays = "reject",
    log: TextIO | None = None,
) -> FastAPI:
    """The application that serves these models.

    Args:
        served: their names differ.
        keys: each opens every route; without any, everybody may ask.
        token_arrays: what arrays of token ids mean.
        log: where the line of each request goes; standard error by default.

    Raises F2Error where `token_arrays` needs a file that cannot be had.
    """
    metrics, models = Metrics(), Models(served)
    threads = ThreadPoolExecutor(TOKENIZING_THREADS, "f2llm tokens")

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await models.start()
        warming_up = asyncio.create_task(models.warm_up())
        yield
        warming_up.cancel()
        await models.drain()
        threads.shutdown(wait=False)

    app = FastAPI(
        title="f2llm",
        version=f2llm.__version__,
        description="Text embeddings by the protocols of OpenAI, Cohere and Text Embeddings Inference.",
        lifespan=life,
        docs_url=None,  # those pages load their code from elsewhere, which a server without network cannot
        redoc_url=None,
        strict_content_type=False,
    )
    app.state.rooms = Rooms(models, metrics, token_policy(token_arrays), threads)
    for one in served:
        metrics.watch(one)
    install_handlers(app)
    paths: set[str] = set()
    for family in (openai_api, cohere_api, tei_api, tokens_api, status_api):
        app.include_router(family.router)
        paths |= {route.path for route in family.router.routes if isinstance(route, APIRoute)}
    app.add_middleware(Gate, paths=paths, keys=keys, metrics=metrics, log=log)
    return app


def openapi_document() -> dict[str, Any]:
    """The description of all routes, which is the same for every model: docs/openapi.json."""
    return make_app([]).openapi()
