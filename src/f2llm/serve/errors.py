"""What goes wrong, told in the shape that each family of routes is known for: OpenAI's, Cohere's and TEI's.

Routes raise `ApiError` with a kind and one sentence; which status and which words of the protocol that is, stands in
one table. TEI's routes answer 422 where the others answer 400, as TEI itself does.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from f2llm.serve.scheduler import Overloaded

Family = Literal["openai", "cohere", "tei"]


class Kind(NamedTuple):
    """A way to go wrong: OpenAI's status (Cohere's too), type and code, then TEI's status and type."""

    status: int
    openai_type: str
    openai_code: str | None
    tei_status: int
    tei_type: str


KINDS = {
    "empty": Kind(400, "invalid_request_error", None, 400, "Empty"),
    "invalid": Kind(400, "invalid_request_error", None, 422, "Validation"),
    "key": Kind(401, "invalid_request_error", "invalid_api_key", 401, "Validation"),
    "model": Kind(404, "invalid_request_error", "model_not_found", 404, "Validation"),
    "route": Kind(404, "invalid_request_error", "unknown_url", 404, "Validation"),
    "method": Kind(405, "invalid_request_error", "method_not_supported", 405, "Validation"),
    "body": Kind(413, "invalid_request_error", "request_too_large", 413, "Validation"),
    "overloaded": Kind(429, "tokens", "rate_limit_exceeded", 429, "Overloaded"),
    "gone": Kind(499, "invalid_request_error", "client_closed_request", 499, "Validation"),
    "failed": Kind(500, "server_error", None, 424, "Backend"),
    "unready": Kind(503, "server_error", None, 503, "Unhealthy"),
}


class OpenAIErrorFields(BaseModel):
    """What is wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """An error of OpenAI's routes."""

    error: OpenAIErrorFields


class CohereError(BaseModel):
    """An error of Cohere's routes."""

    message: str


class TEIError(BaseModel):
    """An error of TEI's routes."""

    error: str
    error_type: Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"]


class ApiError(Exception):
    """An answer that is an error: its kind, and one sentence without anything of the user's texts."""

    def __init__(
        self, kind: str, message: str, *, field: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.field, self.retry_after = kind, message, field, retry_after


def described(body: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What a router says of its errors in the OpenAPI document."""
    return {status: {"model": body, "description": "An error"} for status in ("4XX", "5XX")}


def family_of(path: str) -> Family:
    """Whose protocol a path belongs to; TEI's where nobody else's, since its paths have no prefix."""
    if path.startswith("/v1/") or path == "/embeddings":
        return "openai"
    return "cohere" if path.startswith("/v2/") else "tei"


def error_response(family: Family, error: ApiError) -> Response:
    """The error as the clients of this family expect it."""
    kind = KINDS[error.kind]
    headers = {"www-authenticate": "Bearer"} if error.kind == "key" else {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if family == "tei" and error.kind == "key":
        return Response(status_code=kind.tei_status, headers=headers)
    status = kind.tei_status if family == "tei" else kind.status
    content = orjson.dumps(_body(family, kind, error))
    return Response(content, status, headers, media_type="application/json")


def _body(family: Family, kind: Kind, error: ApiError) -> dict[str, Any]:
    if family == "cohere":
        return {"message": error.message}
    if family == "tei":
        return {"error": error.message, "error_type": kind.tei_type}
    named = {"type": kind.openai_type, "param": error.field, "code": kind.openai_code}
    return {"error": {"message": error.message, **named}}


def install_handlers(app: FastAPI) -> None:
    """Answer every error that a route, the router or the validation of a body raises."""

    async def own(request: Request, error: ApiError) -> Response:
        return error_response(family_of(request.url.path), error)

    async def overloaded(request: Request, error: Overloaded) -> Response:
        return await own(request, ApiError("overloaded", str(error), retry_after=error.retry_after))

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return await own(request, _in_one_sentence(error.errors()))

    async def http(request: Request, error: HTTPException) -> Response:
        kind, sentence = {
            404: ("route", "there is no such route here; GET /openapi.json lists those there are."),
            405: ("method", "this route does not take that method; GET /openapi.json says which it takes."),
        }.get(error.status_code, ("invalid", "the body could not be read as JSON."))
        response = await own(request, ApiError(kind, sentence))
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(ApiError, own)  # type: ignore[arg-type]
    app.add_exception_handler(Overloaded, overloaded)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http)  # type: ignore[arg-type]


def _in_one_sentence(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(
            "invalid", f"the body is not JSON: {first['ctx']['error']} at position {first['loc'][1]}."
        )
    field = ".".join(map(str, first["loc"][1:]))
    if not field:
        return ApiError("invalid", "the body must be a JSON object, sent as application/json.")
    if first["type"] == "missing":
        return ApiError("invalid", f"`{field}` is missing; this route needs it.", field=field)
    return ApiError("invalid", f"`{field}`: {first['msg'][:1].lower()}{first['msg'][1:]}.", field=field)
