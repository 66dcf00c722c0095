"""Checkpoints of a training run: everything that the next step depends on, complete or not there at all.

Batches are a pure function of (seed, step), so a checkpoint is tensors (weights, optimizer state, a moving average) and
a few facts. Its format is torch.distributed.checkpoint's (DCP) for any number of ranks: each writes the parts it holds,
and any other number of ranks, or one process alone, reads them back bit for bit.

    checkpoints/step-00001234/
        __0_0.distcp, __1_0.distcp ...   tensors, one file a rank
        .metadata                        which tensor lies where (DCP's)
        state.json                       the step, the caller's `meta`, and size and SHA-256 of each file; written last

A checkpoint is written under a hidden name, fsynced, and renamed into place. One that was damaged later, by a disk or
by hand, is passed over for the one before.

`.metadata` is a pickle, and a pickle can run code when it is read: load checkpoints of your own runs only. Models that
are handed on are safetensors (f2llm.model.folder).
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from f2llm.errors import F2Error, UsageError
from f2llm.files import read_json, read_object, sha256_file, sync_folder, write_json
from f2llm.progress import say
from f2llm.train.ranks import Ranks, collect, on_main

STATE = "state.json"
MUST_MATCH, MAY_DIFFER = "must_match", "may_differ"  # the two parts of `meta` that `check_same` reads

State = Mapping[
    str, Mapping[str, Tensor]
]  # such as {"model": {...}, "optimizer": {...}}, values may be DTensors


def save_checkpoint(
    folder: Path, step: int, state: State, meta: dict[str, Any], keep: int, ranks: Ranks
) -> None:
    """Write folder/step-XXXXXXXX, then drop all but the newest `keep`; every rank calls it.

    Args:
        folder: where a run's checkpoints lie, on a file system that all ranks share.
        step: number of steps done.
        state: tensors by part and name. Of a DTensor each rank writes its shard; others must be the same on all ranks.
        meta: anything JSON can hold; `check_same` reads meta["must_match"] and meta["may_differ"].
        keep: at least 1. Checkpoints of later steps, which are left where a run went back to an earlier one, go too.

    Raises:
        F2Error: the ranks do not share a file system.
        OSError: on all ranks, whichever of them could not write.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    final = folder / f"step-{step:08d}"
    partial = _hidden(final, "partial")
    on_main(lambda: _make_room(folder, partial), ranks)
    with _plain_failures():
        save(_flat(state), storage_writer=FileSystemWriter(partial))
    written = collect(_facts_of_files(partial, ranks), ranks)
    files = {name: facts for by_rank in written for name, facts in by_rank.items()}
    on_main(lambda: _finish(partial, final, {"step": step, "files": files, "meta": meta}, keep), ranks)


def _hidden(checkpoint: Path, state: str) -> Path:
    """The name under which a checkpoint is not complete yet ("partial"), or not any more ("dropped")."""
    return checkpoint.with_name(f".{checkpoint.name}.{state}")


def _make_room(folder: Path, partial: Path) -> None:
    """An empty `partial`, without what killed processes left under hidden names."""
    for left in folder.glob(".step-*"):
        shutil.rmtree(left)
    partial.mkdir(parents=True)


def _facts_of_files(partial: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Size and hash of the files that this rank wrote; DCP begins their names with the rank."""
    own = sorted(partial.glob(f"__{ranks.rank}_*.distcp"))
    paths = [*own, partial / ".metadata"] if ranks.is_main else own
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in paths}


def _finish(partial: Path, final: Path, facts: dict[str, Any], keep: int) -> None:
    if missing := [name for name in facts["files"] if not (partial / name).exists()]:
        raise F2Error(
            f"rank 0 does not see {missing[0]}, which another rank wrote to {partial}; put the run's folder on a file "
            "system that all ranks share."
        )
    write_json(partial / STATE, facts)
    sync_folder(partial)
    if final.exists():
        _drop(final)
    os.replace(partial, final)
    sync_folder(final.parent)
    checkpoints = _checkpoints(final.parent)
    newest = checkpoints.index(final.name)
    for name in [*checkpoints[:newest], *checkpoints[newest + keep :]]:
        _drop(final.parent / name)


def _checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints of a run, newest first."""
    return sorted(
        (p.name for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)), reverse=True
    )


def steps_kept(folder: Path) -> list[int]:
    """The steps of a folder's checkpoints, newest first; whole or damaged."""
    return [step_of(folder / name) for name in _checkpoints(folder)]


def step_of(checkpoint: Path) -> int:
    """How many steps were done when it was written."""
    return int(checkpoint.name.removeprefix("step-"))


def keep_only(folder: Path, steps: Container[int | None]) -> None:
    """Remove a folder's checkpoints of other steps; for one rank."""
    for name, step in zip(_checkpoints(folder), steps_kept(folder), strict=True):
        if step not in steps:
            _drop(folder / name)


def drop_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, and the folder; for one rank."""
    for name in _checkpoints(folder):
        _drop(folder / name)
    shutil.rmtree(folder, ignore_errors=True)


def _drop(checkpoint: Path) -> None:
    """Remove a checkpoint, hiding it first: a kill halfway must not leave one that lacks files."""
    dropped = _hidden(checkpoint, "dropped")
    shutil.rmtree(dropped, ignore_errors=True)
    os.replace(checkpoint, dropped)
    shutil.rmtree(dropped)


def find_checkpoint(folder: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint that is whole, the same on every rank; None if there is none. Damaged ones are named."""
    names = on_main(lambda: _checkpoints(folder), ranks)
    for name in names:
        damage = _damage(folder / name, ranks)
        if damage is None:
            return folder / name
        if ranks.is_main:
            say(f"checkpoint {folder / name} is damaged ({damage}); it is passed over.")
    if names and ranks.is_main:
        say(f"no checkpoint in {folder} is whole, so there is none to go on from.")
    return None


def _damage(checkpoint: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, the same on every rank; each rank reads a share of the files."""
    try:
        files = read_object(checkpoint / STATE)["files"]
        own = sorted(files.items())[ranks.rank :: ranks.world]
        found = [problem for name, facts in own if (problem := _problem(checkpoint / name, facts))]
    except (F2Error, OSError, KeyError, TypeError, AttributeError) as error:
        found = [f"{STATE}: {error}"]
    return next((problem for problems in collect(found, ranks) for problem in problems), None)


def _problem(path: Path, facts: dict[str, Any]) -> str | None:
    if not path.exists():
        return f"{path.name} is missing"
    if path.stat().st_size != facts["bytes"]:
        return f"{path.name} has {path.stat().st_size:,} bytes, written were {facts['bytes']:,}"
    if sha256_file(path) != facts["sha256"]:
        return f"{path.name} does not hold what was written"
    return None


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The `meta` that a checkpoint was saved with, as JSON gives it back."""
    meta: dict[str, Any] = read_json(checkpoint / STATE)["meta"]
    return meta


def load_checkpoint(checkpoint: Path, state: State) -> int:
    """Read a checkpoint into the tensors of `state`, in place, whatever number of ranks wrote it; every rank calls it.

    Args:
        checkpoint: as `find_checkpoint` gives it; its .metadata is a pickle (see above).
        state: tensors or DTensors with the names, shapes and dtypes that were saved.

    Returns:
        The number of steps done.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    flat = _flat(state)
    reader = FileSystemReader(checkpoint)
    saved = reader.read_metadata().state_dict_metadata
    _check_names(checkpoint, saved.keys() - flat.keys(), flat.keys() - saved.keys())
    for name, tensor in flat.items():
        facts: Any = saved[name]
        then, now = (facts.properties.dtype, list(facts.size)), (tensor.dtype, list(tensor.shape))
        if then != now:
            raise F2Error(
                f"{name} is {then[0]} {then[1]} in {checkpoint}, and {now[0]} {now[1]} in this run; continue with the "
                "settings the run began with, or remove its folder."
            )
    with _plain_failures():
        load(flat, storage_reader=reader)
    step: int = read_json(checkpoint / STATE)["step"]
    return step


def _check_names(checkpoint: Path, surplus: set[str], missing: set[str]) -> None:
    differences = [
        f"{verb} {len(names)} tensors, {min(names)} first"
        for verb, names in (("lacks", missing), ("has beside this run's", surplus))
        if names
    ]
    if differences:
        raise F2Error(
            f"{checkpoint} {' and '.join(differences)}; continue with the settings the run began with, or remove its "
            "folder."
        )


def _flat(state: State) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()}


@contextmanager
def _plain_failures() -> Iterator[None]:
    """DCP without its warning that a process is alone, and with the error that a rank had in place of its wrapper's."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as wrapper:
        raise next(iter(wrapper.failures.values()))[0] from None


def check_same(meta_then: dict[str, Any], meta_now: dict[str, Any], force: bool) -> None:
    """See to it that a run goes on as it began.

    What stands in meta["must_match"] (data, recipe) is compared value by value, nested ones too, and a difference is
    refused, or warned of with `force`. Differences in meta["may_differ"] (ranks, threads, library versions) are told.
    The rest of `meta` is not looked at.

    Raises:
        UsageError: naming each setting that differs, with both values.
    """
    if changed := _differences(meta_then, meta_now, MUST_MATCH):
        if not force:
            raise UsageError(
                f"the run began otherwise: {changed}; continue with what it began with, start a new run in another "
                "folder, or take the change with --force."
            )
        say(f"warning: going on although the run began otherwise (--force): {changed}.")
    if told := _differences(meta_then, meta_now, MAY_DIFFER):
        say(f"going on where the run was left, with differences that may change last bits: {told}.")


def _differences(meta_then: dict[str, Any], meta_now: dict[str, Any], part: str) -> str:
    then, now = (_leaves(json.loads(json.dumps(meta.get(part, {})))) for meta in (meta_then, meta_now))
    return ", ".join(
        f"{name} was {then.get(name, 'absent')} and is {now.get(name, 'absent')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    )


def _leaves(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings by dotted name, each value as JSON."""
    if isinstance(value, dict) and value:
        return {
            name: leaf
            for key, inner in value.items()
            for name, leaf in _leaves(inner, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: json.dumps(value, ensure_ascii=False)} if prefix else {}
