"""Merging: every method against its formula in float64, and what does not go together."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from f2llm.compress.merge import Method, merge_models
from f2llm.embed.embedder import Embedder
from f2llm.errors import F2Error, UsageError
from f2llm.model.folder import WEIGHTS, Model, load_model, save_model

MakeModel = Callable[..., Model]
Tensors = dict[str, Tensor]


@pytest.fixture
def folders(make_model: MakeModel, tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in ("one", "two", "three")]
    for seed, folder in enumerate(found):
        save_model(folder, make_model(seed=seed))
    return found


def tensors_of(folder: Path) -> Tensors:
    return {name: tensor.double() for name, tensor in load_file(folder / WEIGHTS).items()}


def by_hand(method: Method, models: list[Tensors], base: Tensors | None, weights: list[float]) -> Tensors:
    def merged(name: str) -> Tensor:
        tensors = [model[name] for model in models]
        if base is not None:
            return base[name] + sum(w * (t - base[name]) for w, t in zip(weights, tensors, strict=True))
        if method == "average":
            stacked = torch.stack(tensors) * torch.tensor(weights).double().view(-1, *[1] * tensors[0].dim())
            return stacked.sum(0) / sum(weights)
        x, y = (t.numpy() for t in tensors)
        share = weights[1] / sum(weights)
        angle = math.acos((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))
        return torch.from_numpy(
            (math.sin((1 - share) * angle) * x + math.sin(share * angle) * y) / math.sin(angle)
        )

    return {name: merged(name) for name in models[0]}


@pytest.mark.parametrize(
    ("method", "models", "base", "weights"),
    [
        ("average", [0, 1, 2], None, None),
        ("average", [0, 1, 2], None, [1.0, 2.5, 0.0]),
        ("spherical", [0, 1], None, None),
        ("spherical", [2, 0], None, [3.0, 1.0]),
        ("task", [1, 2], 0, None),
        ("task", [1, 2], 0, [0.7, -0.4]),
    ],
)
def test_each_method_is_its_formula(
    folders: list[Path],
    tmp_path: Path,
    method: Method,
    models: list[int],
    base: int | None,
    weights: list[float] | None,
) -> None:
    chosen, start = [folders[i] for i in models], None if base is None else folders[base]
    facts = merge_models(chosen, tmp_path / "out", method=method, weights=weights, base=start)
    expected = by_hand(
        method,
        [tensors_of(folder) for folder in chosen],
        None if start is None else tensors_of(start),
        weights or [1.0] * len(models),
    )
    found = load_model(tmp_path / "out")  # which checks the identity
    state = found.decoder.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name].double(), tensor, rtol=1e-5, atol=1e-6)
    assert found.facts == facts
    assert facts.parent == (load_model(start).facts.identity if start else None)
    assert facts.merged is not None
    assert facts.merged["models"] == [load_model(folder).facts.identity for folder in chosen]


def test_a_model_merged_with_itself_is_itself(folders: list[Path], tmp_path: Path) -> None:
    texts = ["lion", "Ujerumani"]
    expected = Embedder(folders[0]).encode(texts)
    methods: list[Method] = ["average", "spherical"]
    for method in methods:
        merge_models([folders[0]] * 2, tmp_path / method, method=method)
        np.testing.assert_allclose(Embedder(tmp_path / method).encode(texts), expected, atol=1e-6)


def test_the_folder_does_not_tell_how_its_weights_were_written(folders: list[Path], tmp_path: Path) -> None:
    merged = merge_models(folders, tmp_path / "streamed")
    saved = save_model(tmp_path / "whole", load_model(tmp_path / "streamed"))
    assert saved.identity == merged.identity
    for name in (WEIGHTS, "f2llm.json", "config.json", "tokenizer.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()


def test_what_does_not_go_together_is_refused(
    folders: list[Path], make_model: MakeModel, tmp_path: Path
) -> None:
    def refused(message: str, *models: Path, **options: object) -> None:
        with pytest.raises(UsageError, match=message):
            merge_models(models, tmp_path / "out", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()

    one, two, three = folders
    refused("given 1 models, expected 2 or more", one)
    refused("given 3 models, expected two", one, two, three, method="spherical")
    refused("'task' needs a base", one, two, method="task")
    refused("no other method takes one", one, two, base=three)
    refused("3 weights were given for 2 models", one, two, weights=[1, 2, 3])
    refused("expected none below 0", one, two, weights=[2, -1])
    refused("the method is 'sum'", one, two, method="sum")
    save_model(tmp_path / "deep", make_model(num_hidden_layers=1))
    refused("deep has num_hidden_layers 1", one, tmp_path / "deep")


def test_a_changed_folder_is_refused(folders: list[Path], tmp_path: Path) -> None:
    tensors = load_file(folders[1] / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folders[1] / WEIGHTS)
    with pytest.raises(F2Error, match="was changed after it was written"):
        merge_models(folders, tmp_path / "out")
