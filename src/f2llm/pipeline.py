"""The pipeline: the stages of a recipe in order, each into a folder of its own, finished or not there.

For each stage, in the order of the recipe:
1. Its fingerprint is taken: of its config, the seed, and the contents of what it reads.
2. A folder whose `manifest.json` has this fingerprint, and whose contents are those the manifest names, is done.
3. A folder whose `started.json` has this fingerprint was interrupted: the stage goes on in it.
4. Anything else in the way is an older result and is emptied.
5. The stage writes its files; then the manifest is written, last, and makes the folder complete.

Since a fingerprint holds the contents of the inputs, not their age, a change redoes just what depends on it. A token
store keeps its parts where data is added behind what it has. A training run that was interrupted is not emptied for a
change: its checkpoints say what it began with, and it refuses to go on with anything else (`force` overrides).

Under torchrun rank 0 does all this. The other ranks wait for it to call them to a training stage (`_follow`).
"""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import time
from datetime import UTC, datetime
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm import __version__
from f2llm.engine import using
from f2llm.errors import F2Error, UsageError, plain_errors
from f2llm.files import alone_in, read_json, sha256_file, sha256_folder, write_json, write_text
from f2llm.progress import say
from f2llm.recipe import Recipe, Stage, canonical_json, inputs, recipe_hash
from f2llm.recipe_fields import Input
from f2llm.runtime import peak_memory
from f2llm.stages import STAGES, Context, Inputs, files_beside
from f2llm.summary import summarise

if TYPE_CHECKING:
    from f2llm.train.ranks import Ranks

MANIFEST_SCHEMA = 1
MANIFEST, STARTED = "manifest.json", "started.json"
SECONDS_BETWEEN_TRAINING = (
    7 * 86_400.0
)  # that ranks may wait while rank 0 does the stages that are not training
NOT_CONTENT = (
    MANIFEST,
    STARTED,
    "checkpoints",
    "log.jsonl",
    "tensorboard",
)  # a log tells times, never the same twice
LIBRARIES = ("torch", "numpy", "tokenizers", "babel")
GROWING = ("tokenise",)  # stages that keep what they made of their data where more comes behind it
DATA_OF = {"names": "babel"}  # stages whose result is what a library holds: a new version is new data


# --- The run


def run(recipe: Recipe, recipe_path: Path, force: bool = False) -> Path:
    """Do what of the recipe is not done yet, then report. Returns the run's folder.

    Beside the stages' folders it holds `recipe.yaml`, a copy of the file at `recipe_path`. Raises `F2Error` of one
    sentence for whatever stops it; the stages finished until then are kept, and the next run goes on from there.
    Under torchrun every rank calls it.

    Args:
        force: go on with an interrupted training stage although its data or settings changed.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from f2llm.train.ranks import join, same_on_all

        with join(SECONDS_BETWEEN_TRAINING) as ranks:
            same_on_all(recipe_hash(recipe), "the recipe's hash", ranks)
            if ranks.is_main:
                _run(recipe, recipe_path, force, ranks)
            _follow(ranks)
    else:
        _run(recipe, recipe_path, force, None)
    return recipe.output


def _follow(ranks: "Ranks") -> None:
    """Take part in the training stages that rank 0 calls to, until it has no more."""
    from f2llm.train.ranks import collect
    from f2llm.train.stage import train_stage

    none: dict[str, Any] | None = None
    while arguments := collect(none, ranks)[0]:
        train_stage(**arguments, ranks=ranks)


def _run(recipe: Recipe, recipe_path: Path, force: bool, ranks: "Ranks | None") -> None:
    folder = recipe.output
    _check_paths(recipe)
    with plain_errors("the run", folder), alone_in(folder):
        write_text(folder / "recipe.yaml", recipe_path.read_text(encoding="utf-8"))
        contents: dict[str, str] = {}
        for name, config in recipe.stages.items():
            given, hashes = {}, {}
            for item in inputs(config):
                hashes[item.name] = _hash_of(item, contents)
                if item.is_url:  # which the stage finds in its settings
                    continue
                given[item.name] = Path(item.name) if item.is_path else folder / item.name
            hashes |= {str(path): sha256_file(path) for path in files_beside(config)}
            context = Context(recipe.seed, recipe_hash(recipe), hashes, force, ranks)
            contents[name] = _finish(name, config, given, folder / name, context)
        summarise(recipe, folder)


def _hash_of(item: Input, contents: dict[str, str]) -> str:
    """What the fingerprint says of an input: the hash of its content, or the name of what only others have."""
    if item.is_on_hub or item.is_url:
        return item.name
    if not item.is_path:
        return contents[item.name]
    if Path(item.name).exists():
        return content_hash(Path(item.name))
    found = {path: content_hash(Path(path)) for path in sorted(glob(item.name, recursive=True))}
    return hashlib.sha256(canonical_json(found)).hexdigest()


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of a folder without what only describes how its contents came about."""
    return sha256_folder(path, skip=NOT_CONTENT) if path.is_dir() else sha256_file(path)


def _finish(name: str, config: Stage, given: Inputs, out: Path, context: Context) -> str:
    """Make sure that stage `name` is complete in `out`; the hash of its contents."""
    identity = {
        "schema": MANIFEST_SCHEMA,
        "stage": config.stage,
        "config": config.model_dump(mode="json"),
        "seed": context.seed,
        "inputs": context.hashes,
    }
    versions = _versions()
    decides = {library: versions[library] for library in ("f2llm", DATA_OF.get(config.stage, "f2llm"))}
    fingerprint = hashlib.sha256(canonical_json(identity | decides)).hexdigest()
    if content := _content_if_done(name, out, fingerprint):
        (out / STARTED).unlink(missing_ok=True)  # of a run that was killed just before it did so
        say(f"{name}: done already")
        return content
    with plain_errors(f"stage {name!r}", out):
        spent = _open_folder(name, out, fingerprint, _is_beginning(out, {**identity, "versions": versions}))
        began = time.monotonic()
        with using():  # a stage's workers end with it
            facts = STAGES[config.stage](config, given, out, context)
        seconds = spent + time.monotonic() - began
        content = content_hash(out)
        manifest = {
            **identity,
            "name": name,
            "versions": versions,
            "fingerprint": fingerprint,
            "content": content,
            "seconds": round(seconds, 3),
            "peak_memory_gb": round(peak_memory() / 1e9, 3),
            "facts": facts,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(out / MANIFEST, manifest)
        (out / STARTED).unlink()
    say(f"{name}: done in {seconds:,.1f} s")
    return content


def _content_if_done(name: str, out: Path, fingerprint: str) -> str | None:
    """The content hash of a stage that is complete, unchanged and undamaged."""
    manifest = _read_if_there(out / MANIFEST)
    if manifest is None or manifest.get("fingerprint") != fingerprint:
        return None
    content = content_hash(out)
    if content != manifest.get("content"):
        say(f"{name}: made again, since files in {out} were damaged or changed after it was done")
        return None
    return content


def _is_beginning(out: Path, identity: dict[str, Any]) -> bool:
    """Whether `out` has the undamaged result of a growing stage for the first of its data, all else being equal."""
    manifest = _read_if_there(out / MANIFEST)
    if identity["stage"] not in GROWING or not manifest or not manifest.keys() >= identity.keys():
        return False
    config, inputs = identity["config"], identity["inputs"]
    first = config["data"][: len(manifest["config"]["data"])]
    read = {name: inputs.get(name) for name in manifest["inputs"]}
    before = {**identity, "config": {**config, "data": first}, "inputs": read}
    equal = all(manifest[name] == before[name] for name in before)
    return equal and first != config["data"] and content_hash(out) == manifest["content"]


def _open_folder(name: str, out: Path, fingerprint: str, is_beginning: bool) -> float:
    """Ready `out` for work, keeping what is a part of it; the seconds that an interrupted start of the same work took.

    Args:
        is_beginning: it holds a complete result that the work goes on from.
    """
    discarded = out.with_name(f".{out.name}.old")
    shutil.rmtree(discarded, ignore_errors=True)  # of a run killed while it emptied the folder
    manifest, started = _read_if_there(out / MANIFEST), _read_if_there(out / STARTED) or {}
    spent = 0.0
    interrupted = "fingerprint" in started and manifest is None
    if interrupted and (started["fingerprint"] == fingerprint or any(out.glob("checkpoints/step-*"))):
        spent = started["seconds_spent"] + _seconds_of_work(out)
        for leftover in out.rglob(".*.tmp"):  # of files being written when it was killed
            leftover.unlink(missing_ok=True)  # or by a worker that outlives it by a moment
        say(f"{name}: going on after {spent:,.1f} s")
    elif is_beginning:
        say(f"{name}: going on with more data")
    elif out.exists():
        if manifest is not None and manifest.get("fingerprint") != fingerprint:
            say(f"{name}: made again, since its recipe or its inputs changed")
        ours = "fingerprint" in (manifest or started)
        if not ours and any(not path.match(".*.tmp") for path in out.iterdir()):
            raise F2Error(
                f"{out} holds files that f2llm did not make, and stage {name!r} needs the folder empty; "
                "move them away or give the recipe another output."
            )
        out.rename(discarded)  # at once, so that a kill leaves no half-emptied folder
        shutil.rmtree(discarded)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / STARTED, {"fingerprint": fingerprint, "seconds_spent": spent})
    (out / MANIFEST).unlink(missing_ok=True)  # not before, or nothing would say whose folder this is
    return spent


def _seconds_of_work(out: Path) -> float:
    """Seconds from the last start to the newest file: work after that left nothing and is done again."""
    times = [path.stat().st_mtime for path in out.rglob("*") if path.is_file()]
    return max(times) - (out / STARTED).stat().st_mtime


def _read_if_there(path: Path) -> dict[str, Any] | None:
    """A JSON object; one that cannot be read counts as empty, since then nothing it should say holds."""
    if not path.exists():
        return None
    try:
        value = read_json(path)
    except F2Error:
        value = {}
    return value if isinstance(value, dict) else {}


def _check_paths(recipe: Recipe) -> None:
    """What stages read from outside the run must be there before the first of them starts."""
    for name, config in recipe.stages.items():
        for item in inputs(config):
            if item.is_path and not item.is_on_hub and not glob(item.name) and not Path(item.name).exists():
                raise UsageError(
                    f"stage {name!r} ({config.stage}) reads {item.name}, which does not exist; "
                    f"check the path, which is relative to {Path.cwd()}."
                )


def _versions() -> dict[str, str]:
    libraries = {library: importlib.metadata.version(library) for library in LIBRARIES}
    return {"f2llm": __version__, "python": platform.python_version()} | libraries
