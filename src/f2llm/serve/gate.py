"""What every request passes first and last: its id, its key, the size of its body, its line in the log.

A plain ASGI layer around the routes. The body is read here, in chunks and never more of it than the limit, so that a
route starts when all of it is there. The log has one line of JSON a request, and neither texts nor keys.
"""

import hashlib
import hmac
import json
import re
import sys
import time
import traceback
import uuid
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from f2llm.serve.errors import ApiError, error_response, family_of
from f2llm.serve.metrics import Metrics

MAX_BODY = 32 << 20  # bytes
MAX_DISCARDED = 8 * MAX_BODY  # read and thrown away, so that a client that is still sending hears the answer
OPEN = {"/", "/health", "/ping"}  # with GET: what a load balancer asks needs no key
SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass
class Note:
    """What a route tells of its request, for the log."""

    client: str
    texts: int = 0
    tokens: int = 0
    model: str | None = None
    started: float = field(default_factory=time.perf_counter)


class Gate:
    """ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        paths: Set[str],
        keys: Sequence[str],
        metrics: Metrics,
        log: TextIO | None = None,
    ) -> None:
        """`paths` are those that the log may name; any other could be a text."""
        self._app, self._paths, self._metrics, self._log = app, paths, metrics, log
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if SANE_ID.fullmatch(given) else uuid.uuid4().hex
        note = Note(client=(scope.get("client") or ("",))[0])
        scope.setdefault("state", {})["note"] = note
        status, failure = 0, {}

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            try:
                self._check_key(scope, headers, note)
                body = await _read(headers, receive)
                await self._app(scope, _replay(body, receive), send_on)
            except ApiError as error:
                await error_response(family_of(scope["path"]), error)(scope, receive, send_on)
            except Exception as error:
                # The message may hold a text; where it happened never does.
                failure = {"error": type(error).__name__, "at": _places(error)}
                if not status:
                    told = ApiError("failed", f"the server failed; its log says where under {request_id}.")
                    await error_response(family_of(scope["path"]), told)(scope, receive, send_on)
        finally:
            self._record(scope, note, status, request_id, failure)

    def _check_key(self, scope: Scope, headers: Headers, note: Note) -> None:
        if not self._keys or (scope["path"] in OPEN and scope["method"] in ("GET", "HEAD")):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip().encode("latin-1"))  # the bytes that were sent
        # Every key is compared, and each in constant time: how long it takes tells nothing.
        known = sum([hmac.compare_digest(digest, one) for one in self._keys])
        if scheme.lower() != "bearer" or not known:
            raise ApiError("key", "the API key is missing or wrong; send it as `Authorization: Bearer KEY`.")
        note.client = digest.hex()

    def _record(
        self, scope: Scope, note: Note, status: int, request_id: str, failure: dict[str, Any]
    ) -> None:
        seconds = time.perf_counter() - note.started
        route = scope["path"] if scope["path"] in self._paths else "other"
        self._metrics.requests.labels(route, status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
            "texts": note.texts,
            "tokens": note.tokens,
            "model": note.model,
            "request_id": request_id,
            **failure,
        }
        print(json.dumps(line), file=self._log or sys.stderr, flush=True)


def _places(error: Exception) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _read(headers: Headers, receive: Receive) -> bytes:
    """The whole body; ApiError if it is larger than the limit."""
    declared = headers.get("content-length", "0")
    chunks: list[bytes] = []
    seen = 0
    too_large = declared.isdigit() and int(declared) > MAX_BODY
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError("gone", "the client went away.")
        chunk = message.get("body", b"")
        seen += len(chunk)
        too_large = too_large or seen > MAX_BODY
        if too_large:
            chunks.clear()
        else:
            chunks.append(chunk)
        if not message.get("more_body", False) or seen > MAX_DISCARDED:
            break
    if too_large:
        raise ApiError("body", f"the body is larger than {MAX_BODY} bytes; divide the request into several.")
    return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then whatever comes: nothing but the end of the connection."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message
