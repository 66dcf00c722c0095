"""An embeddings server around a model, right in every respect, or wrong in the one that `fault` names."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import quote

import numpy as np
from tests.data.hub_server import serving

from f2llm.embed.embedder import Embedder, truncate
from f2llm.errors import UsageError
from f2llm.verify.protocol import BYTES_CL100K, PANGRAM_CL100K

MODEL, KEY = "tiny", "sk-secret-verify"
QUERY = {("input_type", "query"), ("prompt_name", "query")}


@dataclass
class Server:
    embedder: Embedder
    fault: str = ""
    tells: bool = True  # the model and the prompt, in headers
    models: tuple[str, ...] = (MODEL,)
    key: str | None = None
    odd: Any = None  # what is answered from the third request on, by the fault "odd"
    address: str = ""
    requests: int = 0
    texts: int = 0  # all that were answered with vectors


class WrongError(Exception):
    """A request that is refused."""


def ids_of(server: Server, given: list[Any], prefix: str) -> list[list[int]]:
    """Token ids of the texts of a request; those of a request of ids only by a fault."""
    embedder, fault = server.embedder, server.fault
    if any(not isinstance(text, str) for text in given):
        rows, eos_id = embedder.tokenizer.get_vocab_size(), embedder.facts.eos_id
        if fault == "cl100k":
            given = [
                next(text for text, known in (PANGRAM_CL100K, BYTES_CL100K) if known == ids) for ids in given
            ]
        elif fault == "own ids":
            return [[number % rows for number in ids] + [eos_id] for ids in given]
        elif fault == "own ids in range" and all(number < rows for ids in given for number in ids):
            return [[*ids, eos_id] for ids in given]
        else:
            raise WrongError("input holds token ids; send texts")
    ids = embedder.token_ids([prefix + text for text in given])
    if fault == "cut in front":
        return [sequence[-embedder.max_length :] for sequence in ids]
    try:
        return embedder.fit(ids, "truncate" if fault in ("cut", "reads all") else "error")[0]
    except UsageError as error:
        raise WrongError(str(error)) from None


def vectors_of(server: Server, body: dict[str, Any]) -> np.ndarray:
    """float32 [N, D] of a request."""
    embedder, fault = server.embedder, server.fault
    given = body.get("input")
    if not isinstance(given, list) or (not given and fault != "empty list"):
        raise WrongError("input is empty or missing")
    prefix, dim = prefix_of(server, body), dim_of(server, body)
    if not given:
        return np.zeros((0, dim), np.float32)
    ids = ids_of(server, given, prefix)
    raw = embedder.raw(ids)
    if fault == "reads all":
        raw[:, 0] += [sum((prefix + text).encode()) % 97 for text in given]
    if fault == "padding":
        longest = max(map(len, ids))
        raw[:, 0] += [0.1 * (longest - len(sequence)) for sequence in ids]
    if fault == "equal lengths" and len(ids) > 1 and len(set(map(len, ids))) == 1:
        raw[:, 0] += 1
    if fault in ("not finite", "all alike"):
        raw[:] = np.nan if fault == "not finite" else 1
    if fault == "norm before truncation":
        return np.asarray(truncate(raw, embedder.dim)[:, :dim])
    if fault == "last numbers":
        return truncate(raw[:, -dim:], dim)
    return truncate(raw, embedder.dim if fault == "dimensions ignored" else dim)


def prefix_of(server: Server, body: dict[str, Any]) -> str:
    """What goes in front of the texts of a request."""
    fault = server.fault
    if not QUERY & {item for item in body.items() if isinstance(item[1], str)}:
        return ""
    if fault == "prompt refused":
        raise WrongError("unknown field")
    prefix = "" if fault == "prompt ignored" else server.embedder.prefix("query", None)
    return prefix.rstrip() if fault == "prompt without its space" else prefix


def dim_of(server: Server, body: dict[str, Any]) -> int:
    """The dimensions that a request asks for."""
    width = server.embedder.dim
    if server.fault == "sizes refused" and "dimensions" in body:
        raise WrongError("the model is not known to be trained for other sizes")
    dim: int = body.get("dimensions", width)
    if 1 <= dim <= width:
        return dim
    if server.fault == "any size":
        return width
    raise WrongError(f"dimensions is {dim}")


def packed(server: Server, vector: np.ndarray, encoding: str) -> Any:
    if encoding == "float" or server.fault == "base64 ignored":
        return [float(x) for x in vector]
    dtype = {"float64": "<f8", "big-endian": ">f4"}.get(server.fault, "<f4")
    if server.fault == "other base64":
        vector = vector[::-1]
    if server.fault == "rounded":
        vector = np.round(vector, 4)
    return base64.b64encode(vector.astype(dtype).tobytes()).decode()


def answer_of(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    found = vectors_of(server, body)
    found = found[::-1] if server.fault == "shuffled" else found
    encoding = body.get("encoding_format", "float")
    data: list[dict[str, Any]] = [
        {"object": "embedding", "index": n, "embedding": packed(server, vector, encoding)}
        for n, vector in enumerate(found)
    ]
    server.texts += len(data)
    answer: dict[str, Any] = {
        "object": "list",
        "data": data[::-1] if server.fault == "reversed" else data,
        "model": "another" if server.fault == "another name" else body["model"],
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    }
    if server.fault == "no usage":
        del answer["usage"]
    return answer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one piece, which clients need not wait for
    server_of: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        known = self.path == "/v1/models"
        names = [{"id": name, "object": "model"} for name in self.server_of.models]
        self.send(200 if known else 404, {"data": names} if known else {})

    def do_POST(self) -> None:
        server = self.server_of
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests += 1
        if server.fault == "busy" and server.requests % 2:
            return self.send(429, self.error("later"))
        if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
            return self.send(401, self.error(f"no such key: {self.headers.get('Authorization')}"))
        if server.fault == "odd" and server.requests > 2:
            return self.send(200, server.odd)
        if self.path != "/v1/embeddings":
            return self.send(404, self.error("no such route"))
        try:
            return self.send(200, answer_of(server, body))
        except WrongError as error:
            status = 500 if server.fault == "failure for refusal" else 400
            return self.send(status, self.error(str(error)))

    def error(self, message: str) -> dict[str, Any]:
        if self.server_of.fault == "errors of its own":
            return {"message": message, "code": 400, "type": "Validation"}
        return {
            "error": {"message": message, "type": "invalid_request_error", "param": "input", "code": None}
        }

    def send(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "0")
        server = self.server_of
        if server.tells:
            self.send_header("x-f2llm-model", server.embedder.identity)
            self.send_header("x-f2llm-prompt", quote(self.prompt(), safe=""))
        self.end_headers()
        self.wfile.write(data)

    def prompt(self) -> str:
        """The server names its prompt whether or not it then applies it."""
        return self.server_of.embedder.prefix("query", None)


@contextmanager
def serving_model(embedder: Embedder, **settings: Any) -> Iterator[Server]:
    server = Server(embedder, **settings)
    with serving(type("BrokenHandler", (Handler,), {"server_of": server})) as address:
        server.address = f"{address}/v1"
        yield server
