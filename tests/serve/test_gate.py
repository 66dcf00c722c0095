"""What holds for every route: keys, limits of the body, ids, the log, figures, failures, and clients that go away."""

import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from tests.serve.conftest import TEXTS, Server, Serving, assert_same, until

from f2llm.embed.embedder import Embedder

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
import httpx

from f2llm.serve import gate

KEYS = ["sk-first-secret", "sk-zweiter-schlüssel"]
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"input": "lion"}),
    ("/embeddings", {"input": "lion"}),
    ("/v2/embed", {"texts": ["lion"], "model": "x", "input_type": "search_query"}),
    ("/embed", {"inputs": "lion"}),
    ("/rerank", {"query": "lion", "texts": ["lion"]}),
]


def message(answer: httpx.Response) -> str:
    """What an error says, in the shape of its family."""
    body = answer.json()
    if answer.url.path in ("/v1/embeddings", "/embeddings"):
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
        return str(body["error"]["message"])
    if answer.url.path == "/v2/embed":
        assert set(body) == {"message"}
        return str(body["message"])
    assert set(body) == {"error", "error_type"}
    return str(body["error"])


# --- Keys


@pytest.fixture(scope="module")
def guarded(serving: Serving) -> Iterator[Server]:
    with serving(keys=KEYS) as server:
        yield server


@pytest.mark.parametrize(("path", "body"), REQUESTS)
@pytest.mark.parametrize(
    "given", [None, "Bearer sk-first", "Bearer", "Basic sk-first-secret", "sk-first-secret"]
)
def test_a_wrong_key_is_a_401(guarded: Server, path: str, body: dict[str, Any], given: str | None) -> None:
    answer = guarded.post(path, body, headers={"authorization": given} if given else {})
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    if path in ("/embed", "/rerank"):
        assert answer.content == b""  # as TEI does
    else:
        assert "Authorization: Bearer" in message(answer)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens_every_route(guarded: Server, key: str) -> None:
    for path, body in REQUESTS:
        headers = {"authorization": b"Bearer " + key.encode()}
        assert guarded.post(path, body, headers=headers).status_code == 200


def test_health_needs_no_key_and_figures_do(guarded: Server) -> None:
    assert (
        guarded.get("/health").status_code == guarded.get("/ping").status_code == guarded.get("/").status_code
    )
    for path in ("/metrics", "/info", "/v1/models", "/openapi.json", "/nowhere"):
        assert guarded.get(path).status_code == 401


def test_the_openai_client_says_that_the_key_is_wrong(guarded: Server) -> None:
    openai = pytest.importorskip("openai")
    wrong = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong")
    with pytest.raises(openai.AuthenticationError) as told:
        wrong.embeddings.create(model="tiny", input="lion")
    assert told.value.code == "invalid_api_key" and told.value.request_id
    right = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEYS[0])
    assert right.embeddings.create(model="tiny", input="lion").data


def test_clients_are_told_apart_by_key(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[str] = []
    with serving(keys=KEYS) as server:
        vectors = server.scheduler.vectors

        def watched(client: str, ids: Any) -> Any:
            clients.append(client)
            return vectors(client, ids)

        monkeypatch.setattr(server.scheduler, "vectors", watched)
        for key in (KEYS[0], KEYS[1], KEYS[0]):
            headers = {"authorization": b"Bearer " + key.encode()}
            server.post("/embed", {"inputs": "lion"}, headers=headers)
    first, second, third = clients
    assert first == third != second and not any(key in first + second for key in KEYS)


# --- The body


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_a_large_body_is_a_413(
    server: Server, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MAX_BODY", 1000)
    assert server.post(path, {**body, "user": "x" * 800}).status_code == 200
    for large in (b" " * 1001, iter([b" " * 500] * 3)):  # declared, and chunk by chunk
        answer = server.post(path, content=large, headers={"content-type": "application/json"})
        assert answer.status_code == 413 and "1000 bytes" in message(answer)


def test_33_million_bytes_are_refused_and_31_are_read(server: Server) -> None:
    headers = {"content-type": "application/json"}
    answer = server.post("/v1/embeddings", content=b" " * 33 * 1024**2, headers=headers)
    assert answer.status_code == 413
    answer = server.post(
        "/v1/embeddings", content=b" " * 31 * 1024**2 + b'{"input": "lion"}', headers=headers
    )
    assert answer.status_code == 200


# --- Ids, log, figures


def test_request_ids(server: Server) -> None:
    assert (
        server.get("/health", headers={"x-request-id": "trace-1:2.3_a"}).headers["x-request-id"]
        == "trace-1:2.3_a"
    )
    for insane in ("a b", "x" * 129, "ü", "{}", ""):
        answer = server.post("/embed", {"inputs": ""}, headers={"x-request-id": insane.encode()})
        assert answer.status_code == 400 and len(answer.headers["x-request-id"]) == 32
    assert server.get("/health").headers["x-request-id"] != server.get("/health").headers["x-request-id"]


def test_every_embedding_answer_says_what_made_it(server: Server, embedder: Embedder) -> None:
    prompted = {"/v2/embed", "/rerank"}
    for path, body in REQUESTS:
        headers = server.post(path, body).headers
        assert headers["x-f2llm-model"] == embedder.identity and headers["x-f2llm-truncated"] == "0"
        expected = embedder.prefix("query", None) if path in prompted else ""
        assert unquote(headers["x-f2llm-prompt"]) == expected and headers["x-request-id"]


def test_one_line_of_log_a_request_without_texts_and_keys(serving: Serving, embedder: Embedder) -> None:
    with serving(keys=KEYS) as server:
        good = {"authorization": f"Bearer {KEYS[0]}"}
        answers = [
            server.post(
                "/v1/embeddings", {"input": ["zebra", "lion"]}, headers={**good, "x-request-id": "mine"}
            ),
            server.post("/embed?zebra=zebra", {"inputs": 5, "zebra": "zebra"}, headers=good),
            server.get("/zebra/zebra", headers=good),
            server.post("/embed", {"inputs": "zebra"}, headers={"authorization": "Bearer sk-guessed"}),
        ]
        first, second, third, fourth = map(server.line_of, answers)
        log = server.log.getvalue()
    tokens = sum(map(len, embedder.token_ids(["zebra", "lion"])))
    assert first["method"] == "POST" and first["route"] == "/v1/embeddings" and first["status"] == 200
    assert (first["texts"], first["tokens"], first["model"], first["request_id"]) == (
        2,
        tokens,
        "tiny",
        "mine",
    )
    assert 0 < first["seconds"] < 10
    assert (second["route"], second["status"], second["texts"]) == ("/embed", 422, 0)
    assert (third["route"], third["status"]) == ("other", 404)
    assert (fourth["route"], fourth["status"], fourth["model"]) == ("/embed", 401, None)
    assert not any(secret in log for secret in ("zebra", "lion", "sk-", *KEYS))


def test_metrics(serving: Serving, embedder: Embedder) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    with serving() as server:

        def figures() -> dict[tuple[str, ...], float]:
            page = server.get("/metrics")
            assert page.headers["content-type"].startswith("text/plain")
            families = parser.text_string_to_metric_families(page.text)
            return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

        before = figures()
        server.post("/embed", {"inputs": TEXTS})
        server.post("/embed", {"inputs": "lion " * 100, "truncate": True})
        server.post("/embed", {"inputs": ""})
        after = figures()
    tokens = sum(map(len, embedder.token_ids(TEXTS))) + embedder.max_length
    assert after["f2llm_requests_total", "/embed", "200"] == 2
    assert after["f2llm_requests_total", "/embed", "400"] == 1
    assert after["f2llm_request_seconds_count", "/embed"] == 3
    assert after["f2llm_texts_total", "tiny"] == len(TEXTS) + 1
    assert after["f2llm_tokens_total", "tiny"] == tokens
    assert after["f2llm_truncated_texts_total", "tiny"] == 1
    assert after["f2llm_waiting_tokens", "tiny"] == after["f2llm_waiting_texts", "tiny"] == 0
    computed = after["f2llm_batch_tokens_sum", "tiny"] - before["f2llm_batch_tokens_sum", "tiny"]
    assert computed == tokens


# --- Failures, and clients that go away


@pytest.mark.parametrize("nan", [False, True])
def test_a_model_that_fails_is_a_500_and_the_server_lives_on(
    serving: Serving, embedder: Embedder, nan: bool
) -> None:
    broken = threading.Event()

    def raw(ids: list[list[int]], alone: bool) -> np.ndarray:
        if not broken.is_set():
            return embedder.raw(ids)
        if nan:
            return np.full((len(ids), 24), np.nan, dtype=np.float32)
        raise RuntimeError("zebra")

    with serving(raw=raw) as server:
        assert until(lambda: server.get("/health").status_code == 200)
        broken.set()
        for path, body in REQUESTS:
            answer = server.post(path, body)
            assert answer.status_code == (424 if path in ("/embed", "/rerank") else 500)
            assert "zebra" not in answer.text and message(answer)
            line = server.line_of(answer)
            assert nan or (line["error"] == "RuntimeError" and "in raw" in line["at"][-1])
        broken.clear()
        assert_same(server.post("/embed", {"inputs": "lion"}).json(), embedder.encode(["lion"]))
        assert "zebra" not in server.log.getvalue()


def test_a_client_that_goes_away_takes_its_texts_along(serving: Serving, embedder: Embedder) -> None:
    free = threading.Event()
    computed: list[tuple[int, ...]] = []

    def slow(ids: list[list[int]], alone: bool) -> np.ndarray:
        assert free.wait(30)
        computed.extend(map(tuple, ids))
        return embedder.raw(ids)

    with serving(raw=slow) as server:
        assert until(lambda: server.scheduler.waiting_texts == 0)  # the warm-up is being computed
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/embeddings", json={"input": ["zebra", "lion"]}, timeout=0.3)
        gone = until(lambda: server.scheduler.waiting_texts == 0)
        free.set()
        assert gone, "texts of a client that went away are still in the queue"
        assert_same(server.post("/embed", {"inputs": "tembo"}).json(), embedder.encode(["tembo"]))
        assert until(lambda: any(line["status"] == 499 for line in server.lines()))
        assert tuple(embedder.token_ids(["zebra"])[0]) not in computed


def test_health_is_503_until_the_models_are_warm(serving: Serving, embedder: Embedder) -> None:
    free = threading.Event()
    lengths: list[int] = []

    def slow(ids: list[list[int]], alone: bool) -> np.ndarray:
        assert free.wait(30)
        lengths.extend(map(len, ids))
        return embedder.raw(ids)

    with serving(raw=slow) as server:
        for path in ("/health", "/ping", "/"):
            answer = server.get(path)
            assert answer.status_code == 503 and answer.json()["error_type"] == "Unhealthy"
        free.set()
        assert until(lambda: server.get("/health").status_code == 200)
    assert min(lengths) < 5 and max(lengths) == embedder.max_length


# --- Several models


def test_of_several_models_a_request_names_one(serving: Serving, embedder: Embedder) -> None:
    with serving(names=["one", "owner/two"]) as server:
        for name in ("one", "owner/two"):
            answer = server.post("/v1/embeddings", {"input": "lion", "model": name})
            assert answer.json()["model"] == name
            assert server.post("/embed", {"inputs": "lion", "model": name}).status_code == 200
            assert server.get("/info", params={"model": name}).json()["model_id"] == name
            assert server.get(f"/v1/models/{name}").json()["id"] == name
        unknown = server.post("/v1/embeddings", {"input": "lion", "model": "three"})
        assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
        assert "one, owner/two" in message(unknown)
        body = {"texts": ["lion"], "model": "three", "input_type": "search_query"}
        assert server.post("/v2/embed", body).status_code == 404
        assert server.post("/v1/embeddings", {"input": "lion"}).status_code == 400
        assert server.post("/embed", {"inputs": "lion"}).status_code == 422
