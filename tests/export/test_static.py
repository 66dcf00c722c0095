"""Token vectors: sentence-transformers loads them, and they are what they are said to be."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.export.conftest import cosines
from tokenizers import Tokenizer

from f2llm.errors import UsageError
from f2llm.export.export import export_model
from f2llm.export.runtimes import static_encode
from f2llm.export.static import principal_components, token_vectors, zipf_weights
from f2llm.model.folder import load_model


@pytest.fixture(scope="module")
def folder(model_folder: Path, names: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("static") / "out"
    export_model(model_folder, out, "static", dim=12, texts=names)
    return out


def test_sentence_transformers_loads_it(folder: Path, names: list[str]) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="the peer is not installed")
    peer = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    found_ND = peer.encode(names)
    assert found_ND.shape == (len(names), 12)
    assert cosines(found_ND, static_encode(folder)(names)).min() > 0.99999


def test_a_text_is_the_mean_of_its_tokens(folder: Path) -> None:
    from safetensors.numpy import load_file

    table_VD = load_file(folder / "0_StaticEmbedding" / "model.safetensors")["embedding.weight"]
    tokenizer = Tokenizer.from_file(str(folder / "0_StaticEmbedding" / "tokenizer.json"))
    ids = tokenizer.encode("Germany and France").ids
    mean_D = sum(table_VD[token] for token in ids) / len(ids)
    found_ND = static_encode(folder)(["Germany and France", ""])
    np.testing.assert_allclose(found_ND[0], mean_D / np.linalg.norm(mean_D), atol=1e-6)
    assert not found_ND[1].any()  # a text without tokens has no vector


def test_no_text_has_eos(folder: Path, model_folder: Path) -> None:
    eos_id = load_model(model_folder).facts.eos_id
    tokenizer = Tokenizer.from_file(str(folder / "0_StaticEmbedding" / "tokenizer.json"))
    assert eos_id not in tokenizer.encode("Germany").ids


def test_token_vectors_are_the_models(model_folder: Path) -> None:
    model = load_model(model_folder)
    vectors_VE = token_vectors(model)
    assert len(vectors_VE) == model.tokenizer.get_vocab_size()
    with torch.inference_mode():
        alone_1E = model.decoder(torch.tensor([300, model.facts.eos_id]), [2]).numpy()
    np.testing.assert_allclose(vectors_VE[[300]], alone_1E, atol=1e-4)


def test_principal_components_are_those_of_the_singular_values() -> None:
    x_VE = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32) @ np.diag(np.arange(1, 7.0))
    x_VE = (x_VE + 3).astype(np.float32)
    u_VE, s_E, _ = np.linalg.svd(x_VE - x_VE.mean(0), full_matrices=False)
    found_VD = principal_components(x_VE, 4)
    np.testing.assert_allclose(np.abs(found_VD), np.abs(u_VE * s_E)[:, :4], atol=1e-3)


def test_frequent_tokens_weigh_less() -> None:
    weights_V = zipf_weights(1000)
    assert (np.diff(weights_V) > 0).all() and 0 < weights_V[0] < weights_V[-1] <= 1


def test_dim_is_limited(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 to 24"):
        export_model(model_folder, tmp_path / "out", "static", dim=25)
