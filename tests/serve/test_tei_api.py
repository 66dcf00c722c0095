"""TEI's routes against the shapes, statuses and headers of TEI 1.9.3, and its client in huggingface_hub."""

import base64
from typing import Any

import numpy as np
import pytest
from tests.conftest import INSTRUCTION
from tests.serve.conftest import LONG, TEXTS, Server, Serving, assert_same

from f2llm.embed.embedder import Embedder
from f2llm.errors import F2Error
from f2llm.model.prompts import query_prefix


@pytest.mark.parametrize("path", ["/embed", "/"])
def test_embed_gives_the_vectors_of_encode(server: Server, embedder: Embedder, path: str) -> None:
    assert_same(server.post(path, {"inputs": TEXTS}).json(), embedder.encode(TEXTS))
    assert_same(server.post(path, {"inputs": "lion"}).json(), embedder.encode(["lion"]))
    assert_same(
        server.post(path, {"inputs": ["lion"], "dimensions": 5}).json(), embedder.encode(["lion"], dim=5)
    )
    raw = server.post(path, {"inputs": TEXTS, "normalize": False, "dimensions": 5}).json()
    np.testing.assert_allclose(raw, embedder.encode(TEXTS, normalize=False, dim=5), rtol=1e-4, atol=1e-5)


def test_prompts(server: Server, embedder: Embedder) -> None:
    query = embedder.encode(["lion"], prompt="query")
    answer = server.post("/embed", {"inputs": "lion", "prompt_name": "query"})
    assert_same(answer.json(), query)
    written_out = query_prefix(INSTRUCTION) + "lion"
    assert_same(server.post("/embed", {"inputs": written_out}).json(), query)
    assert_same(server.post("/embed", {"inputs": "lion", "input_type": "query"}).json(), query)


def test_the_hubs_client_with_its_defaults(server: Server, embedder: Embedder) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asking = hub.InferenceClient(server.url)
    assert_same(asking.feature_extraction("lion"), embedder.encode(["lion"]))
    assert_same(asking.feature_extraction(TEXTS), embedder.encode(TEXTS))
    found = asking.feature_extraction("lion", prompt_name="query", normalize=False, truncate=True)
    np.testing.assert_allclose(found, embedder.encode(["lion"], prompt="query", normalize=False), rtol=1e-4)
    with pytest.raises(Exception, match="422"):
        asking.feature_extraction(LONG)


@pytest.mark.parametrize(
    ("path", "body", "status", "error_type", "says"),
    [
        ("/embed", {"inputs": []}, 400, "Empty", "`inputs` cannot be empty"),
        ("/embed", {"inputs": ""}, 400, "Empty", "`inputs` cannot be empty"),
        ("/embed", {"inputs": ["a", ""]}, 400, "Empty", "text 1"),
        ("/embed", {"inputs": LONG}, 422, "Validation", "at most 64"),
        (
            "/embed",
            {"inputs": ["a"] * 2049},
            422,
            "Validation",
            "batch size 2049 > maximum allowed batch size",
        ),
        ("/embed", {"inputs": "a", "dimensions": 0}, 422, "Validation", "[8, 16, 24]"),
        ("/embed", {"inputs": "a", "dimensions": 25}, 422, "Validation", "1 to 24"),
        (
            "/embed",
            {"inputs": LONG, "truncate": True, "truncation_direction": "Left"},
            422,
            "Validation",
            "left",
        ),
        ("/embed", {"inputs": 5}, 422, "Validation", "a number"),
        ("/embed", {"inputs": [1, 2]}, 422, "Validation", "check_embedding_ctx_length=False"),
        ("/embed", {"inputs": ["a", [1, 2]]}, 422, "Validation", "check_embedding_ctx_length=False"),
        ("/embed", {"inputs": "a", "prompt_name": "poem"}, 422, "Validation", "prompt_name"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "Empty", "sentences"),
        (
            "/similarity",
            {"inputs": {"source_sentence": "", "sentences": ["a"]}},
            400,
            "Empty",
            "source_sentence",
        ),
        ("/similarity", {"inputs": {"sentences": ["a"]}}, 422, "Validation", "source_sentence"),
        ("/rerank", {"query": "", "texts": ["a"]}, 400, "Empty", "query"),
        ("/rerank", {"query": "a", "texts": []}, 400, "Empty", "texts"),
        ("/rerank", {"query": "a", "texts": ["a", LONG]}, 422, "Validation", "text 1"),
        ("/rerank", {"query": "a", "texts": "a"}, 422, "Validation", "array of strings"),
        ("/tokenize", {"inputs": []}, 400, "Empty", "inputs"),
        ("/tokenize", {"inputs": [[1]]}, 422, "Validation", "string"),
        (
            "/tokenize",
            {"inputs": "a", "input_type": "document", "instruction": "x"},
            422,
            "Validation",
            "only",
        ),
        ("/decode", {"ids": []}, 400, "Empty", "ids"),
        ("/decode", {"ids": [10**9]}, 422, "Validation", "no tokens"),
        ("/decode", {"ids": [-1]}, 422, "Validation", "no tokens"),
        ("/decode", {"ids": "lion"}, 422, "Validation", "token ids"),
        ("/nowhere", {}, 404, "Validation", "no such route"),
        ("/health", {}, 405, "Validation", "method"),
    ],
)
def test_errors(server: Server, path: str, body: Any, status: int, error_type: str, says: str) -> None:
    answer = server.post(path, body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error", "error_type"}
    assert answer.json()["error_type"] == error_type and says in answer.json()["error"]


def test_too_long_is_cut_on_request_alone(server: Server, embedder: Embedder) -> None:
    answer = server.post("/embed", {"inputs": ["lion", LONG, LONG], "truncate": True})
    with pytest.warns(UserWarning, match="cut to"):
        assert_same(answer.json(), embedder.encode(["lion", LONG, LONG], too_long="truncate"))
    assert answer.headers["x-f2llm-truncated"] == "2"
    left = server.post("/embed", {"inputs": "lion", "truncate": False, "truncation_direction": "left"})
    assert left.status_code == 200  # nothing is cut, so the side does not matter


def test_headers_say_what_the_vectors_are(server: Server, embedder: Embedder) -> None:
    answer = server.post("/embed", {"inputs": ["lion", "德国"], "instruction": "Find 名 & more\n"})
    headers = answer.headers
    assert headers["x-f2llm-model"] == embedder.identity
    assert headers["x-f2llm-prompt"].startswith("Instruct%3A%20Find%20%E5%90%8D%20%26%20more%0A")
    assert headers["x-f2llm-truncated"] == "0"
    assert headers["x-compute-type"] == "cpu"
    assert int(headers["x-compute-characters"]) == 6
    ids = embedder.token_ids(["lion", "德国"], instruction="Find 名 & more\n")
    assert int(headers["x-compute-tokens"]) == sum(map(len, ids))
    times = [int(headers[f"x-{name}-time"]) for name in ("tokenization", "inference", "compute", "total")]
    assert min(times) >= 0 and times[2] <= times[3] + 1
    assert server.post("/embed", {"inputs": "lion"}).headers["x-f2llm-prompt"] == ""


def test_similarity_is_the_cosine(server: Server, embedder: Embedder) -> None:
    inputs = {"source_sentence": "lion", "sentences": TEXTS}
    vectors = embedder.encode(["lion", *TEXTS])
    assert_same(server.post("/similarity", {"inputs": inputs}).json(), vectors[1:] @ vectors[0])
    prompted = embedder.encode(["lion", *TEXTS], prompt="query")
    answer = server.post("/similarity", {"inputs": inputs, "parameters": {"prompt_name": "query"}})
    assert_same(answer.json(), prompted[1:] @ prompted[0])
    assert abs(prompted[4] @ prompted[0] - vectors[4] @ vectors[0]) > 1e-3


def test_rerank_puts_texts_in_order(server: Server, embedder: Embedder) -> None:
    body = {"query": "lion", "texts": TEXTS, "return_text": True}
    ranks = server.post("/rerank", body).json()
    query, documents = embedder.encode("lion", prompt="query"), embedder.encode(TEXTS, prompt="document")
    expected = {n: float(query @ document) for n, document in enumerate(documents)}
    assert [rank["index"] for rank in ranks] == sorted(expected, key=lambda n: -expected[n])
    for rank in ranks:
        assert rank["score"] == pytest.approx(expected[rank["index"]], abs=1e-5)
        assert rank["text"] == TEXTS[rank["index"]]
    bare = server.post("/rerank", {"query": "lion", "texts": TEXTS, "raw_scores": True}).json()
    assert bare == [{"index": rank["index"], "score": pytest.approx(rank["score"])} for rank in ranks]


def test_tokenize_and_decode_are_inverse(server: Server, embedder: Embedder) -> None:
    texts = ["a lion", "德国 Égypte"]
    tokenized = server.post("/tokenize", {"inputs": texts}).json()
    assert [[token["id"] for token in one] for one in tokenized] == embedder.token_ids(texts)
    for text, tokens in zip(texts, tokenized, strict=True):
        *ordinary, eos = tokens
        assert eos == {
            "id": embedder.facts.eos_id,
            "text": "<|eos|>",
            "special": True,
            "start": None,
            "stop": None,
        }
        assert all(token["text"] == text[token["start"] : token["stop"]] for token in ordinary)
        assert {n for token in ordinary for n in range(token["start"], token["stop"])} == set(
            range(len(text))
        )
    ids = embedder.token_ids(texts)
    decoded = server.post("/decode", {"ids": ids}).json()
    assert [text.strip() for text in decoded] == texts
    assert server.post("/decode", {"ids": ids[0]}).json() == decoded[:1]
    assert server.post("/decode", {"ids": ids[0], "skip_special_tokens": False}).json()[0].endswith("<|eos|>")
    bare = server.post("/tokenize", {"inputs": "a lion", "add_special_tokens": False}).json()
    assert [[token["id"] for token in one] for one in bare] == [ids[0][:-1]]
    prompted = server.post("/tokenize", {"inputs": "lion", "prompt_name": "query"}).json()
    assert [token["id"] for token in prompted[0]] == embedder.token_ids(["lion"], prompt="query")[0]


def test_info(server: Server, embedder: Embedder) -> None:
    info = server.get("/info").json()
    assert info["model_type"] == {"embedding": {"pooling": "last_token"}}
    assert info["model_sha"] == embedder.identity and info["max_input_length"] == 64
    assert info["auto_truncate"] is False and info["max_client_batch_size"] == 2048
    assert set(info) >= set(
        "model_id model_dtype served_model_name max_concurrent_requests max_batch_tokens max_batch_requests "
        "tokenization_workers version sha docker_label".split()
    )


# --- Token arrays: never another vocabulary by accident


def test_native_token_arrays(serving: Serving, embedder: Embedder) -> None:
    ids = embedder.token_ids(["lion", "德国"])
    expected = embedder.encode(["lion", "德国"])
    with serving(token_arrays="native") as native:
        assert_same(native.post("/embed", {"inputs": ids}).json(), expected)
        assert_same(native.post("/embed", {"inputs": ids[0]}).json(), expected[:1])
        without_eos = [sequence[:-1] for sequence in ids]
        assert_same(native.post("/embed", {"inputs": without_eos}).json(), expected)
        assert_same(native.post("/embed", {"inputs": ["lion", ids[1]]}).json(), expected)
        for bad in ([-1], [embedder.tokenizer.get_vocab_size()], [10**30]):
            answer = native.post("/v1/embeddings", {"input": [ids[0], bad]})
            assert answer.status_code == 400 and "token array 1" in answer.json()["error"]["message"]
        prompted = native.post("/embed", {"inputs": ids, "prompt_name": "query"})
        assert prompted.status_code == 422 and "prompt" in prompted.json()["error"]
        long = native.post("/embed", {"inputs": [ids[0][:1] * 64]})
        assert long.status_code == 422 and "65" in long.json()["error"]  # with EOS


def test_cl100k_token_arrays_become_texts_again(
    serving: Serving, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    # The real file comes from the network; an encoding of single bytes stands in for it.
    ranks = {bytes([n]): n for n in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", {"cl100k_base": encoding}.__getitem__)
    with serving(token_arrays="cl100k") as served:
        ids = [list(b"lion"), list("德国".encode())]
        assert_same(served.post("/embed", {"inputs": ids}).json(), embedder.encode(["lion", "德国"]))
        prompted = served.post("/embed", {"inputs": ids, "prompt_name": "query"}).json()
        assert_same(prompted, embedder.encode(["lion", "德国"], prompt="query"))
        for bad in (300, -1, 2**70):
            answer = served.post("/embed", {"inputs": ["lion", [bad]]})
            assert answer.status_code == 422 and "token array 1" in answer.json()["error"]
        mixed = served.post("/v1/embeddings", {"input": ids[0], "encoding_format": "base64"}).json()
        vector = np.frombuffer(base64.b64decode(mixed["data"][0]["embedding"]), "<f4")
        assert_same([vector], embedder.encode(["lion"]))


def test_cl100k_without_its_file_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    from f2llm.serve.token_arrays import token_policy

    def no_network(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(F2Error, match="cl100k_base, which cannot be had .*TIKTOKEN_CACHE_DIR"):
        token_policy("cl100k")
