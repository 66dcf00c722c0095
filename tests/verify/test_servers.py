"""Servers wrong in one respect each: `verify` names it, and nothing else; a right one passes whole."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.verify.broken_server import KEY, MODEL, serving_model

from f2llm.embed.embedder import Embedder
from f2llm.errors import UsageError
from f2llm.model.folder import load_model, save_model
from f2llm.verify import protocol
from f2llm.verify.findings import Report
from f2llm.verify.folder import verify_folder
from f2llm.verify.remote import verify_server
from f2llm.verify.server import connected

# What a server does wrong, which checks it fails then, and a word of why.
FAULTS: dict[str, tuple[set[str], str]] = {
    "padding": ({"batch-invariance"}, "another vector alone than with longer ones"),
    "equal lengths": ({"batch-invariance"}, "alone than with one of its length"),
    "norm before truncation": ({"unit-norm"}, "8 dimensions has length 0."),
    "last numbers": ({"prefix"}, "size 8 is not the first 8 numbers"),
    "dimensions ignored": ({"dimensions", "prefix"}, "8 dimensions were asked for and 24 came"),
    "any size": ({"dimensions"}, "0 dimensions are asked for"),
    "sizes refused": ({"dimensions"}, "24 dimensions are refused"),
    "prompt ignored": ({"prompts"}, "no prompt is applied"),
    "prompt without its space": ({"prompts"}, "not that of the text behind 'Instruct"),
    "float64": ({"base64"}, "has 192 bytes, 24 float32 have 96"),
    "big-endian": ({"base64"}, "big-endian"),
    "base64 ignored": ({"base64"}, "lists of numbers"),
    "other base64": ({"base64"}, "other vectors than float"),
    "rounded": ({"base64"}, "in its last digits"),
    "reversed": ({"order"}, "the indices [2, 1, 0]"),
    "shuffled": ({"order", "batch-invariance"}, "another vector alone"),
    "cut": ({"too-long"}, "another end leaves its vector"),
    "cut in front": ({"too-long"}, "another beginning leaves its vector"),
    "own ids": ({"token-arrays"}, "which LangChain sends by default"),
    "own ids in range": ({"token-arrays"}, "another vector than 'lion'"),
    "another name": ({"model-name"}, "'tiny' was asked for, and 'another' answered"),
    "no usage": ({"answer-shape"}, "no usage, usage.prompt_tokens"),
    "errors of its own": ({"error-shape"}, "another shape"),
    "empty list": ({"empty-list"}, "status 200"),
    "failure for refusal": (
        {"dimensions", "too-long", "token-arrays", "error-shape", "empty-list"},
        "status 500",
    ),
    "all alike": ({"vectors", "prompts", "order"}, "alike (mean cosine 1.0000)"),
}


@pytest.fixture(scope="module")
def embedder(model_folder: Path) -> Embedder:
    return Embedder(model_folder)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that fails is asked again at once."""
    monkeypatch.setattr("f2llm.verify.server.PAUSES", (0.0, 0.0))


def verified(embedder: Embedder, fault: str = "", tells: bool = True) -> Report:
    with serving_model(embedder, fault=fault, tells=tells) as server:
        return verify_server(server.address)


# --- Servers that are right


@pytest.mark.parametrize("fault", ["", "busy", "cl100k", "reads all", "prompt refused"])
@pytest.mark.parametrize("tells", [True, False])
def test_a_server_that_is_right_passes_whole(embedder: Embedder, fault: str, tells: bool) -> None:
    """Whether or not it names its prompt. To decode ids, read long texts whole or refuse prompts is right too."""
    report = verified(embedder, fault, tells)
    skipped = {name for name, finding in report.findings.items() if finding.status == "skip"}
    assert not report.failed
    assert skipped == {"golden"} | ({"prompts"} if fault == "prompt refused" else set())


def test_what_a_server_says_of_itself_is_what_is_compared(embedder: Embedder) -> None:
    with serving_model(embedder) as server, connected(server.address, None, None, None) as target:
        assert (target.model, target.width, target.identity) == (MODEL, 24, embedder.identity)
        assert target.query_prompt == embedder.prefix("query", None)
        np.testing.assert_allclose(
            target.embed(["lion"], query=True, dim=11),
            embedder.encode(["lion"], prompt="query", dim=11),
            atol=1e-6,
        )


def test_a_prompt_can_be_stated(embedder: Embedder) -> None:
    prompt = embedder.prefix("query", None)
    for fault, stated, expected in (
        ("", prompt, []),
        ("", prompt.rstrip(), ["prompts"]),
        ("prompt ignored", "", []),
        ("prompt ignored", prompt, ["prompts"]),
    ):
        with serving_model(embedder, fault=fault, tells=False) as server:
            assert verify_server(server.address, query_prompt=stated).failed == expected


# --- Servers that are not


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(embedder: Embedder, fault: str) -> None:
    expected, said = FAULTS[fault]
    report = verified(embedder, fault)
    assert set(report.failed) == expected
    assert any(said in report.findings[name].why for name in expected)
    assert all(report.findings[name].fix.endswith(".") for name in expected)


def test_vectors_that_are_not_finite_are_named(embedder: Embedder) -> None:
    report = verified(embedder, "not finite")
    assert {"vectors", "batch-invariance", "unit-norm", "prefix"} <= set(report.failed)


@pytest.mark.parametrize(
    "odd",
    [
        None,
        3,
        "text",
        [],
        {"data": None},
        {"data": ["x"]},
        {"data": [{}]},
        {"data": [{"index": None, "embedding": [1]}]},
        {"data": [{"index": 0, "embedding": "AAAA"}], "model": 3, "usage": 3},
        {"data": [{"index": 0, "embedding": []}]},
        {"data": [{"index": 0, "embedding": [None]}], "usage": []},
        {"data": [{"index": 0, "embedding": [1, 2]}, {"index": 1, "embedding": [1]}]},
    ],
)
def test_whatever_a_server_answers_there_is_a_report(embedder: Embedder, odd: object) -> None:
    with serving_model(embedder, fault="odd", odd=odd) as server:
        report = verify_server(server.address)
    assert {"vectors", "base64", "order", "answer-shape", "error-shape"} <= set(report.failed)
    assert report.findings["answers"].status == "pass"


def test_a_server_that_is_not_there_fails_once(embedder: Embedder) -> None:
    with serving_model(embedder) as server:
        address = server.address
    report = verify_server(address)
    assert report.failed == ["answers"] and "cannot be reached" in report.findings["answers"].why
    assert all(finding.status == "skip" for name, finding in report.findings.items() if name != "answers")


def test_a_wrong_address_fails_once(embedder: Embedder) -> None:
    with serving_model(embedder) as server:
        assert verify_server(server.address + "/embeddings/").failed == []
        report = verify_server(server.address.removesuffix("/v1"))
    assert report.failed == ["answers"] and "up to /v1" in report.findings["answers"].fix


def test_a_key_is_sent_and_never_shown(embedder: Embedder) -> None:
    with serving_model(embedder, key=KEY) as server:
        assert not verify_server(server.address, key=KEY).failed
        report = verify_server(server.address, key="sk-wrong-key")
    assert report.failed == ["answers"] and "status 401" in report.findings["answers"].why
    assert "sk-wrong-key" not in json.dumps(report.as_dict())


def test_one_of_several_models_is_chosen(embedder: Embedder) -> None:
    with serving_model(embedder, models=("tiny", "large")) as server:
        with pytest.raises(UsageError, match="serves tiny, large; choose one with --model"):
            verify_server(server.address)
        assert not verify_server(server.address, model="large").failed
    with serving_model(embedder, models=()) as server:
        report = verify_server(server.address)
        assert not report.failed and "no name was asked for" in report.findings["model-name"].why


def test_a_server_is_not_worn_out(embedder: Embedder) -> None:
    with serving_model(embedder) as server:
        verify_server(server.address)
        assert server.requests < 80 and server.texts < 200


# --- Details of checks


def test_long_texts_differ_at_one_end_alone() -> None:
    start, middle, end = (protocol._filling(word, size) for word, size in protocol._LONG_PARTS)
    assert len(start + middle + end) == protocol.LONG == 200_000
    assert len({start, middle, end, protocol._filling("other", protocol.DIFFERENT)}) == 4


def test_the_ids_are_cl100ks() -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    try:
        encoding = tiktoken.get_encoding("cl100k_base")
    except Exception as error:  # its file comes over the network
        pytest.skip(f"cl100k_base cannot be had: {error}")
    text, ids = protocol.PANGRAM_CL100K
    assert encoding.encode(text) == ids
    text, ids = protocol.BYTES_CL100K
    assert encoding.decode(ids) == text


# --- Golden vectors


def test_golden_vectors_of_the_folder_hold_at_its_server(model_folder: Path, tmp_path: Path) -> None:
    model = load_model(model_folder)
    folders = tmp_path / "right", tmp_path / "wrong"
    for folder, instruction in zip(folders, ("Find it", "Find something else"), strict=True):
        save_model(folder, replace(model, facts=replace(model.facts, instruction=instruction)))
    assert not verify_folder(str(folders[0]), make_golden=True).failed
    golden = folders[0] / "golden.json"
    for folder, tells, expected in (
        (folders[0], True, []),
        (folders[0], False, []),
        (folders[1], True, ["golden"]),
    ):
        with serving_model(Embedder(folder), tells=tells) as server:
            report = verify_server(server.address, golden=golden)
        assert report.failed == expected
    assert "in front of queries" in report.findings["golden"].why


def test_golden_vectors_tell_a_server_that_computes_otherwise(
    embedder: Embedder, model_folder: Path, tmp_path: Path
) -> None:
    """A server that drops EOS: all other checks pass, since it does so with every text."""
    folder = tmp_path / "model"
    save_model(folder, load_model(model_folder))
    verify_folder(str(folder), make_golden=True)

    class WithoutEos(Embedder):
        def raw(self, ids: object, alone: bool = True) -> np.ndarray:
            assert isinstance(ids, list)
            return super().raw([sequence[:-1] or sequence for sequence in ids], alone)

    with serving_model(WithoutEos(model_folder), tells=False) as server:
        report = verify_server(server.address, golden=folder / "golden.json")
    assert report.failed == ["golden"] and "more than 0.001" in report.findings["golden"].why


def test_a_server_is_shown_without_its_key(embedder: Embedder) -> None:
    with serving_model(embedder) as server, connected(server.address, None, KEY, None) as target:
        assert server.address in repr(target) and KEY not in repr(target)
