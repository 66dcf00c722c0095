"""A model folder in the hands of sentence-transformers and transformers: the same ids, the same vectors."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from f2llm.embed.embedder import Embedder

TEXTS = [
    "lion",
    "Ujerumani",
    "",
    "e\u0301le\u0301phant",
    "सफ़ेद कुत्ता और काला कुत्ता",
    "德国 印度 中国",
    "two lines\nand\ta tab",
    "  spaces around \n",
    "مرحبا \u200f1984",
    "👩‍👩‍👧 family",
    "Egypt " * 200,  # longer than the model was trained on
    "lion",
]


@pytest.fixture(scope="module")
def peer(model_folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(model_folder), device="cpu")


@pytest.fixture(scope="module")
def embedder(model_folder: Path) -> Embedder:
    return Embedder(model_folder)


def worst_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float((ours * theirs).sum(axis=-1).min())


@pytest.mark.parametrize("prompt", ["query", "document"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_sentence_transformers_gives_the_same_vectors(
    peer: Any, embedder: Embedder, prompt: str, batch_size: int
) -> None:
    theirs = peer.encode(TEXTS, prompt_name=prompt, batch_size=batch_size)
    assert worst_cosine(embedder.encode(TEXTS, prompt=prompt, too_long="truncate"), theirs) > 0.99999


def test_the_order_and_company_of_texts_do_not_matter(peer: Any, embedder: Embedder) -> None:
    alone = np.stack([embedder.encode(text, too_long="truncate") for text in TEXTS])
    rng = random.Random(0)
    for _ in range(3):
        order = rng.sample(range(len(TEXTS)), len(TEXTS))
        theirs = peer.encode([TEXTS[i] for i in order], batch_size=4)
        assert worst_cosine(alone[order], theirs) > 0.99999


def test_prompts_make_a_difference(peer: Any, embedder: Embedder) -> None:
    """So that equality above says something: queries and documents lie well apart."""
    queries, documents = (peer.encode(TEXTS, prompt_name=name) for name in ("query", "document"))
    assert float((queries * documents).sum(axis=1).max()) < 0.999
    assert worst_cosine(peer.encode(TEXTS), documents) > 0.99999


@pytest.mark.parametrize("dim", [8, 11, 24])
def test_shorter_vectors_are_the_same(peer: Any, embedder: Embedder, dim: int) -> None:
    theirs = peer.encode(TEXTS, truncate_dim=dim, normalize_embeddings=True)
    ours = embedder.encode(TEXTS, dim=dim, too_long="truncate")
    assert ours.shape == (len(TEXTS), dim)
    assert worst_cosine(ours, theirs) > 0.99999


def test_sentence_transformers_knows_the_settings(peer: Any, embedder: Embedder) -> None:
    assert peer.max_seq_length == embedder.facts.max_length
    assert peer.prompts["query"] == embedder.prefix("query", None) != ""
    assert peer.similarity_fn_name == "cosine"
    assert sum(p.numel() for p in peer.parameters()) == embedder.parameters


def test_transformers_gives_the_same_ids_and_vectors(model_folder: Path, embedder: Embedder) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModel.from_pretrained(model_folder).eval()
    assert type(model).__name__ == "Qwen3Model"
    ids = [tokenizer(text, truncation=True)["input_ids"] for text in TEXTS]
    assert ids == embedder.fit(embedder.token_ids(TEXTS), "truncate")[0]
    assert tokenizer.eos_token_id == embedder.facts.eos_id != tokenizer.pad_token_id
    padded = tokenizer(TEXTS, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        last = model(**padded).last_hidden_state[:, -1]  # padding is on the left
    theirs = torch.nn.functional.normalize(last, dim=-1).numpy()
    assert worst_cosine(embedder.encode(TEXTS, too_long="truncate"), theirs) > 0.99999
