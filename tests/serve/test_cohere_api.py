"""Cohere's route, asked by its own client; bytes and bits against definitions written out by hand."""

import base64
import struct
from typing import Any

import numpy as np
import pytest
from tests.serve.conftest import LONG, TEXTS, Server, Serving, assert_same

from f2llm.embed.embedder import Embedder

cohere = pytest.importorskip("cohere", reason="the client `cohere` is not installed")

ALL = ["float", "int8", "uint8", "binary", "ubinary", "base64"]


def client(server: Server) -> Any:
    return cohere.ClientV2(api_key="none", base_url=server.url)


def embeddings(server: Server, texts: list[str], **options: Any) -> Any:
    given = {"model": "tiny", "input_type": "search_document", "embedding_types": ALL, **options}
    return client(server).embed(texts=texts, **given).embeddings


def test_the_client_with_its_defaults(server: Server, embedder: Embedder) -> None:
    answer = client(server).embed(model="any", texts=TEXTS, input_type="search_document")
    assert_same(answer.embeddings.float_, embedder.encode(TEXTS))
    assert answer.embeddings.int8 is None and answer.response_type == "embeddings_by_type"
    assert answer.texts == TEXTS and answer.id
    assert answer.meta.billed_units.input_tokens == sum(map(len, embedder.token_ids(TEXTS)))


def test_input_types(server: Server, embedder: Embedder) -> None:
    for input_type, prompt in (("search_query", "query"), ("clustering", None), ("classification", None)):
        found = embeddings(server, TEXTS, input_type=input_type, embedding_types=["float"])
        assert_same(found.float_, embedder.encode(TEXTS, prompt=prompt))


@pytest.mark.parametrize("dim", [24, 16, 8])
def test_every_embedding_type_follows_from_the_floats(server: Server, dim: int) -> None:
    found = embeddings(server, TEXTS, output_dimension=dim)
    for n, floats in enumerate(found.float_):
        assert np.linalg.norm(floats) == pytest.approx(1, abs=1e-6)
        assert base64.b64decode(found.base64[n]) == struct.pack(f"<{dim}f", *floats)
        bits = "".join("1" if x > 0 else "0" for x in floats)
        unsigned = [int(bits[start : start + 8], 2) for start in range(0, dim, 8)]
        assert found.ubinary[n] == unsigned
        assert found.binary[n] == [byte - 128 for byte in unsigned]
        assert found.uint8[n] == [x + 128 for x in found.int8[n]]
        assert all(-127 <= x <= 127 for x in found.int8[n])


def test_bytes_keep_cosines(server: Server) -> None:
    found = embeddings(server, TEXTS)
    floats = np.array(found.float_)
    bytes_ = np.array(found.int8, dtype=np.float64)
    bytes_ /= np.linalg.norm(bytes_, axis=1, keepdims=True)
    assert np.abs(floats @ floats.T - bytes_ @ bytes_.T).max() < 0.02
    assert np.abs(bytes_).max() > 0  # a range too wide would make zeros of them all
    # Rounding to steps of r / 127 is off by half a step at most, but for the few that are clipped.
    steps = np.array(found.int8) / np.where(floats == 0, 1, floats)
    step = np.median(steps[np.abs(floats) > 0.1])
    inside = np.abs(np.array(found.int8)) < 127
    assert np.abs(np.array(found.int8) - floats * step)[inside].max() < 0.75


def test_a_text_has_the_same_bytes_in_any_company(server: Server, serving: Serving) -> None:
    together = embeddings(server, TEXTS)
    with serving() as fresh:  # calibrated anew, on another first request
        for n, text in enumerate(TEXTS):
            alone = embeddings(fresh, [text])
            for kind in ("int8", "uint8"):
                # A float32 rounding at the very edge between two steps may differ between batches.
                assert np.abs(np.subtract(getattr(alone, kind)[0], getattr(together, kind)[n])).max() <= 1
            assert alone.binary[0] == together.binary[n] and alone.ubinary[0] == together.ubinary[n]


def test_other_sizes_fill_the_last_byte_with_zeros(server: Server) -> None:
    found = embeddings(server, ["lion"], output_dimension=11)
    bits = [x > 0 for x in found.float_[0]] + [False] * 5
    assert found.ubinary == [[int("".join("01"[bit] for bit in bits[k : k + 8]), 2) for k in (0, 8)]]


def test_inputs_in_parts(server: Server, embedder: Embedder) -> None:
    parts = [{"content": [{"type": "text", "text": "sea"}, {"type": "text", "text": "lion"}]}]
    answer = client(server).embed(model="tiny", input_type="search_query", inputs=parts)
    assert_same(answer.embeddings.float_, embedder.encode(["sea lion"], prompt="query"))


def test_truncate(server: Server, embedder: Embedder) -> None:
    with pytest.warns(UserWarning, match="cut to"):
        expected = embedder.encode(["lion", LONG], too_long="truncate")
    options = {"model": "tiny", "input_type": "search_document", "texts": ["lion", LONG]}
    answer = client(server).embed(**options, truncate="END")
    assert_same(answer.embeddings.float_, expected)
    assert answer.meta.warnings == ["1 of the texts cut"]
    for truncate in ({}, {"truncate": "NONE"}):
        with pytest.raises(cohere.BadRequestError, match="text 1"):
            client(server).embed(**options, **truncate)
    with pytest.raises(cohere.BadRequestError, match="START"):
        client(server).embed(**options, truncate="START")
    eos = embedder.facts.eos_id
    ids = embedder.token_ids(["a lion in Egypt"])[0]
    assert len(ids) > 4
    short = (
        client(server)
        .embed(**{**options, "texts": ["a lion in Egypt"]}, truncate="END", max_tokens=4)
        .embeddings.float_
    )
    raw = embedder.raw([[*ids[:3], eos]])
    assert_same(short, raw / np.linalg.norm(raw))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"texts": ["a"]}, "`input_type` is missing"),
        ({"input_type": "search_query"}, "one of `texts` and `inputs`"),
        ({"input_type": "search_query", "texts": ["a"], "inputs": []}, "one of `texts` and `inputs`"),
        ({"input_type": "search_query", "texts": []}, "`texts` cannot be empty"),
        ({"input_type": "search_query", "texts": ["a", ""]}, "text 1"),
        ({"input_type": "search_query", "texts": "a"}, "array of strings"),
        ({"input_type": "search_query", "texts": ["a", 1]}, "item 1 is a number"),
        ({"input_type": "image", "images": ["data:"]}, "images"),
        ({"input_type": "search_query", "inputs": [{"content": [{"type": "image_url"}]}]}, "type text"),
        ({"input_type": "search_query", "texts": ["a"], "embedding_types": ["int4"]}, "embedding_types"),
        ({"input_type": "search_query", "texts": ["a"], "output_dimension": 25}, "[8, 16, 24]"),
        ({"input_type": "search_query", "texts": ["a"], "max_tokens": 0}, "max_tokens"),
        ({"input_type": "search_query", "texts": ["a"], "truncate": True}, "truncate"),
    ],
)
def test_errors(server: Server, body: dict[str, Any], says: str) -> None:
    answer = server.post("/v2/embed", {"model": "tiny", **body})
    assert answer.status_code == 400 and set(answer.json()) == {"message"}
    assert says in answer.json()["message"]


def test_the_model_is_needed(server: Server) -> None:
    answer = server.post("/v2/embed", {"texts": ["a"], "input_type": "search_query"})
    assert answer.status_code == 400 and "`model` is missing" in answer.json()["message"]
