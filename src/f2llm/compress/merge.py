"""Merging: one model out of several of the same shape and tokenizer, tensor by tensor.

Averages of models that were trained from one start are often better than each of them (Wortsman et al. 2022, Model
soups); a spherical mean keeps the length of weights that an average would shorten (Shoemake 1985, Animating rotation
with quaternion curves); task vectors add what several models learnt from one base (Ilharco et al. 2023, Editing models
with task arithmetic). Two tensors are in memory at a time, whatever the models' size.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from f2llm.errors import UsageError
from f2llm.files import sha256_file
from f2llm.model.decoder import DecoderConfig
from f2llm.model.folder import (
    WEIGHTS,
    ModelFacts,
    check_identity,
    complete_folder,
    read_config,
    read_facts,
    weight_files,
)
from f2llm.model.tensor_files import TensorFiles, open_tensors, write_tensors
from f2llm.tokenizer_file import load_tokenizer

Method = Literal["average", "spherical", "task"]
PARALLEL = 1e-4  # the sine of an angle so small that a spherical mean, which divides by it, is an average


def merge_models(
    models: Sequence[Path],
    out: Path,
    *,
    method: Method = "average",
    weights: Sequence[float] | None = None,
    base: Path | None = None,
) -> ModelFacts:
    """Write the folder of the merged model; returns its facts.

    Args:
        models: folders of models of one shape, tokenizer and prompt.
        method: "average"; "spherical", of two models; "task": `base`, and to it what each model has learnt from it.
        weights: of each model, equal by default. Means divide by their sum; what a model has learnt is multiplied by
            its weight, 1 by default.
        base: what the models were trained from, for "task".

    Raises:
        UsageError: method, weights and models do not go together.
    """
    weights = _weights(models, method, weights, base)
    folders = [*([base] if base else []), *models]
    facts = [read_facts(folder) for folder in folders]
    config = _check_same(folders, facts)
    merged = replace(
        facts[0],
        parent=facts[0].identity if base else None,
        recipe=None,
        exits=facts[0].exits if all(one.exits == facts[0].exits for one in facts) else [],
        table_ranks=[],
        table_rank=None,  # a mean of tables has the ranks of all
        merged={
            "method": method,
            "models": [one.identity for one in facts[-len(models) :]],
            "weights": list(weights),
        },
    )
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(weight_files(folder))) for folder in folders]
        write_tensors(out / WEIGHTS, files[0].shapes, partial(MERGED[method], files, weights))
    return complete_folder(out, config, load_tokenizer(folders[0] / "tokenizer.json"), merged)


def average(files: Sequence[TensorFiles], weights: Sequence[float], name: str) -> Tensor:
    """sum(weight * tensor) / sum(weight)."""
    total = torch.zeros(files[0].shapes[name])
    for file, weight in zip(files, weights, strict=True):
        total.add_(file.read(name), alpha=weight / sum(weights))
    return total


def spherical(files: Sequence[TensorFiles], weights: Sequence[float], name: str) -> Tensor:
    """(sin((1 - t) a) x + sin(t a) y) / sin(a), with the angle a between x and y, and t the second one's share."""
    one, other = (file.read(name) for file in files)
    cosine = torch.nn.functional.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle.sin() < PARALLEL:
        return average(files, weights, name)
    share = weights[1] / sum(weights)
    left, right = (torch.sin(part * angle) / angle.sin() for part in (1 - share, share))
    return one * left.float() + other * right.float()


def task(files: Sequence[TensorFiles], weights: Sequence[float], name: str) -> Tensor:
    """The base, which comes first, and to it sum(weight * (tensor - base))."""
    base = files[0].read(name)
    total = base * (1 - sum(weights))
    for file, weight in zip(files[1:], weights, strict=True):
        total.add_(file.read(name), alpha=weight)
    return total


MERGED: dict[str, Callable[[Sequence[TensorFiles], Sequence[float], str], Tensor]] = {
    "average": average,
    "spherical": spherical,
    "task": task,
}


def _weights(
    models: Sequence[Path], method: Method, weights: Sequence[float] | None, base: Path | None
) -> Sequence[float]:
    """The weight of each model."""
    if method not in get_args(Method):
        raise UsageError(f"the method is {method!r}; expected {', '.join(get_args(Method))}.")
    if (method == "task") != bool(base):
        raise UsageError(
            "the method 'task' needs a base, and no other method takes one; give both or neither."
        )
    least = 1 if base else 2
    if len(models) < least or (method == "spherical" and len(models) != 2):
        expected = "two" if method == "spherical" else f"{least} or more"
        raise UsageError(f"the method {method!r} was given {len(models)} models, expected {expected}.")
    if weights is None:
        return [1.0] * len(models)
    if len(weights) != len(models):
        raise UsageError(f"{len(weights)} weights were given for {len(models)} models; give one for each.")
    if method != "task" and (min(weights) < 0 or sum(weights) <= 0):
        raise UsageError(
            f"the weights of a mean are {list(weights)}, expected none below 0 and one above; "
            "take the method 'task' to subtract."
        )
    return weights


def _check_same(folders: Sequence[Path], facts: Sequence[ModelFacts]) -> DecoderConfig:
    """The configuration of all; a UsageError names the first thing in which a folder differs from the first one."""

    def compare(folder: Path, what: str, got: object, expected: object) -> None:
        if got != expected:
            raise UsageError(
                f"{folder} has {what} {got!r}, {folders[0]} has {expected!r}; "
                "merge models of one shape, tokenizer and prompt."
            )

    config = read_config(folders[0])
    for folder, one in zip(folders, facts, strict=True):
        own = read_config(folder)
        check_identity(folder, one, own)
        for field in fields(DecoderConfig):
            compare(folder, field.name, getattr(own, field.name), getattr(config, field.name))
        tokenizers = (sha256_file(path / "tokenizer.json") for path in (folder, folders[0]))
        compare(folder, "a tokenizer.json with SHA-256", *tokenizers)
        for name in ("eos_id", "template", "instruction"):
            compare(folder, name, getattr(one, name), getattr(facts[0], name))
    return config
