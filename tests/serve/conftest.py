"""A server of the tiny model on a free port, and what tests compare its answers with."""

import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from f2llm.embed.embedder import Embedder
from f2llm.serve.scheduler import Scheduler

if TYPE_CHECKING:
    import httpx

TEXTS = ["lion", "Ujerumani na Japani", "सफ़ेद कुत्ता", "德国", "Égypte", "two 👩‍👧", "  \n\t "]
LONG = "lion " * 100  # more than the tiny model's 64 tokens


@dataclass
class Server:
    """A running server: its address, its model, and its log."""

    url: str
    embedder: Embedder
    scheduler: Scheduler
    log: io.StringIO = field(default_factory=io.StringIO)

    def post(self, path: str, body: Any = None, **options: Any) -> "httpx.Response":
        import httpx

        return httpx.post(self.url + path, json=body, timeout=30, **options)

    def get(self, path: str, **options: Any) -> "httpx.Response":
        import httpx

        return httpx.get(self.url + path, timeout=30, **options)

    def lines(self) -> list[dict[str, Any]]:
        """The log, a line a request."""
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def line_of(self, answer: "httpx.Response") -> dict[str, Any]:
        """The line of one request, which is written when its answer is out."""

        def found() -> list[dict[str, Any]]:
            request_id = answer.headers["x-request-id"]
            return [line for line in self.lines() if line["request_id"] == request_id]

        assert until(found), "a request has no line in the log"
        (line,) = found()
        return line


def until(true: Callable[[], object], seconds: float = 10) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.005)
    return False


Serving = Callable[..., AbstractContextManager[Server]]


@contextmanager
def running(app: Any) -> Iterator[str]:
    """An ASGI application on a free port, in a thread; its address."""
    import uvicorn

    from f2llm.serve.server import listening

    address = listening("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [address]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{address.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        address.close()
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def embedder(model_folder: Path) -> Embedder:
    return Embedder(model_folder)


@pytest.fixture(scope="session")
def serving(embedder: Embedder) -> Serving:
    """Starts a server of the tiny model; keywords are those of make_app and of Scheduler."""
    for library in ("fastapi", "httpx", "orjson", "prometheus_client", "uvicorn"):
        pytest.importorskip(library, reason="the extra `serve` is not installed")
    from f2llm.serve.app import make_app
    from f2llm.serve.models import Served

    @contextmanager
    def start(
        *,
        raw: Any = None,
        max_waiting_tokens: int = 10_000,
        names: Sequence[str] = ("tiny",),
        **options: Any,
    ) -> Iterator[Server]:
        def served(name: str) -> Served:
            scheduler = Scheduler(raw or embedder.raw, max_waiting_tokens=max_waiting_tokens)
            return Served(name, embedder, scheduler)

        models = [served(name) for name in names]
        scheduler = models[0].scheduler
        log = io.StringIO()
        with running(make_app(models, log=log, **options)) as url:
            server = Server(url, embedder, scheduler, log)
            assert raw or until(lambda: server.get("/health").status_code == 200)
            yield server

    return start


@pytest.fixture(scope="module")
def server(serving: Serving) -> Iterator[Server]:
    """One that all tests of a file share which change nothing about it."""
    with serving() as running_one:
        yield running_one


def assert_same(got: Any, expected: np.ndarray) -> None:
    """Vectors are equal but for the rounding that differs between batches."""
    found = np.asarray(got, dtype=np.float32)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)
