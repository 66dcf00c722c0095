"""The OpenAPI document: the committed one is the live one, and no request it allows makes the server fail."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serve.conftest import Server

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from f2llm.serve.app import openapi_document

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "openapi.json"
WRITE = "F2LLM_WRITE_OPENAPI"


def test_the_committed_document_is_the_live_one(server: Server) -> None:
    live = openapi_document()
    assert server.get("/openapi.json").json() == live
    if os.environ.get(WRITE):
        COMMITTED.write_text(json.dumps(live, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert committed == live, (
        f"routes have changed: run this test with {WRITE}=1, read the difference, commit it"
    )


def test_every_route_of_the_contract_is_there() -> None:
    paths = openapi_document()["paths"]
    posts = "/v1/embeddings /embeddings /v2/embed /embed / /similarity /rerank /tokenize /decode"
    gets = "/v1/models /info /health /metrics"
    assert {path for path, item in paths.items() if "post" in item} == set(posts.split())
    assert {path for path, item in paths.items() if "get" in item} >= set(gets.split())


@pytest.mark.slow  # a thousand requests
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_makes_the_server_fail(server: Server, mode: str) -> None:
    """What the document allows is answered; what it does not allow is refused."""
    schemathesis = pytest.importorskip("schemathesis", reason="`schemathesis` is not installed")
    hypothesis = pytest.importorskip("hypothesis")
    # A runtime that another test used may have left this thread without subnormal numbers, which hypothesis refuses.
    torch.set_flush_denormal(False)
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: Counter[int] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode == "negative" and operation.method != "post":
            continue  # without a body there is little to get wrong

        def ask(case: Any) -> None:
            answer = case.call(base_url=server.url)
            statuses[answer.status_code] += 1
            assert answer.status_code in (200, 400, 404, 422), answer.text

        cases = operation.as_strategy(schemathesis.GenerationMode(mode))
        settings = hypothesis.settings(max_examples=50, deadline=None, database=None, derandomize=True)
        settings(hypothesis.given(case=cases)(ask))()
    assert sum(statuses.values()) > 300
    assert (statuses[200] > 50) == (mode == "positive")
