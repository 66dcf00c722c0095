"""Vocabulary trimming: what a text keeps when all its tokens are kept, and what becomes of the others."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from f2llm.compress.vocabulary import coverage, tokens_to_keep, trim, trim_tokenizer, usage
from f2llm.embed.embedder import Embedder
from f2llm.errors import UsageError
from f2llm.model.folder import Model, load_model, save_model
from f2llm.model.tokenizer import append_eos
from f2llm.tokenizer_file import load_tokenizer

MakeModel = Callable[..., Model]
BYTES = 256


def tokens_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text).tokens


def naive_merges(tokenizer: Tokenizer) -> dict[str, list[tuple[str, str]]]:
    merges: dict[str, list[tuple[str, str]]] = {}
    for left, right in json.loads(tokenizer.to_str())["model"]["merges"]:
        merges.setdefault(left + right, []).append((left, right))
    return merges


@pytest.mark.parametrize("keep", [258, 259, 300, 341, 400, 511, 512, 9999])
def test_a_text_whose_tokens_are_all_kept_keeps_them_and_any_other_is_still_read(
    tokenizer: Tokenizer, names: list[str], keep: int
) -> None:
    seen = names[::2]
    kept_K = tokens_to_keep(tokenizer, usage(tokenizer, seen), keep)
    assert len(kept_K) <= min(keep, tokenizer.get_vocab_size())
    assert len(kept_K) >= min(keep, tokenizer.get_vocab_size()) - 8  # what the next token brings along
    number_of = {old: new for new, old in enumerate(kept_K.tolist())}
    trimmed = trim_tokenizer(tokenizer, number_of)
    assert trimmed.get_vocab_size() == len(kept_K)
    merges = naive_merges(tokenizer)
    vocab = trimmed.get_vocab()
    assert all({*pair} <= vocab.keys() for token in vocab for pair in merges.get(token, []))
    for text in names:
        old = tokenizer.encode(text).ids
        new = trimmed.encode(text).ids
        if all(token in number_of for token in old):
            assert new == [number_of[token] for token in old]
        else:
            assert len(new) > len(old)
        assert trimmed.decode(new) == tokenizer.decode(old)
        assert new[-1] == number_of[old[-1]]  # EOS


def test_without_a_number_all_used_tokens_are_kept_and_no_others(
    tokenizer: Tokenizer, names: list[str]
) -> None:
    seen = names[::5]
    kept_K = tokens_to_keep(tokenizer, usage(tokenizer, seen))
    trimmed = trim_tokenizer(tokenizer, {old: new for new, old in enumerate(kept_K.tolist())})
    assert all(tokens_of(trimmed, text) == tokens_of(tokenizer, text) for text in seen)
    merges = naive_merges(tokenizer)
    wanted = {token for text in seen for token in tokens_of(tokenizer, text)}
    while more := {part for token in wanted for pair in merges.get(token, []) for part in pair} - wanted:
        wanted |= more
    assert {token for token in trimmed.get_vocab() if token in merges} == wanted & merges.keys()


def test_the_most_used_tokens_are_kept(tokenizer: Tokenizer, names: list[str]) -> None:
    uses_V = usage(tokenizer, names)
    kept = set(tokens_to_keep(tokenizer, uses_V, 360).tolist())
    merges = naive_merges(tokenizer)
    makers = {tokenizer.token_to_id(part) for pairs in merges.values() for pair in pairs for part in pair}
    made = {tokenizer.token_to_id(token) for token in merges}
    chosen = [uses_V[token] for token in kept & made - makers]  # nobody's ancestors: kept for their own use
    left_out = [uses_V[token] for token in made - kept]
    assert min(chosen) >= max(left_out) > 0


def test_vectors_of_covered_texts_stay_to_the_bit_here_and_in_sentence_transformers(
    make_model: MakeModel, names: list[str], tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    model = make_model()
    seen = names[:40]
    prefix = "Instruct: find it\nQuery: "
    uses_V = usage(model.tokenizer, [*seen, *(prefix + text for text in seen)])
    identity = save_model(tmp_path / "whole", model).identity
    small = trim(load_model(tmp_path / "whole"), tokens_to_keep(model.tokenizer, uses_V))
    assert save_model(tmp_path / "small", small).parent == identity
    assert small.decoder.config.vocab_size < model.decoder.config.vocab_size
    for prompt in ({}, {"prompt": "query", "instruction": "find it"}):
        before, after = (
            Embedder(tmp_path / which).encode(seen, **prompt)  # type: ignore[arg-type]
            for which in ("whole", "small")
        )
        np.testing.assert_array_equal(before, after)
    theirs = SentenceTransformer(str(tmp_path / "small"), device="cpu").encode(seen)
    np.testing.assert_allclose(theirs, Embedder(tmp_path / "small").encode(seen), atol=1e-5)


def test_coverage_counts_by_hand(tokenizer: Tokenizer, names: list[str]) -> None:
    kept_K = tokens_to_keep(tokenizer, usage(tokenizer, names[::2]), 380)
    number_of = {old: new for new, old in enumerate(kept_K.tolist())}
    trimmed = trim_tokenizer(tokenizer, number_of)
    found = coverage(tokenizer, trimmed, kept_K, iter(names))
    before = [tokens_of(tokenizer, text)[:-1] for text in names]
    after = [tokens_of(trimmed, text)[:-1] for text in names]
    assert (found.texts, found.tokens) == (len(names), sum(map(len, before)))
    assert found.tokens_trimmed == sum(map(len, after)) > found.tokens
    assert found.unchanged == sum(old == new for old, new in zip(before, after, strict=True))
    assert 0 < found.unchanged < found.texts


def test_too_few_and_what_is_no_bpe_are_refused(tokenizer: Tokenizer) -> None:
    uses_V = np.zeros(tokenizer.get_vocab_size(), np.int64)
    with pytest.raises(
        UsageError, match="257 tokens were asked for, but bytes and special tokens alone are 258"
    ):
        tokens_to_keep(tokenizer, uses_V, 257)
    with pytest.raises(UsageError, match="of the type WordLevel; only a BPE"):
        tokens_to_keep(Tokenizer(models.WordLevel({"a": 0}, "a")), np.zeros(1, np.int64))


@pytest.mark.slow
def test_the_real_tokenizer(shared: Path, make_model: MakeModel) -> None:
    import pyarrow.parquet as pq

    tokenizer = load_tokenizer(shared / "tokenizers" / "qwen3" / "tokenizer.json")
    append_eos(tokenizer, "<|endoftext|>")
    file = next(iter(sorted((shared / "data" / "retrieval").glob("*.parquet"))))
    texts = pq.read_table(file)["query"].to_pylist()[:4000]
    kept_K = tokens_to_keep(tokenizer, usage(tokenizer, texts[:2000]), 12_000)
    number_of = {old: new for new, old in enumerate(kept_K.tolist())}
    trimmed = trim_tokenizer(tokenizer, number_of)
    assert len(kept_K) == trimmed.get_vocab_size() <= 12_000
    covered = 0
    for text in texts:
        old, new = tokenizer.encode(text).ids, trimmed.encode(text).ids
        if all(token in number_of for token in old):
            assert new == [number_of[token] for token in old]
            covered += 1
    assert covered > 2000


def test_the_decoder_of_other_layers_is_the_same(make_model: MakeModel, names: list[str]) -> None:
    model = make_model()
    small = trim(model, tokens_to_keep(model.tokenizer, usage(model.tokenizer, names), 300))
    whole = model.decoder.state_dict()
    for name, tensor in small.decoder.state_dict().items():
        if name != "embed_tokens.weight":
            assert torch.equal(tensor, whole[name])
