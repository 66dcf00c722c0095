"""Base models from elsewhere give the vectors of transformers and sentence-transformers, with the EOS they are said to
have.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, processors
from torch import nn

from f2llm.embed.embedder import Embedder
from f2llm.errors import F2Error
from f2llm.model.base import load_base
from f2llm.model.folder import Model, save_model
from f2llm.model.prompts import TEMPLATE
from f2llm.model.sanity import check_base
from f2llm.model.tokenizer import append_eos, encode

MakeModel = Callable[..., Model]
MakeFolder = Callable[..., Path]
MakePeer = Callable[..., Any]

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IDS = {END: 400, START: 401, STOP: 402}
TEXTS = [
    "lion",
    "Ujerumani",
    "",
    "éléphant",
    "सफ़ेद कुत्ता और",
    "德国 印度 中国",
    "two lines\nand\ta tab",
    "  spaces around ",
    "Egypt " * 40,  # longer than 64 tokens
]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sentences that reading a base says."""
    sentences: list[str] = []
    monkeypatch.setattr("f2llm.model.base.say", sentences.append)
    return sentences


def a_copy(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.to_str())


def appending(tokenizer: Tokenizer, token: str) -> Tokenizer:
    tokenizer = a_copy(tokenizer)
    append_eos(tokenizer, token)
    return tokenizer


def vectors(model: Model, max_length: int = 500) -> np.ndarray:
    eos_id = model.facts.eos_id
    ids = encode(model.tokenizer, TEXTS, eos_id=eos_id, max_length=max_length, too_long="truncate")
    with torch.no_grad():
        return model.decoder(torch.tensor(list(chain.from_iterable(ids))), list(map(len, ids))).numpy()


def their_vectors(peer: nn.Module, tokenizer: Tokenizer, eos: str) -> np.ndarray:
    """Transformers' last hidden state at an EOS that is put behind the bare tokens by hand."""
    body = peer.model if hasattr(peer, "lm_head") else peer
    assert isinstance(body, nn.Module)
    ids = [[*tokenizer.encode(text, add_special_tokens=False).ids, IDS[eos]] for text in TEXTS]
    with torch.no_grad():
        return np.stack([body(input_ids=torch.tensor([i])).last_hidden_state[0, -1].numpy() for i in ids])


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest distance of two vectors of the same text, relative to the length of one."""
    assert ours.shape == theirs.shape
    return float((np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max())


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


# --- The same vectors


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize(
    ("kind", "tied"), [("Qwen3Model", True), ("Qwen3ForCausalLM", True), ("Qwen3ForCausalLM", False)]
)
def test_vectors_equal_those_of_transformers(
    make_folder: MakeFolder,
    random_peer: MakePeer,
    chat_tokenizer: Tokenizer,
    kind: str,
    tied: bool,
    shard: str,
) -> None:
    peer = random_peer(kind, tie_word_embeddings=tied)
    folder = make_folder(peer, shard=shard)
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    assert (len(list(folder.glob("*.safetensors"))) > 2) == (shard == "20KB")
    assert ("model.norm.weight" in names) == (kind == "Qwen3ForCausalLM")
    assert ("lm_head.weight" in names) == (not tied)
    model = load_base(folder)
    assert apart(vectors(model), their_vectors(peer, chat_tokenizer, STOP)) < 1e-5
    assert model.facts.eos_id == IDS[STOP]
    assert check_base(model) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(
    make_folder: MakeFolder, random_peer: MakePeer, chat_tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    from transformers import AutoModel

    folder = make_folder(random_peer().to(dtype))
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    model = load_base(folder)
    assert {parameter.dtype for parameter in model.decoder.parameters()} == {torch.float32}
    peer = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert apart(vectors(model), their_vectors(peer, chat_tokenizer, STOP)) < 1e-5


def test_a_folder_of_ours_is_read_as_it_is(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    facts = save_model(tmp_path, replace(model, facts=replace(model.facts, parent="p", recipe="r")))
    loaded = load_base(str(tmp_path))
    assert loaded.facts == facts
    assert np.array_equal(vectors(loaded), vectors(model))


def legacy_layout(query: str) -> dict[str, dict[str, Any]]:
    """The files of older sentence-transformers, save for modules.json, which is a list."""
    flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    return {
        "1_Pooling/config.json": {
            "word_embedding_dimension": 24,
            **{f"pooling_mode_{flag}": flag == "lasttoken" for flag in flags},
        },
        "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": query, "document": ""}},
    }


def write_modules(folder: Path) -> None:
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Normalize").mkdir()


def saved_layout(folder: Path, query: str, out: Path) -> None:
    """The files that the installed sentence-transformers writes."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.normalize import Normalize
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    modules = [Transformer(str(folder)), Pooling(24, "lasttoken"), Normalize()]
    peer = SentenceTransformer(modules=modules, prompts={"query": query, "document": ""}, device="cpu")
    peer.max_seq_length = 64
    peer.save_pretrained(str(out))
    assert json.loads((out / "1_Pooling" / "config.json").read_text())["pooling_mode"] == "lasttoken"


@pytest.mark.parametrize("space", ["", " "])
@pytest.mark.parametrize("layout", ["legacy", "as saved"])
def test_vectors_equal_those_of_sentence_transformers(
    make_folder: MakeFolder,
    random_peer: MakePeer,
    chat_tokenizer: Tokenizer,
    tmp_path: Path,
    layout: str,
    space: str,
) -> None:
    """A folder like Qwen3-Embedding's, whose tokenizer appends PAD whatever its eos_token is."""
    from sentence_transformers import SentenceTransformer

    query = f"Instruct: Find this name\nQuery:{space}"
    tokenizer = appending(chat_tokenizer, END)
    if layout == "legacy":
        folder = make_folder(random_peer("Qwen3Model"), tokenizer, changes=legacy_layout(query))
        write_modules(folder)
    else:
        folder = tmp_path / "saved"
        saved_layout(make_folder(random_peer("Qwen3Model"), tokenizer), query, folder)
    peer = SentenceTransformer(str(folder), device="cpu")
    documents, queries = peer.encode(TEXTS, batch_size=4), peer.encode(TEXTS, prompt_name="query")
    assert apart(queries, documents) > 0.01
    model = load_base(folder)
    assert model.facts.eos_id == IDS[END]
    assert model.facts.max_length == peer.max_seq_length == 64
    assert model.facts.instruction == "Find this name"
    assert check_base(model) == []
    assert apart(unit(vectors(model, max_length=64)), documents) < 1e-5
    # What we save of it gives the same vectors, through our library and through theirs.
    save_model(tmp_path / "ours", model)
    embedder, again = Embedder(tmp_path / "ours"), SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert again.tokenizer.pad_token_id != again.tokenizer.eos_token_id == IDS[END]
    assert apart(embedder.encode(TEXTS, prompt="query", too_long="truncate"), queries) < 1e-5
    assert apart(again.encode(TEXTS, prompt_name="query"), queries) < 1e-5
    assert apart(again.encode(TEXTS), documents) < 1e-5


def test_vectors_equal_those_of_sentence_transformers_told_to_add_eos(
    make_folder: MakeFolder, random_peer: MakePeer, told: list[str]
) -> None:
    """A folder like F2LLM-v2's: the tokenizer appends nothing until it is told `add_eos_token`."""
    from sentence_transformers import SentenceTransformer

    changes = {**legacy_layout("Instruct: Find\nQuery: "), "tokenizer_config.json": {"add_eos_token": True}}
    folder = make_folder(random_peer("Qwen3Model"), changes=changes)
    write_modules(folder)
    peer = SentenceTransformer(str(folder), device="cpu", processor_kwargs={"add_eos_token": True})
    model = load_base(folder)
    assert apart(unit(vectors(model, max_length=64)), peer.encode(TEXTS)) < 1e-5
    assert model.facts.template == TEMPLATE
    assert not told


def test_the_published_tokenizer_gets_the_eos_of_f2llm_v2(
    make_folder: MakeFolder, random_peer: MakePeer, shared: Path, tmp_path: Path
) -> None:
    published = Tokenizer.from_file(str(shared / "tokenizers" / "qwen3" / "tokenizer.json"))
    peer = random_peer("Qwen3Model", vocab_size=151_936, hidden_size=8, num_hidden_layers=1)
    model = load_base(make_folder(peer, published))
    assert model.tokenizer.encode("test").ids == [1944, 151_645]  # both ids as published
    save_model(tmp_path / "ours", model)
    saved = json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())
    assert (saved["eos_token"], saved["pad_token"]) == (STOP, END)


# --- EOS

NO_EOS_TOKEN = {"tokenizer_config.json": {"eos_token": None}}


@pytest.mark.parametrize(
    ("appends", "changes", "expected", "is_told"),
    [
        (END, {"tokenizer_config.json": {"eos_token": STOP, "add_eos_token": True}}, END, False),
        (STOP, {**NO_EOS_TOKEN, "config.json": {"eos_token_id": IDS[END]}}, STOP, False),
        (None, {"tokenizer_config.json": {"eos_token": START, "add_eos_token": True}}, START, False),
        (None, {"sentence_bert_config.json": {"tokenizer_args": {"add_eos_token": True}}}, STOP, False),
        (None, {"sentence_bert_config.json": {"processor_kwargs": {"add_eos_token": True}}}, STOP, False),
        (None, {"tokenizer_config.json": {"eos_token": {"content": START, "lstrip": False}}}, START, True),
        (None, {"config.json": {"eos_token_id": IDS[END]}}, STOP, True),
        (None, {**NO_EOS_TOKEN, "config.json": {"eos_token_id": IDS[END]}}, END, True),
        (
            None,
            {
                **NO_EOS_TOKEN,
                "config.json": {"eos_token_id": [IDS[START], IDS[END]]},
                "generation_config.json": {"eos_token_id": IDS[STOP]},
            },
            START,
            True,
        ),
        (None, {**NO_EOS_TOKEN, "generation_config.json": {"eos_token_id": [IDS[STOP], 400]}}, STOP, True),
        (
            None,
            {
                "tokenizer_config.json": {"eos_token": None, "add_eos_token": True},
                "config.json": {"eos_token_id": IDS[END]},
            },
            END,
            True,
        ),
    ],
)
def test_eos_is_found_in_the_order_of_evidence(
    make_folder: MakeFolder,
    chat_tokenizer: Tokenizer,
    told: list[str],
    appends: str | None,
    changes: dict[str, dict[str, Any]],
    expected: str,
    is_told: bool,
) -> None:
    tokenizer = appending(chat_tokenizer, appends) if appends else chat_tokenizer
    model = load_base(make_folder(tokenizer=tokenizer, changes=changes))
    assert model.facts.eos_id == IDS[expected]
    for text in TEXTS:
        bare = chat_tokenizer.encode(text, add_special_tokens=False).ids
        assert model.tokenizer.encode(text).ids == [*bare, IDS[expected]]
    assert len(told) == is_told
    assert all(expected in sentence for sentence in told)


def test_a_folder_that_names_no_eos_is_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(F2Error, match="does not tell which token ends a text"):
        load_base(make_folder(changes=NO_EOS_TOKEN))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_config.json": {"eos_token": "<|nowhere|>"}},
        {**NO_EOS_TOKEN, "config.json": {"eos_token_id": 409}},  # a row of the table without a token
    ],
)
def test_an_eos_that_the_tokenizer_lacks_is_refused(make_folder: MakeFolder, changes: dict[str, Any]) -> None:
    with pytest.raises(
        F2Error, match=r"(tokenizer_config.json says that '<.nowhere|config.json says that 409)"
    ):
        load_base(make_folder(changes=changes))


def test_what_a_tokenizer_did_to_finished_texts_is_kept(
    make_folder: MakeFolder, chat_tokenizer: Tokenizer
) -> None:
    """Qwen3's trims the white space off the places of tokens; others put a token in front."""
    text = "lion  tembo chien"
    before = chat_tokenizer.encode(text)
    untrimmed = a_copy(chat_tokenizer)
    untrimmed.post_processor = processors.ByteLevel(trim_offsets=False)
    assert untrimmed.encode(text).offsets != before.offsets
    assert load_base(make_folder()).tokenizer.encode(text).offsets[:-1] == before.offsets
    beginning = a_copy(chat_tokenizer)
    beginning.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, IDS[START])]
    )
    tokenizer = load_base(make_folder(tokenizer=beginning)).tokenizer
    assert tokenizer.encode(text).ids == [IDS[START], *before.ids, IDS[STOP]]
    assert tokenizer.encode("").ids == [IDS[START], IDS[STOP]]


# --- The other facts


@pytest.mark.parametrize(
    ("of_tokenizer", "of_sentences", "expected"),
    [(131_072, None, 640), (10**30, None, 640), (300, None, 300), (300, 200, 200), (300, 10_000, 300)],
)
def test_the_smallest_limit_is_the_longest_text(
    make_folder: MakeFolder, of_tokenizer: int, of_sentences: int | None, expected: int
) -> None:
    changes = {
        "tokenizer_config.json": {"model_max_length": of_tokenizer},
        "sentence_bert_config.json": {"max_seq_length": of_sentences},
    }
    assert load_base(make_folder(changes=changes)).facts.max_length == expected


def test_matryoshka_sizes_are_those_that_the_config_states(make_folder: MakeFolder) -> None:
    assert load_base(make_folder()).facts.matryoshka_sizes == [24]
    changes = {"config.json": {"matryoshka_dimensions": [16, 8, 1024]}}
    assert load_base(make_folder(changes=changes)).facts.matryoshka_sizes == [8, 16, 24]


@pytest.mark.parametrize("query", ["", "query: "])
def test_a_query_prompt_of_another_form_is_told_and_left_out(
    make_folder: MakeFolder, told: list[str], query: str
) -> None:
    changes = {**legacy_layout(query), "tokenizer_config.json": {"add_eos_token": True}}
    facts = load_base(make_folder(changes=changes)).facts
    assert (facts.instruction, facts.template) == ("", TEMPLATE)
    assert len(told) == bool(query)
    assert all(repr(query) in sentence for sentence in told)


def test_identity_is_of_all_that_a_vector_depends_on(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder(shard="20KB")
    first = load_base(folder).facts.identity
    assert len(first) == 64
    assert load_base(Path(shutil.copytree(folder, tmp_path / "copy"))).facts.identity == first
    weights = sorted(folder.glob("*.safetensors"))[-1]
    content = weights.read_bytes()
    weights.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    other_weights = load_base(folder).facts.identity
    variants = [
        {"tokenizer_config.json": {"eos_token": END}},
        {"config.json": {"rms_norm_eps": 1e-3}},
        legacy_layout("Instruct: a\nQuery:"),
    ]
    others = [load_base(make_folder(shard="20KB", changes=v)).facts.identity for v in variants]
    assert len({first, other_weights, *others}) == 5
