"""Checkpoints of a training run: everything that the next step depends on, complete or not there at all.

Batches are a pure function of (seed, step), so a checkpoint is weights, optimizer state and the step. Each is a new
folder `step-00001234` that is renamed into place when all of it is on disk; the newest is found by name.
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from f2llm.files import read_json, sync_folder, write_json


def save_checkpoint(
    folder: Path, step: int, decoder: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write folder/step-XXXXXXXX, then drop older ones."""
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _save(partial / "weights.safetensors", decoder.state_dict())
    names = _optimizer_order(decoder, optimizer)
    flat = {
        f"{names[index]}/{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    _save(partial / "optimizer.safetensors", flat)
    write_json(partial / "state.json", {"step": step})
    os.replace(partial, final)
    sync_folder(folder)
    for older in sorted(folder.glob("step-*"))[:-1]:
        _drop(older)


def drop_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, and the folder."""
    for checkpoint in sorted(folder.glob("step-*")):
        _drop(checkpoint)
    shutil.rmtree(folder, ignore_errors=True)


def _drop(checkpoint: Path) -> None:
    """Remove a checkpoint, hiding it first: a kill halfway must not leave one that lacks files."""
    partial = checkpoint.with_name(f".{checkpoint.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.replace(checkpoint, partial)
    shutil.rmtree(partial)


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _optimizer_order(decoder: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the order in which the optimizer numbers them."""
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def load_checkpoint(folder: Path, decoder: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore the newest checkpoint in place; returns the number of steps done, 0 if there is none."""
    newest = max(folder.glob("step-*"), default=None)
    if newest is None:
        return 0
    decoder.load_state_dict(load_file(newest / "weights.safetensors"))
    number = {name: index for index, name in enumerate(_optimizer_order(decoder, optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(newest / "optimizer.safetensors").items():
        parameter, key = name.rsplit("/", 1)
        state.setdefault(number[parameter], {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    step: int = read_json(newest / "state.json")["step"]
    return step
