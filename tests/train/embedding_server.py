"""A server of one's own that speaks the embeddings protocol, counts what it is asked, and misbehaves on demand."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
from tests.data.hub_server import serving

WIDTH = 20
KEY = "sk-secret-embedding"


@dataclass
class Server:
    address: str = ""
    misdeeds: Callable[[int], str] = lambda number: ""
    """From the number of the request (0, 1, ...) to what goes wrong: `429`, `401`, `not json`, `one less` ..."""
    texts: Counter[str] = field(default_factory=Counter)
    """How often a text's vector was given."""
    requests: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def vector_of(text: str) -> list[float]:
    """Of unit length; depends on the text alone."""
    seed = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
    raw = np.random.default_rng(seed).normal(size=WIDTH)
    return [float(x) for x in raw / np.linalg.norm(raw)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server_of
        with server.lock:
            misdeed = server.misdeeds(server.requests)
            server.requests += 1
        if self.path != "/v1/embeddings" or body["model"] != "tester" or misdeed == "401":
            return self.send(401, {"error": f"no {self.headers.get('Authorization')}"})
        if misdeed.isdigit():
            return self.send(int(misdeed), {"error": "later"})
        if misdeed == "closed":
            self.close_connection = True
            return self.connection.close()
        texts = body["input"]
        data = [{"index": n, "embedding": vector_of(text)} for n, text in enumerate(texts)]
        if misdeed == "one less":
            del data[-1]
        if misdeed == "not finite":
            data[0]["embedding"] = [float("nan")] * WIDTH
        with server.lock:
            server.texts.update(texts)
        return self.send(200, "<html>" if misdeed == "not json" else {"data": data[::-1], "model": "tester"})

    def send(self, status: int, value: Any) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving_embeddings(**settings: Any) -> Iterator[Server]:
    server = Server(**settings)
    with serving(type("EmbeddingsHandler", (Handler,), {"server_of": server})) as address:
        server.address = f"{address}/v1"
        yield server
