"""From a request to vectors: the steps that every embedding route takes, and the headers that its answer carries.

Texts are tokenised here (long ones in a thread, so that others are answered meanwhile) and computed by the model's
scheduler. A client that goes away takes its texts out of the queue.

Shape suffixes: N texts, D dims.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
import orjson
from fastapi import Request
from starlette.responses import Response

from f2llm.embed.embedder import truncate
from f2llm.errors import UsageError
from f2llm.serve.errors import ApiError
from f2llm.serve.inputs import Prepared, check_total
from f2llm.serve.metrics import Metrics
from f2llm.serve.models import Models, Served
from f2llm.serve.token_arrays import TokenIds

TOKENIZING_THREADS = 2
INLINE_CHARACTERS = 4000  # tokenised in less than a millisecond

T = TypeVar("T")


@dataclass(frozen=True)
class Rooms:
    """What routes work with; `app.state.rooms`."""

    models: Models
    metrics: Metrics
    token_ids_of: TokenIds | None
    """What token arrays mean; None refuses them."""
    threads: ThreadPoolExecutor
    """For what takes longer than a millisecond."""


@dataclass(frozen=True)
class Computed:
    """Raw vectors of a request, and what it took; times in seconds."""

    raw_ND: np.ndarray
    prepared: Prepared
    tokenizing: float
    computing: float
    """Waiting for others included."""


def rooms(request: Request) -> Rooms:
    found: Rooms = request.app.state.rooms
    return found


async def in_thread_if_long(request: Request, characters: int, work: Callable[[], T]) -> T:
    """`work()`: here where it takes no time, else in a thread."""
    if characters <= INLINE_CHARACTERS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(rooms(request).threads, work)


async def compute(
    request: Request, served: Served, characters: int, prepare: Callable[[], Prepared], field: str
) -> Computed:
    """Tokenise (`prepare`) and compute the vectors of a request.

    Raises ApiError: what `prepare` raises, too many tokens in all, a client gone, a model
    that fails; Overloaded.
    """
    started = time.perf_counter()
    prepared = await in_thread_if_long(request, characters, prepare)
    check_total(prepared, field)
    tokenized = time.perf_counter()
    note = request.scope["state"]["note"]
    note.model, note.texts, note.tokens = served.name, len(prepared.ids), prepared.tokens
    raw_ND = await _unless_gone(request, served.scheduler.vectors(note.client, prepared.ids))
    if not np.isfinite(raw_ND).all():
        raise ApiError("failed", f"{served.name} gave a vector that is not finite; its weights are damaged.")
    computed = Computed(raw_ND, prepared, tokenized - started, time.perf_counter() - tokenized)
    _count(rooms(request).metrics, served.name, computed)
    return computed


async def _unless_gone(request: Request, work: Awaitable[np.ndarray]) -> np.ndarray:
    """The result of `work`, which is cancelled when the client closes its connection."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())  # the body is there, so nothing else can come
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError("gone", "the client went away.")
    finally:
        working.cancel()
        leaving.cancel()


def _count(metrics: Metrics, name: str, computed: Computed) -> None:
    prepared = computed.prepared
    metrics.texts.labels(name).inc(len(prepared.ids))
    metrics.tokens.labels(name).inc(prepared.tokens)
    metrics.truncated.labels(name).inc(prepared.cut)
    metrics.tokenizing.labels(name).observe(computed.tokenizing)


def sized(
    served: Served, computed: Computed, dim: int | None, field: str, normalize: bool = True
) -> np.ndarray:
    """float32 [N, D]: of the size that was asked for, of unit length unless `normalize` is false."""
    return truncate(computed.raw_ND, size(served, dim, field), normalize)


def size(served: Served, dim: int | None, field: str) -> int:
    """The number of dimensions that is meant; ApiError, with the trained sizes, for one the model has not."""
    try:
        return served.embedder.check_dim(dim)
    except UsageError as error:
        raise ApiError("invalid", f"`{field}`: {error}", field=field) from None


def answer(
    served: Served, computed: Computed, content: Any, headers: dict[str, str] | None = None
) -> Response:
    """The answer of an embedding route: JSON, and what stands behind the vectors in its headers."""
    prepared = computed.prepared
    facts = {
        "x-f2llm-model": served.embedder.identity,
        "x-f2llm-prompt": quote(prepared.prefix, safe=""),
        "x-f2llm-truncated": str(prepared.cut),
    }
    return Response(
        orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY),
        headers={**facts, **(headers or {})},
        media_type="application/json",
    )
