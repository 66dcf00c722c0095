"""An OpenAI-compatible embeddings server, ours or another, as a target: what it answers, and what that means.

`ask` is one request and its answer, whatever the status; `embed` is what a client makes of it.

Shape suffixes: N texts, D dims.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote

import httpx2
import numpy as np

from f2llm.endpoints import BUSY, in_one_line, seconds_to_wait
from f2llm.errors import F2Error, UsageError
from f2llm.verify.computed import RefusedError, Vectors

TIMEOUT = 300.0  # seconds for an answer; a long text on a CPU takes minutes
PAUSES = (0.5, 2.0)  # seconds before a busy server is asked again
LONGEST_PAUSE = 30.0
# How servers let a client say that a text is a query; the first that is taken and makes a difference is used.
QUERY_FIELDS: tuple[dict[str, Any], ...] = ({"input_type": "query"}, {"prompt_name": "query"})
MODEL_HEADER, PROMPT_HEADER = "x-f2llm-model", "x-f2llm-prompt"  # what our own server tells
ANY_MODEL = "default"  # the name that is asked for where none is known


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    status: int
    value: Any  # parsed JSON; None where it is none
    text: str  # in one line, for errors
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Server:
    """The model at an address, a target of checks."""

    url: str  # up to /v1
    client: httpx2.Client = field(repr=False)
    model: str | None = None  # None where neither the user nor the server names one
    key: str | None = field(default=None, repr=False)
    width: int = 0
    sizes: list[int] = field(default_factory=list)  # no route tells them
    identity: str | None = None
    query_prompt: str | None = None
    query_field: dict[str, Any] = field(default_factory=lambda: QUERY_FIELDS[0])

    def ask(self, again: bool = True, **body: Any) -> Answer:
        """POST /embeddings with the model's name and `body`; a busy server is asked again, unless told otherwise."""
        return self._request("POST", "embeddings", again, {"model": self.model or ANY_MODEL, **body})

    def get(self, route: str) -> Answer:
        return self._request("GET", route, True, None)

    def vectors_of(self, answer: Answer, count: int) -> Vectors:
        """float32 [N, D] in the order of `index`; RefusedError for a status of 4xx, F2Error else."""
        if answer.status != 200:
            kind = RefusedError if 400 <= answer.status < 500 and answer.status not in BUSY else F2Error
            raise kind(f"{self.url} answered with status {answer.status}, {answer.text}.")
        try:
            items = sorted(answer.value["data"], key=lambda item: item["index"])
            found_ND = np.array([item["embedding"] for item in items], np.float32)
        except (KeyError, TypeError, ValueError):
            raise F2Error(f"{self.url} answered with no list of embeddings: {answer.text}.") from None
        if found_ND.ndim != 2 or len(found_ND) != count:
            raise F2Error(f"{self.url} gave {len(found_ND)} vectors for {count} texts.")
        return found_ND

    def embed(self, texts: Sequence[str], *, query: bool = False, dim: int | None = None) -> Vectors:
        body: dict[str, Any] = {"input": list(texts), "encoding_format": "float"}
        body |= {} if dim is None else {"dimensions": dim}
        body |= self.query_field if query else {}
        return self.vectors_of(self.ask(**body), len(texts))

    def _request(self, method: str, route: str, again: bool, body: Any) -> Answer:
        for pause in (*(PAUSES if again else ()), None):
            try:
                response = self.client.request(method, f"{self.url}/{route}", json=body)
            except (httpx2.RequestError, httpx2.InvalidURL) as error:
                raise F2Error(f"{self.url} cannot be reached ({type(error).__name__}: {error}).") from None
            if pause is None or response.status_code not in BUSY:
                break
            wait = seconds_to_wait(response.headers.get("Retry-After"))
            time.sleep(pause if wait is None else min(wait, LONGEST_PAUSE))
        try:
            value = response.json()
        except ValueError:
            value = None
        return Answer(
            response.status_code, value, in_one_line(response.text, self.key), dict(response.headers)
        )


@contextmanager
def connected(url: str, model: str | None, key: str | None, query_prompt: str | None) -> Iterator[Server]:
    """A server, with what it tells of its model.

    Args:
        url: as in `http://localhost:8000/v1`.
        model: the name to ask for; the only one that the server lists by default.
        query_prompt: what should stand in front of queries; what the server says by default.

    Raises F2Error if it gives no vectors, UsageError if several models are there and none is chosen.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx2.Client(headers=headers, timeout=TIMEOUT) as client:
        server = Server(url.rstrip("/").removesuffix("/embeddings"), client, model, key)
        server = replace(server, model=model or _only_model(server))
        answer = server.ask(input=["width"], encoding_format="float")
        bare_ND = server.vectors_of(answer, 1)
        server = replace(server, width=bare_ND.shape[1], identity=answer.headers.get(MODEL_HEADER))
        yield _with_query_field(server, bare_ND, query_prompt)


def _only_model(server: Server) -> str | None:
    """The model that the server lists; None where it lists none."""
    listed = server.get("models").value
    models = listed.get("data") if isinstance(listed, dict) else None
    names = [item.get("id") for item in models if isinstance(item, dict)] if isinstance(models, list) else []
    if len(names) > 1:
        raise UsageError(f"{server.url} serves {', '.join(map(str, names[:20]))}; choose one with --model.")
    return next((name for name in names if isinstance(name, str)), None)


def _with_query_field(server: Server, bare_ND: Vectors, query_prompt: str | None) -> Server:
    """The server as it wants to be asked for queries, and the prompt that it says it applies."""
    server = replace(server, query_prompt=query_prompt)
    for fields in QUERY_FIELDS:
        answer = server.ask(input=["width"], encoding_format="float", **fields)
        if answer.status != 200:
            continue
        said = answer.headers.get(PROMPT_HEADER)
        if query_prompt is None and said is not None:
            server = replace(server, query_prompt=unquote(said))
        if said or not np.allclose(server.vectors_of(answer, 1), bare_ND, atol=1e-4):
            return replace(server, query_field=fields)
    return server
