"""Frameworks' clients with their defaults untouched: LangChain, LlamaIndex."""

import json
from typing import Any

import pytest
from tests.serve.conftest import TEXTS, Server, Serving, assert_same

from f2llm.embed.embedder import Embedder

# "The quick brown fox jumps over the lazy dog" in OpenAI's cl100k_base.
CL100K_IDS = [791, 4062, 14198, 39935, 35308, 927, 279, 16053, 5679]
# What LangChain's OpenAIEmbeddings posts when nothing is changed: ids, under whatever name the user gave.
LANGCHAIN_DEFAULT = {"input": [CL100K_IDS], "model": "tiny", "encoding_format": "base64"}


def test_langchain_with_texts(server: Server, embedder: Embedder) -> None:
    library = pytest.importorskip("langchain_openai", reason="the client `langchain-openai` is not installed")
    vectors = library.OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="none", model="tiny", check_embedding_ctx_length=False
    )
    assert_same(vectors.embed_documents(TEXTS), embedder.encode(TEXTS))
    assert_same([vectors.embed_query("lion")], embedder.encode(["lion"]))
    short = library.OpenAIEmbeddings(
        base_url=f"{server.url}/v1",
        api_key="none",
        model="tiny",
        dimensions=8,
        check_embedding_ctx_length=False,
        model_kwargs={"extra_body": {"input_type": "query"}},
    )
    assert_same(short.embed_documents(["lion"]), embedder.encode(["lion"], dim=8, prompt="query"))


def test_langchains_default_is_refused_with_what_to_do(server: Server) -> None:
    answer = server.post("/v1/embeddings", LANGCHAIN_DEFAULT)
    assert answer.status_code == 400
    assert "check_embedding_ctx_length=False" in answer.json()["error"]["message"]


def test_langchains_default_does_post_token_arrays(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded request above is the one that the library makes."""
    library = pytest.importorskip("langchain_openai", reason="the client `langchain-openai` is not installed")
    openai = pytest.importorskip("openai")
    tiktoken = pytest.importorskip("tiktoken")

    class Encoding:
        """Stands in for cl100k_base, whose file comes from the network."""

        def encode_ordinary(self, text: str) -> list[int]:
            return CL100K_IDS

        def encode(self, text: str, **options: Any) -> list[int]:
            return CL100K_IDS

    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda name: Encoding())
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: Encoding())
    posted: list[dict[str, Any]] = []
    http = pytest.importorskip("httpx").Client(
        event_hooks={"request": [lambda request: posted.append(json.loads(request.content))]}
    )
    vectors = library.OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="none", model="tiny", http_client=http
    )
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        vectors.embed_query("The quick brown fox jumps over the lazy dog")
    assert posted == [LANGCHAIN_DEFAULT]


def test_langchains_empty_text_is_a_clean_400(server: Server) -> None:
    answers = [server.post("/v1/embeddings", {"input": "", "model": "tiny"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert answers[0].json() == answers[1].json()


def test_llama_index(server: Server, embedder: Embedder) -> None:
    library = pytest.importorskip(
        "llama_index.embeddings.openai", reason="`llama-index-embeddings-openai` is not installed"
    )
    vectors = library.OpenAIEmbedding(api_base=f"{server.url}/v1", api_key="none", model_name="tiny")
    assert_same(vectors.get_text_embedding_batch(TEXTS), embedder.encode([*TEXTS[:-1], "   \t "]))
    assert_same([vectors.get_query_embedding("lion")], embedder.encode(["lion"]))


def test_llama_index_openai_like(server: Server, embedder: Embedder) -> None:
    library = pytest.importorskip(
        "llama_index.embeddings.openai_like", reason="`llama-index-embeddings-openai-like` is not installed"
    )
    vectors = library.OpenAILikeEmbedding(api_base=f"{server.url}/v1", model_name="tiny", dimensions=8)
    many = [f"lion {n}" for n in range(25)]  # three batches
    assert_same(vectors.get_text_embedding_batch(many), embedder.encode(many, dim=8))


def test_a_key_reaches_the_server_through_frameworks(serving: Serving, embedder: Embedder) -> None:
    library = pytest.importorskip("langchain_openai", reason="the client `langchain-openai` is not installed")
    openai = pytest.importorskip("openai")
    with serving(keys=["sk-right"]) as server:
        options = {"base_url": f"{server.url}/v1", "model": "tiny", "check_embedding_ctx_length": False}
        right = library.OpenAIEmbeddings(api_key="sk-right", **options)
        assert_same([right.embed_query("lion")], embedder.encode(["lion"]))
        with pytest.raises(openai.AuthenticationError):
            library.OpenAIEmbeddings(api_key="sk-wrong", **options).embed_query("lion")
