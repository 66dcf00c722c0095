"""Prefixes that sequences share: which are worth it, and that vectors stay what they are without."""

import random
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from f2llm.embed import compute
from f2llm.embed import prefixes as module
from f2llm.embed.embedder import Embedder
from f2llm.embed.prefixes import KEPT, LONGEST, SHORTEST, Prefixes, Tokens, in_common
from f2llm.model.batches import forward
from f2llm.model.decoder import Decoder, DecoderConfig, Prefix, initialise

CONFIG = DecoderConfig(50, 16, 24, 3, 4, 2, 8)
INSTRUCTION = "Find the animal of this name in English"


def decoder_of(embedder: Embedder) -> Decoder:
    assert isinstance(embedder._compute, compute.TorchDecoder)  # the tiny model fits no tile
    return embedder._compute._decoder


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    decoder = Decoder(CONFIG).eval()
    initialise(decoder, torch.Generator().manual_seed(1))
    for parameter in decoder.parameters():
        parameter.data.mul_(4)  # so that attention is far from even
    return decoder


def grouper() -> Prefixes:
    return Prefixes(lambda tokens: Prefix(len(tokens), ()))


def drawn(rng: random.Random, length: int, letters: int = 50) -> Tokens:
    return tuple(rng.randrange(letters) for _ in range(length))


# --- The same vectors


@torch.inference_mode()
@pytest.mark.parametrize("shared", [1, 7, 25])
def test_vectors_behind_a_prefix_are_those_of_the_whole(decoder: Decoder, shared: int) -> None:
    rng = random.Random(shared)
    prefix = drawn(rng, shared)
    rest = [drawn(rng, length) for length in (1, 5, 1, 12, 40, 12, 2)]
    whole = forward(decoder, [prefix + more for more in rest])
    behind = forward(decoder, rest, prefix=decoder.prefix(torch.tensor(prefix)))
    torch.testing.assert_close(behind, whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(forward(decoder, rest), whole, rtol=1e-2)


def test_queries_have_the_vectors_that_they_have_alone(model_folder: Path) -> None:
    rng = random.Random(1)
    names = ["lion", "Japani", "सफ़ेद कुत्ता", "德国", "éléphant", "x", ""]
    texts = [" ".join(rng.choices(names, k=rng.randrange(1, 4))) for _ in range(30)]
    together = Embedder(model_folder)
    found = together.encode(texts, prompt="query", too_long="truncate")
    again = together.encode(texts[3], prompt="query", too_long="truncate")
    fresh = np.stack([Embedder(model_folder).encode(t, prompt="query", too_long="truncate") for t in texts])
    assert float((found * fresh).sum(1).min()) > 0.99999
    assert float(again @ fresh[3]) > 0.99999


# --- Computed once


@pytest.fixture
def embedder(model_folder: Path) -> Embedder:
    return Embedder(model_folder)


@pytest.fixture
def lengths(embedder: Embedder) -> Iterator[list[int]]:
    """Of what goes through the decoder behind prefixes, or without one."""
    seen: list[int] = []
    hook = decoder_of(embedder).register_forward_pre_hook(lambda _, given: seen.extend(given[1]))
    yield seen
    hook.remove()


def test_the_prompt_is_not_computed_with_each_query(embedder: Embedder, lengths: list[int]) -> None:
    queries = [f"lion {number}" for number in range(20)]
    ids = embedder.token_ids(queries, instruction=INSTRUCTION)
    shared = min(in_common(ids[0], other) for other in ids[1:])
    assert shared >= SHORTEST
    embedder.encode(queries, instruction=INSTRUCTION)
    assert sum(lengths) <= sum(map(len, ids)) - 20 * shared


def test_a_prompt_is_known_when_a_query_comes_alone(embedder: Embedder, lengths: list[int]) -> None:
    for query in ("lion", "tiger"):
        embedder.encode(query, instruction=INSTRUCTION)
    ids = embedder.token_ids(["tiger", "lion"], instruction=INSTRUCTION)
    assert in_common(*ids) >= SHORTEST
    assert lengths[-1] <= len(ids[0]) - SHORTEST


def test_a_prefix_is_computed_once_and_the_least_used_is_forgotten() -> None:
    computed: list[Tokens] = []

    def compute(tokens: Tokens) -> Prefix:
        computed.append(tokens)
        return Prefix(len(tokens), ())

    prefixes = Prefixes(compute)
    first, *others = [tuple(range(start, start + 20)) for start in range(KEPT)]
    for prefix in (first, *others, first, others[0]):
        prefixes.state(prefix)
    assert computed == [first, *others]
    prefixes.state(drawn(random.Random(1), 30))
    prefixes.state(first)
    assert len(computed) == KEPT + 1
    prefixes.state(others[1])  # the one that was not used for longest
    assert computed[-1] == others[1]


# --- Which are worth it


def test_groups_divide_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_SAVED", 10)
    for seed in range(30):
        rng = random.Random(seed)
        prompts = [drawn(rng, rng.randrange(40)) for _ in range(4)]
        sequences = list({rng.choice(prompts) + drawn(rng, rng.randrange(1, 150), 3) for _ in range(40)})
        groups = grouper().groups(sequences)
        assert sorted(i for _, members in groups for i in members) == list(range(len(sequences)))
        for prefix, members in groups:
            for i in members:
                assert sequences[i][: len(prefix)] == prefix and len(sequences[i]) > len(prefix)
                assert not prefix or len(sequences[i]) < LONGEST


def test_as_many_tokens_are_saved_as_any_grouping_by_common_prefixes_saves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against all ways to divide six sequences into runs of neighbours."""
    monkeypatch.setattr(module, "MIN_SAVED", 0)
    monkeypatch.setattr(module, "SHORTEST", 2)
    for seed in range(100):
        rng = random.Random(seed)
        sequences = sorted({drawn(rng, rng.randrange(2, 9), 2) for _ in range(6)})

        def saved(run: list[Tokens]) -> int:
            least = min((in_common(run[0], other) for other in run[1:]), default=0)
            return least * (len(run) - 1) if least >= 2 else 0

        count = len(sequences)
        divisions = (cut for size in range(count) for cut in combinations(range(1, count), size))
        most = max(
            sum(saved(sequences[a:b]) for a, b in zip((0, *cut), (*cut, count), strict=True))
            for cut in divisions
        )
        found = [(len(p), len(members)) for p, members in grouper().groups(sequences) if p]
        assert sum(length * (members - 1) for length, members in found) == most


def test_few_tokens_are_not_worth_a_batch() -> None:
    rng = random.Random(1)
    prompt, others = drawn(rng, 20), [drawn(rng, 30) for _ in range(10)]
    few = [prompt + drawn(rng, 9) for _ in range(3)]
    many = few + [prompt + drawn(rng, 9) for _ in range(9)]
    assert [p for p, _ in grouper().groups(few + others)] == [()]
    assert [p for p, _ in grouper().groups(many + others)] == [(), prompt]
    assert [p for p, _ in grouper().groups(few)] == [prompt]  # all have it: no further batch
