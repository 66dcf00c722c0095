"""Checkpoints: everything comes back, half-written ones do not exist, and removing one is never seen halfway."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from f2llm.model.folder import Model
from f2llm.recipe import TrainStage
from f2llm.train import checkpoint
from f2llm.train.checkpoint import drop_checkpoints, load_checkpoint, save_checkpoint
from f2llm.train.trainer import embed, make_optimizer

Settings = Callable[..., TrainStage]
MakeModel = Callable[..., Model]
Pair = tuple[Model, torch.optim.Optimizer]


@pytest.fixture
def make(settings: Settings, make_model: MakeModel) -> Callable[[int], Pair]:
    """Makes a model and its optimizer after two steps."""

    def trained(seed: int) -> Pair:
        model = make_model(seed=seed)
        optimizer = make_optimizer(model.decoder, settings())
        for _ in range(2):
            optimizer.zero_grad()
            embed(model, ["lion", "Ujerumani"], 32)[0].square().sum().backward()
            optimizer.step()
        return model, optimizer

    return trained


def state(pair: Pair) -> dict[str, torch.Tensor]:
    model, optimizer = pair
    tensors = dict(model.decoder.state_dict())
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"{number} {name}": value for name, value in values.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_everything_comes_back(make: Callable[[int], Pair], tmp_path: Path) -> None:
    saved, other = make(0), make(1)
    save_checkpoint(tmp_path, 123, saved[0].decoder, saved[1])
    assert not same(state(saved), state(other))
    assert load_checkpoint(tmp_path, other[0].decoder, other[1]) == 123
    assert same(state(saved), state(other))


def test_a_new_optimizer_takes_over_the_moments(
    make: Callable[[int], Pair], settings: Settings, make_model: MakeModel, tmp_path: Path
) -> None:
    saved = make(0)
    save_checkpoint(tmp_path, 1, saved[0].decoder, saved[1])
    model = make_model(seed=1)
    fresh = model, make_optimizer(model.decoder, settings())
    load_checkpoint(tmp_path, model.decoder, fresh[1])
    assert same(state(saved), state(fresh))
    assert [g["weight_decay"] for g in fresh[1].param_groups] == [
        g["weight_decay"] for g in saved[1].param_groups
    ]


def test_without_a_checkpoint_nothing_changes(make: Callable[[int], Pair], tmp_path: Path) -> None:
    pair = make(0)
    before = state(pair)
    assert load_checkpoint(tmp_path / "none", pair[0].decoder, pair[1]) == 0
    assert same(state(pair), before)


def test_the_newest_counts_and_older_ones_go(make: Callable[[int], Pair], tmp_path: Path) -> None:
    first, second, third = make(0), make(1), make(2)
    save_checkpoint(tmp_path, 9, first[0].decoder, first[1])
    save_checkpoint(tmp_path, 10, second[0].decoder, second[1])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    assert load_checkpoint(tmp_path, third[0].decoder, third[1]) == 10
    assert same(state(third), state(second))


def test_a_half_written_checkpoint_is_not_there(make: Callable[[int], Pair], tmp_path: Path) -> None:
    """Killed before the rename: files missing or cut short under a hidden name, which the next save takes over."""
    first, second = make(0), make(1)
    save_checkpoint(tmp_path, 5, first[0].decoder, first[1])
    partial = tmp_path / ".step-00000010.partial"
    partial.mkdir()
    weights = (tmp_path / "step-00000005" / "weights.safetensors").read_bytes()
    (partial / "weights.safetensors").write_bytes(weights[: len(weights) // 2])
    assert load_checkpoint(tmp_path, second[0].decoder, second[1]) == 5
    assert same(state(first), state(second))
    save_checkpoint(tmp_path, 10, second[0].decoder, second[1])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_killed_while_writing_leaves_the_old_one(
    make: Callable[[int], Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make(0), make(1)
    save_checkpoint(tmp_path, 5, first[0].decoder, first[1])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 10, second[0].decoder, second[1])
    assert load_checkpoint(tmp_path, second[0].decoder, second[1]) == 5
    assert same(state(first), state(second))


def test_killed_while_removing_leaves_none_that_lacks_files(
    make: Callable[[int], Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    pair = make(0)
    save_checkpoint(folder, 5, pair[0].decoder, pair[1])

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / "weights.safetensors").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr("f2llm.train.checkpoint.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_checkpoints(folder)
    monkeypatch.undo()
    assert load_checkpoint(folder, pair[0].decoder, pair[1]) == 0
    drop_checkpoints(folder)
    assert not folder.exists()
    shutil.rmtree(folder, ignore_errors=True)
    drop_checkpoints(folder)  # nothing there is no error
