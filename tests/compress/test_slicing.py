"""Slices: what is taken out is what was inside, every tool loads it, and training for it makes it good."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from f2llm.compress.slicing import slice_model
from f2llm.data.rows import read_rows
from f2llm.embed.embedder import Embedder
from f2llm.errors import UsageError
from f2llm.model.batches import forward
from f2llm.model.decoder import Cuts
from f2llm.model.folder import Model, load_model, save_model
from f2llm.model.slices import load_basis, onto_rank, save_basis, table_basis
from f2llm.recipe_train import HardNegatives, TrainStage
from f2llm.train.sampler import Sampler, load_sources
from f2llm.train.stage import make_sampler, train_stage
from f2llm.train.terms import Terms, make_loss, token_ids
from f2llm.train.watch import read_log

MakeModel = Callable[..., Model]
TEXTS = [
    "a river in the north",
    "",
    "ein Fluss",
    "नदी",
    "a",
    "a river in the north, with a long name behind it",
]
E = 24


@pytest.fixture
def whole(make_model: MakeModel) -> Model:
    return make_model(num_hidden_layers=4)


@pytest.fixture
def folder(whole: Model, tmp_path: Path) -> Path:
    save_model(tmp_path / "whole", whole)
    return tmp_path / "whole"


def vectors(model: Model, cuts: Cuts | None = None) -> Tensor:
    ids = token_ids(model, TEXTS, 64)
    with torch.no_grad():
        return forward(model.decoder, ids, cuts) if cuts else forward(model.decoder, ids)


def test_exits_give_the_vectors_of_models_that_end_there(whole: Model, folder: Path, tmp_path: Path) -> None:
    """Each exit's in the order of layers, the whole model's behind them."""
    found = vectors(whole, Cuts([1, 3])).split(E, dim=1)
    assert torch.equal(found[-1], vectors(whole))
    for layers, exit_NE in zip((1, 3), found[:-1], strict=True):
        slice_model(folder, tmp_path / f"first {layers}", layers=layers)
        cut = load_model(tmp_path / f"first {layers}")
        assert len(cut.decoder.layers) == layers and cut.facts.parent == load_model(folder).facts.identity
        torch.testing.assert_close(exit_NE, vectors(cut), rtol=1e-5, atol=1e-5)


def test_a_rank_is_that_of_training(whole: Model, folder: Path, tmp_path: Path) -> None:
    """By the directions beside the weights, or the table's own strongest where there are none."""
    table_VE = whole.decoder.embed_tokens.weight.detach()
    left_VE = torch.linalg.svd(table_VE.double(), full_matrices=False)
    best_VE = (left_VE.U[:, :5] * left_VE.S[:5]) @ left_VE.Vh[:5]
    slice_model(folder, tmp_path / "own", rank=5)
    cut = load_model(tmp_path / "own")
    torch.testing.assert_close(
        cut.decoder.embed_tokens.weight.detach(), best_VE.float(), rtol=1e-4, atol=1e-5
    )
    assert np.linalg.matrix_rank(cut.decoder.embed_tokens.weight.detach().numpy(), tol=1e-4) == 5

    turned_EE, _ = torch.linalg.qr(torch.randn(E, E, generator=torch.Generator().manual_seed(1)))
    save_basis(folder, turned_EE)
    slice_model(folder, tmp_path / "trained", rank=5)
    trained = vectors(whole, Cuts(table_EE=onto_rank(turned_EE, 5)))
    torch.testing.assert_close(vectors(load_model(tmp_path / "trained")), trained, rtol=1e-4, atol=1e-4)
    kept_EE = load_basis(tmp_path / "trained", E)
    assert kept_EE is not None and torch.equal(kept_EE, turned_EE), "a slice can be sliced again"


def test_directions_are_orthonormal_and_the_strongest_first() -> None:
    table_VE = torch.randn(90, 7, generator=torch.Generator().manual_seed(2)) * torch.tensor(
        [1, 9, 2, 3, 8, 4, 5.0]
    )
    basis_EE = table_basis(table_VE)
    torch.testing.assert_close(basis_EE.T @ basis_EE, torch.eye(7), rtol=0, atol=1e-5)
    strength_E = (table_VE @ basis_EE).norm(dim=0)
    torch.testing.assert_close(strength_E, torch.linalg.svdvals(table_VE), rtol=1e-4, atol=1e-4)


def test_dimensions_are_those_of_the_whole(folder: Path, tmp_path: Path) -> None:
    slice_model(folder, tmp_path / "short", dim=8)
    whole, short = Embedder(folder), Embedder(tmp_path / "short")
    assert (short.dim, short.sizes) == (8, [8])
    np.testing.assert_array_equal(short.encode(TEXTS), whole.encode(TEXTS, dim=8))
    with pytest.raises(UsageError, match="dim is 9; this model gives 1 to 8"):
        short.encode(TEXTS, dim=9)


def test_sentence_transformers_loads_a_slice(folder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    slice_model(folder, tmp_path / "small", layers=2, rank=10, dim=8)
    peer = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    found_ND = F.normalize(torch.from_numpy(peer.encode(TEXTS)), dim=-1).numpy()
    np.testing.assert_allclose(found_ND, Embedder(tmp_path / "small").encode(TEXTS), rtol=0, atol=1e-5)


def test_slices_of_slices_and_what_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slice_model(folder, tmp_path / "one", layers=3, rank=12, dim=16)
    said = capsys.readouterr().err
    assert "not trained to do with 3 layers" in said and "not trained to do with 12 ranks" in said
    assert "16 dimensions" not in said, "16 is one of its sizes"
    facts = slice_model(tmp_path / "one", tmp_path / "two", layers=2, dim=8)
    assert (facts.table_rank, facts.dim, facts.matryoshka_sizes) == (12, 8, [8])
    for wrong, sentence in (
        ({}, "nothing is to be cut"),
        ({"layers": 4}, "--layers is 4; the model has 1 to 3"),
        ({"rank": 13}, "--rank is 13; the model has 1 to 12"),
        ({"dim": 17}, "--dim is 17; the model has 1 to 16"),
    ):
        with pytest.raises(UsageError, match=sentence):
            slice_model(tmp_path / "one", tmp_path / "three", **wrong)
    with pytest.raises(UsageError, match="is there already"):
        slice_model(folder, tmp_path / "one", layers=1)
    assert not (tmp_path / "three").exists()


# --- Training


def settings(**changes: Any) -> TrainStage:
    values: dict[str, Any] = {
        "stage": "train",
        "data": "rows",
        "base": "base",
        "instructions": True,
        "steps": 40,
        "batch_size": 12,
        "max_length": 64,
        "hard_negatives": HardNegatives(retrieval=0, clustering=2, classification=1),
        "learning_rate": 1e-2,
        "formats": ["retrieval"],
    }
    return TrainStage(**{**values, **changes})


def batches(config: TrainStage, rows_folder: Path) -> Sampler:
    table, sources = read_rows(rows_folder)
    return make_sampler(config, load_sources(table, sources, config.formats), seed=5)


def test_the_loss_is_the_mean_over_exits_and_the_whole(
    whole: Model, rows_folder: Path, folder: Path, tmp_path: Path
) -> None:
    config = settings(exits=[1, 3])
    batch = batches(config, rows_folder)[0]
    ids, heat = token_ids(whole, batch.texts, 64), torch.tensor(0.05)
    alone = []
    for layers in (1, 3):
        slice_model(folder, tmp_path / str(layers), layers=layers)
        alone.append(
            make_loss(config, batch, None, heat, {})(forward(load_model(tmp_path / str(layers)).decoder, ids))
        )
    alone.append(make_loss(config, batch, None, heat, {})(forward(whole.decoder, ids)))
    terms: Terms = {}
    together = make_loss(config, batch, None, heat, terms, config.exits)(
        forward(whole.decoder, ids, Cuts([1, 3]))
    )
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-4, atol=1e-4)
    assert terms.keys() == {"in_batch", "exit_1", "exit_3"}
    torch.testing.assert_close(terms["exit_3"], alone[1].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_training_for_a_slice_makes_it_better(rows_folder: Path, folder: Path, tmp_path: Path) -> None:
    """Loss of slices, on a batch, of two models that differ in whether they were trained for them."""
    losses = {}
    for name, cuts in (("without", {}), ("with", {"exits": [1], "table_ranks": [6]})):
        config = settings(**cuts)
        train_stage(
            config,
            data=rows_folder,
            base=folder,
            tokenizer=None,
            teacher=None,
            out=tmp_path / name,
            seed=5,
            recipe_hash="",
        )
        small = tmp_path / f"{name} small"
        slice_model(tmp_path / name, small, layers=1, rank=6)
        plain, batch = settings(), batches(config, rows_folder)[39]
        cut = load_model(small)
        ids = token_ids(cut, batch.texts, 64)
        losses[name] = float(
            make_loss(plain, batch, None, torch.tensor(0.05), {})(forward(cut.decoder, ids)).detach()
        )
    assert losses["with"] < 0.7 * losses["without"]
    facts = load_model(tmp_path / "with").facts
    assert (facts.exits, facts.table_ranks) == ([1], [6])
    assert all("exit_1" in record for record in read_log(tmp_path / "with" / "log.jsonl") if "loss" in record)


def test_what_the_model_does_not_have_inside_is_refused(
    folder: Path, rows_folder: Path, tmp_path: Path
) -> None:
    for cuts, sentence in (
        ({"exits": [2, 4]}, "'exits' has 4, but the model has 4 layers"),
        ({"table_ranks": [24]}, "'table_ranks' has 24, but the model has 24 dimensions"),
    ):
        with pytest.raises(UsageError, match=sentence):
            train_stage(
                settings(**cuts),
                data=rows_folder,
                base=folder,
                tokenizer=None,
                teacher=None,
                out=tmp_path / "out",
                seed=5,
                recipe_hash="",
            )


def test_a_lower_rank_makes_the_onnx_file_smaller(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the export needs onnxruntime")
    from f2llm.export.export import export_model

    slice_model(folder, tmp_path / "whole table", layers=1)
    slice_model(folder, tmp_path / "low rank", layers=1, rank=3)
    texts = [f"{word} {number}" for number in range(20) for word in ("river", "Fluss", "नदी")]
    parities = [
        export_model(tmp_path / name, tmp_path / f"{name} onnx", "onnx", texts=texts)
        for name in ("whole table", "low rank")
    ]
    sizes = [
        (tmp_path / f"{name} onnx" / "model.onnx").stat().st_size for name in ("whole table", "low rank")
    ]
    entries = load_model(folder).decoder.config.vocab_size
    assert sizes[0] - sizes[1] == pytest.approx(4 * (entries * (E - 3) - 3 * E), rel=0.02)
    assert all((parity.exported.smallest_cosine or 0) > 0.9999 for parity in parities)
