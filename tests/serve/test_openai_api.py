"""OpenAI's routes, asked by its own client with its defaults, and by plain HTTP where the client would not."""

import base64
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tests.serve.conftest import LONG, TEXTS, Server, Serving, assert_same

from f2llm.embed.embedder import Embedder

openai = pytest.importorskip("openai", reason="the client `openai` is not installed")


def client(server: Server, key: str = "none", **options: int) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, **options)


def test_the_client_with_its_defaults_gets_the_vectors_of_encode(server: Server, embedder: Embedder) -> None:
    answer = client(server).embeddings.create(model="any name", input=TEXTS)
    assert_same([item.embedding for item in answer.data], embedder.encode(TEXTS))
    assert [item.index for item in answer.data] == list(range(len(TEXTS)))
    tokens = sum(map(len, embedder.token_ids(TEXTS)))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)
    assert answer.model == "tiny" and answer.object == "list"
    one = client(server).embeddings.create(model="tiny", input="lion")
    assert_same([one.data[0].embedding], embedder.encode(["lion"]))


def test_base64_has_the_bytes_of_the_floats(server: Server) -> None:
    for dimensions in (None, 5):
        body = {"input": TEXTS, "model": "tiny", "dimensions": dimensions}
        floats = server.post("/v1/embeddings", {**body, "encoding_format": "float"}).json()["data"]
        coded = server.post("/embeddings", {**body, "encoding_format": "base64"}).json()["data"]
        for as_floats, as_base64 in zip(floats, coded, strict=True):
            expected = np.array(as_floats["embedding"], dtype="<f4").tobytes()
            assert base64.b64decode(as_base64["embedding"]) == expected


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 16, 23, 24])
def test_every_size_has_unit_length(server: Server, embedder: Embedder, dim: int) -> None:
    answer = client(server).embeddings.create(model="tiny", input=TEXTS, dimensions=dim)
    vectors = np.array([item.embedding for item in answer.data])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-6)
    assert_same(vectors, embedder.encode(TEXTS, dim=dim))


@pytest.mark.parametrize("dim", [0, -1, 25, 10**30])
def test_other_sizes_are_refused_with_those_there_are(server: Server, dim: int) -> None:
    with pytest.raises(openai.BadRequestError, match=r"\[8, 16, 24\]") as told:
        client(server).embeddings.create(model="tiny", input="lion", dimensions=dim)
    assert told.value.param == "dimensions" and told.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": []}, "input", "at least one text"),
        ({"input": ""}, "input", "text 0"),
        ({"input": ["lion", ""]}, "input", "text 1"),
        ({"input": [[]]}, "input", "text 0"),
        ({"input": None}, "input", "null"),
        ({"input": {"text": "lion"}}, "input", "an object"),
        ({"input": ["lion", 3.5]}, "input", "item 1 is a number"),
        ({"input": ["lion", True]}, "input", "item 1 is a boolean"),
        ({}, "input", "missing"),
        ({"input": "lion", "dimensions": "8"}, "dimensions", "integer"),
        ({"input": "lion", "dimensions": True}, "dimensions", "integer"),
        ({"input": "lion", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "lion", "input_type": "sonnet"}, "input_type", "search_query"),
        ({"input": "lion", "truncate": "END"}, "truncate", "boolean"),
        ({"input": "lion", "model": 1}, "model", "string"),
        ({"input": "lion", "instruction": "x" * 1001}, "instruction", "1000"),
        ({"input": "lion", "input_type": "document", "instruction": "x"}, "instruction", "only queries"),
        ({"input": "lion", "input_type": "document", "prompt_name": "query"}, "prompt_name", "one of them"),
    ],
)
def test_what_is_wrong_is_a_400_that_names_the_field(
    server: Server, fields: dict[str, object], param: str, says: str
) -> None:
    answer = server.post("/v1/embeddings", {"model": "tiny", **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert says in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b'"lion"', b"[1", b"\xff\xfe", b"[" * 100_000, b"9" * 5000])
def test_a_body_that_is_no_object_is_a_400(server: Server, body: bytes) -> None:
    answer = server.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "the body" in answer.json()["error"]["message"]


def test_unknown_fields_are_ignored(server: Server, embedder: Embedder) -> None:
    answer = client(server).embeddings.create(
        model="tiny", input="lion", user="me", extra_body={"task": "retrieval", "input": "lion"}
    )
    assert_same([answer.data[0].embedding], embedder.encode(["lion"]))


def test_too_long_is_refused_and_cut_on_request(server: Server, embedder: Embedder) -> None:
    length = len(embedder.token_ids([LONG])[0])
    with pytest.raises(openai.BadRequestError, match=rf"at most 64 .*text 1 has {length}"):
        client(server).embeddings.create(model="tiny", input=["lion", LONG])
    raw = client(server).embeddings.with_raw_response.create(
        model="tiny", input=["lion", LONG], extra_body={"truncate": True}
    )
    answer = raw.parse()
    with pytest.warns(UserWarning, match="1 of the texts cut"):
        expected = embedder.encode(["lion", LONG], too_long="truncate")
    assert_same([item.embedding for item in answer.data], expected)
    assert answer.usage.model_extra == {"truncated_inputs": 1}
    assert raw.headers["x-f2llm-truncated"] == "1"


def test_prompts_by_each_name(server: Server, embedder: Embedder) -> None:
    query, bare = embedder.encode(["lion"], prompt="query"), embedder.encode(["lion"])
    assert float((query @ bare.T).item()) < 0.999
    other = embedder.encode(["lion"], instruction="Trouve")
    for extra, expected in (
        ({"input_type": "query"}, query),
        ({"input_type": "search_query"}, query),
        ({"prompt_name": "query"}, query),
        ({"prompt_name": "query", "input_type": "query"}, query),
        ({"input_type": "document"}, bare),
        ({"input_type": "passage"}, bare),
        ({"input_type": "classification"}, bare),
        ({"instruction": "Trouve"}, other),
        ({"instruction": "Trouve", "input_type": "search_query"}, other),
    ):
        answer = client(server).embeddings.create(model="tiny", input="lion", extra_body=extra)
        assert_same([answer.data[0].embedding], expected)


def test_2048_inputs_pass_and_2049_do_not(server: Server, embedder: Embedder) -> None:
    texts = [f"{TEXTS[n % 5]} {n}" for n in range(2048)]
    answer = client(server).embeddings.create(model="tiny", input=texts)
    assert_same([item.embedding for item in answer.data], embedder.encode(texts))
    with pytest.raises(openai.BadRequestError, match="2049"):
        client(server).embeddings.create(model="tiny", input=[*texts, "one more"])


def test_more_than_300_000_tokens_are_refused(
    server: Server, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("f2llm.serve.inputs.MAX_TOKENS", 10)
    tokens = sum(map(len, embedder.token_ids(TEXTS)))
    with pytest.raises(
        openai.BadRequestError, match=rf"{tokens} tokens in all, the limit of a request is 10"
    ):
        client(server).embeddings.create(model="tiny", input=TEXTS)


def test_company_does_not_change_a_vector(server: Server, embedder: Embedder) -> None:
    """The same text alone, and while many others are computed with it."""
    expected = {text: embedder.encode(text) for text in TEXTS}
    worst: list[float] = []

    def ask(order: Sequence[str]) -> None:
        own = client(server)
        for text in order:
            found = own.embeddings.create(model="tiny", input=[text, *TEXTS[:2]]).data[0].embedding
            worst.append(float(np.dot(found, expected[text])))

    threads = [threading.Thread(target=ask, args=(TEXTS[n:] + TEXTS[:n],)) for n in range(len(TEXTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == len(TEXTS) ** 2 and min(worst) > 0.99999


def test_overload_is_a_429_that_the_client_survives(serving: Serving, embedder: Embedder) -> None:
    free, computing = threading.Event(), threading.Event()

    def slow(ids: list[list[int]], alone: bool) -> np.ndarray:
        computing.set()
        assert free.wait(30)
        return embedder.raw(ids)

    with serving(raw=slow, max_waiting_tokens=4) as busy:
        waiting = [threading.Thread(target=busy.post, args=("/embed", {"inputs": "zebra"})) for _ in range(4)]
        assert computing.wait(10)
        try:
            for thread in waiting:
                thread.start()
            while busy.scheduler.waiting_tokens <= 4:
                time.sleep(0.001)
            for path, body in (
                ("/v1/embeddings", {"input": "lion"}),
                ("/v2/embed", {"texts": ["lion"], "model": "x", "input_type": "search_query"}),
                ("/embed", {"inputs": "lion"}),
            ):
                refused = busy.post(path, body, headers={"authorization": "Bearer x"})
                assert refused.status_code == 429, refused.text
                assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error_type"] == "Overloaded"
            with pytest.raises(openai.RateLimitError):
                client(busy, max_retries=0).embeddings.create(model="tiny", input="lion")
            threading.Timer(0.3, free.set).start()
            answer = client(busy, max_retries=5).embeddings.create(model="tiny", input="lion")
            assert_same([answer.data[0].embedding], embedder.encode(["lion"]))
        finally:
            free.set()
            for thread in waiting:
                thread.join()


def test_the_models_that_are_served(server: Server, embedder: Embedder) -> None:
    (card,) = client(server).models.list().data
    assert card.id == "tiny" and card.owned_by == "f2llm"
    assert client(server).models.retrieve("tiny") == card
    with pytest.raises(openai.NotFoundError):
        client(server).models.retrieve("another")
    assert card.model_extra is not None and card.model_extra["identity"] == embedder.identity
