"""A tiny model whose tokenizer llama.cpp knows as well, and texts that padding or a limit could harm."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from f2llm.export.gguf_tokenizer import PRE_TOKENIZERS
from f2llm.export.runtimes import Vectors
from f2llm.model.folder import Model, save_model
from f2llm.model.tokenizer import EOS, PAD, append_eos

LIMIT = 64  # tokens, of the tiny models


@pytest.fixture(scope="session")
def texts(names: list[str]) -> list[str]:
    """Names, the empty text, white space, and a long text."""
    return [*names[:30], "", " ", ", ".join(names[30:34])]


@pytest.fixture(scope="session")
def qwen_like(names: list[str]) -> Tokenizer:
    """A byte-level BPE that splits as Qwen's does, trained on the names; EOS and PAD come last, as there."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = next(words for words, name in PRE_TOKENIZERS.items() if name == "qwen2")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(names, trainer)
    tokenizer.add_special_tokens([PAD, EOS])
    append_eos(tokenizer, EOS)
    return tokenizer


@pytest.fixture(scope="session")
def qwen_like_folder(
    make_model: Callable[..., Model], qwen_like: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model with that tokenizer, four rows of its embedding table unused, and rows of 64 and 48 weights."""
    size = qwen_like.get_vocab_size()
    model = make_model(vocab_size=size + 4, hidden_size=64, intermediate_size=48, head_dim=16)
    eos_id = qwen_like.token_to_id(EOS)
    assert eos_id is not None
    folder = tmp_path_factory.mktemp("qwen_like")
    save_model(folder, Model(model.decoder, qwen_like, replace(model.facts, eos_id=eos_id)))
    return folder


def cosines(a_ND: Vectors, b_ND: Vectors) -> Vectors:
    """Of the rows; both must be of unit length."""
    for vectors_ND in (a_ND, b_ND):
        np.testing.assert_allclose(np.linalg.norm(vectors_ND, axis=1), 1, atol=1e-5)
    found: Vectors = (a_ND * b_ND).sum(1)
    return found
