"""From text to vectors: alone or in any company, at any size, with and without prompts, in bounded memory."""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from f2llm import Embedder as PublicEmbedder
from f2llm.embed import compute
from f2llm.embed import embedder as module
from f2llm.embed.embedder import Embedder, truncate
from f2llm.errors import F2Error, UsageError
from f2llm.model.batches import token_batches
from f2llm.model.decoder import Decoder
from f2llm.model.folder import Model, save_model

TEXTS = [
    "lion",
    "Ujerumani na Japani",
    "",
    "सफ़ेद कुत्ता",
    "德国",
    "שלום \u200fעולם 12",
    "مرحبا",
    "👩‍👩‍👧 family 🏴‍☠️",
    "\ud800 alone \udc00",
    "  \n\t ",
    "Égypte",
    "éléphant " * 2,
]


def decoder_of(embedder: Embedder) -> Decoder:
    assert isinstance(embedder._compute, compute.TorchDecoder)  # the tiny model fits no tile
    return embedder._compute._decoder


@pytest.fixture(scope="module")
def embedder(model_folder: Path) -> Embedder:
    return Embedder(model_folder)


@pytest.fixture
def tokens(embedder: Embedder) -> Iterator[list[int]]:
    """The lengths of all sequences that go through the decoder."""
    seen: list[int] = []
    hook = decoder_of(embedder).register_forward_pre_hook(lambda _, given: seen.extend(given[1]))
    yield seen
    hook.remove()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    product: np.ndarray = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return product


# --- The same text, the same vector


def test_company_and_order_do_not_matter(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = np.stack([embedder.encode(text) for text in TEXTS])
    assert float(np.abs(cosines(alone[0], alone[1:])).max()) < 0.999  # different texts do differ
    rng = random.Random(1)
    for budget in (1, 20, 8192):
        monkeypatch.setattr(compute, "TOKENS_PER_BATCH", budget)
        order = rng.sample(range(len(TEXTS)), len(TEXTS))
        together = embedder.encode([TEXTS[i] for i in order])
        assert float(cosines(together, alone[order]).min()) > 0.99999


def test_equivalent_strings_have_one_vector(embedder: Embedder) -> None:
    composed, decomposed = "Égypte et éléphant", "E\u0301gypte et e\u0301le\u0301phant"
    assert composed != decomposed
    assert np.array_equal(embedder.encode(composed), embedder.encode(decomposed))
    assert np.array_equal(embedder.encode("\ud83d\ude00"), embedder.encode("😀"))
    assert np.array_equal(embedder.encode("a\ud800b"), embedder.encode("a\ufffdb"))
    assert np.array_equal(
        embedder.encode("x", instruction="Le\u0301gende"), embedder.encode("x", instruction="Légende")
    )


def test_repeated_texts_are_computed_once(embedder: Embedder, tokens: list[int]) -> None:
    vectors = embedder.encode(["lion", "tembo", "lion", "lio\u006e"] * 5)
    once = embedder.tokens(["lion"]) + embedder.tokens(["tembo"])
    assert sum(tokens) == once
    assert np.array_equal(vectors[0], vectors[18])
    assert float(cosines(vectors[0], vectors[1])) < 0.999


def test_tokens_counts_what_is_computed(embedder: Embedder, tokens: list[int]) -> None:
    embedder.encode(TEXTS[:5])
    assert embedder.tokens(TEXTS[:5]) == sum(tokens)
    assert embedder.tokens(TEXTS, prompt="query") > embedder.tokens(TEXTS)


# --- Shape and length of vectors


def test_output_is_float32_of_the_models_width(embedder: Embedder) -> None:
    assert (embedder.dim, embedder.sizes) == (24, [8, 16, 24])
    for texts, shape in ((TEXTS, (12, 24)), (tuple(TEXTS[:2]), (2, 24)), ("lion", (24,)), ([], (0, 24))):
        vectors = embedder.encode(texts)
        assert vectors.shape == shape and vectors.dtype == np.float32


@pytest.mark.parametrize("dim", range(1, 25))
def test_vectors_have_unit_length_at_every_size(embedder: Embedder, dim: int) -> None:
    whole = embedder.encode(TEXTS, normalize=False)
    vectors = embedder.encode(TEXTS, dim=dim)
    assert vectors.shape == (len(TEXTS), dim)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-6)
    assert float(cosines(vectors, whole[:, :dim]).min()) > 0.99999
    raw = embedder.encode(TEXTS, dim=dim, normalize=False)
    assert np.array_equal(raw, whole[:, :dim])


@pytest.mark.parametrize("dim", [0, -1, 25])
def test_sizes_the_model_does_not_have_are_refused(embedder: Embedder, dim: int) -> None:
    with pytest.raises(UsageError, match=rf"dim is {dim}; this model gives 1 to 24 .*\[8, 16, 24\]"):
        embedder.encode("lion", dim=dim)


def test_truncate_leaves_a_zero_vector_and_its_input_alone() -> None:
    vectors = np.array([[3, 4, 12], [0, 0, 5]], dtype=np.float32)
    np.testing.assert_allclose(truncate(vectors, 2), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(truncate(vectors, 3), [[3 / 13, 4 / 13, 12 / 13], [0.0, 0.0, 1.0]], rtol=1e-6)
    assert np.array_equal(vectors, [[3, 4, 12], [0, 0, 5]])


# --- Short and long texts


def test_an_empty_text_is_eos_alone(embedder: Embedder) -> None:
    decoder = decoder_of(embedder)
    with torch.no_grad():
        expected = decoder(torch.tensor([embedder.facts.eos_id]), [1])[0].numpy()
    np.testing.assert_allclose(embedder.encode("", normalize=False), expected, rtol=1e-6)


def test_a_text_that_is_too_long_is_refused_or_cut_before_eos(embedder: Embedder) -> None:
    text = " ".join(["simba"] * 200)
    with pytest.raises(UsageError, match=r"text 1 has \d+ tokens, the limit is 64.*truncation"):
        embedder.encode(["short", text])
    (full,), cut = embedder.fit(embedder.token_ids([text[:-1]]), "truncate")
    assert cut == 1
    assert len(full) == 64 and full[-1] == embedder.facts.eos_id
    with torch.no_grad():
        expected = decoder_of(embedder)(torch.tensor(full), [64]).numpy()
    vectors = embedder.encode(["short", text], too_long="truncate", normalize=False)
    np.testing.assert_allclose(vectors[1:], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(vectors[0], embedder.encode("short", normalize=False), rtol=1e-4, atol=1e-5)


def test_wrong_arguments_are_named(embedder: Embedder) -> None:
    with pytest.raises(UsageError, match="'eror'"):
        embedder.encode("lion", too_long="eror")  # type: ignore[arg-type]
    for texts in ([3], ["lion", None], b"lion"):
        with pytest.raises(UsageError, match="text must be a string"):
            embedder.encode(texts)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="prompt is 'passage'"):
        embedder.encode("lion", prompt="passage")
    with pytest.raises(UsageError, match="only queries carry one"):
        embedder.encode("lion", prompt="document", instruction="Find it")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(F2Error, match=r"config.json is missing; check the path"):
        Embedder(tmp_path)


# --- Prompts


def test_prompts(embedder: Embedder) -> None:
    default = f"Instruct: {embedder.facts.instruction}\nQuery: "
    bare = embedder.encode(TEXTS)
    assert np.array_equal(embedder.encode(TEXTS, prompt="document"), bare)

    def written_out(prefix: str) -> np.ndarray:
        return embedder.encode([prefix + text for text in TEXTS], too_long="truncate")

    query = embedder.encode(TEXTS, prompt="query", too_long="truncate")
    assert np.array_equal(query, written_out(default))
    assert float(cosines(query, bare).max()) < 0.999
    own = embedder.encode(TEXTS, instruction="Find it", too_long="truncate")
    assert np.array_equal(own, written_out("Instruct: Find it\nQuery: "))
    both = embedder.encode(TEXTS, prompt="query", instruction="Find it", too_long="truncate")
    assert np.array_equal(own, both)
    assert np.array_equal(embedder.encode(TEXTS, prompt="query", instruction=""), bare)


def test_a_model_trained_without_instructions_has_bare_queries(
    make_model: Callable[..., Model], tmp_path: Path
) -> None:
    model = make_model()
    facts = {**vars(model.facts), "instruction": ""}
    save_model(tmp_path, Model(model.decoder, model.tokenizer, type(model.facts)(**facts)))
    embedder = Embedder(tmp_path)
    assert np.array_equal(embedder.encode("lion", prompt="query"), embedder.encode("lion"))
    assert not np.array_equal(embedder.encode("lion", instruction="Find it"), embedder.encode("lion"))


# --- Endless input


@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_stream_equals_encode(embedder: Embedder, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "STREAM_CHUNK", chunk)
    options: dict[str, Any] = {"prompt": "query", "dim": 8, "normalize": False, "too_long": "truncate"}
    streamed = list(embedder.encode_stream(iter(TEXTS), **options))
    np.testing.assert_allclose(streamed, embedder.encode(TEXTS, **options), rtol=1e-4, atol=1e-5)
    assert all(vector.shape == (8,) for vector in streamed)
    assert list(embedder.encode_stream([])) == []


def test_stream_takes_no_more_than_it_needs(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an endless source, one chunk at a time: the memory of a chunk is all it ever holds."""
    monkeypatch.setattr(module, "STREAM_CHUNK", 10)
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield f"simba {taken}"

    stream = embedder.encode_stream(endless())
    assert taken == 0
    for expected in range(1, 36):
        vector = next(stream)
        assert taken == -(-expected // 10) * 10
        if expected in (1, 10, 11, 35):
            assert float(cosines(vector, embedder.encode(f"simba {expected}"))) > 0.99999


def test_stream_names_the_text_that_is_wrong(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAM_CHUNK", 4)
    texts = ["lion"] * 6 + ["simba " * 100]
    stream = embedder.encode_stream(texts)
    with pytest.raises(UsageError, match="text 6 has"):
        list(stream)


# --- Batches


@pytest.mark.parametrize("budget", [1, 7, 50, 10_000])
def test_token_batches_share_out_all_texts_within_the_budget(budget: int) -> None:
    lengths: Sequence[int] = np.random.default_rng(0).integers(1, 30, size=200).tolist()
    batches = list(token_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches)
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(lengths)
    for batch, following in pairwise(batches):  # none is smaller than it must be
        assert sum(lengths[i] for i in batch) + lengths[following[0]] > budget
    assert list(token_batches([], budget)) == []


def test_the_package_offers_this_class() -> None:
    assert PublicEmbedder is Embedder


def test_texts_that_are_cut_are_counted(embedder: Embedder) -> None:
    long = " ".join(["simba"] * 200)
    with pytest.warns(UserWarning, match="^2 of the texts cut to 64 tokens$"):
        embedder.encode(["short", long, long + " tembo"], too_long="truncate")
    with pytest.warns(UserWarning, match="^1 of the texts cut to 64 tokens$"):
        list(embedder.encode_stream(["short", long], too_long="truncate"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedder.encode(["short"], too_long="truncate")
