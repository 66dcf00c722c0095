"""The repository as a whole: what is installed, what is pinned, what may import what, what is never written."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "f2llm"

made_by_make = pytest.mark.skipif(
    Path(sys.prefix).resolve() != ROOT / ".venv", reason="only what `make install` made is ours to judge"
)

# The rooms by height. An import goes down, never up or across; the lowest may know one another.
HEIGHTS = (
    {"__version__", "errors", "files", "progress", "rng", "runtime", "text", "languages", "family"}
    | {
        "recipe",
        "recipe_corpus",
        "recipe_data",
        "recipe_errors",
        "recipe_fields",
        "recipe_models",
        "recipe_train",
        "yaml_lines",
        "engine",
        "tokenizer_file",
        "endpoints",
    },
    {"data"},
    {"model"},
    {"train", "amx"},
    {"embed"},
    {"compress", "evaluate", "mine", "search", "plan", "export"},
    {"synthetic", "serve", "verify"},
    {"summary", "stages"},
    {"pipeline", "doctor", "cli_data", "cli_models", "cli_serve", "cli_verify"},
    {"cli"},
    {"__main__"},
)

# Libraries that only these places may import.
HEAVY = {
    "transformers": ("synthetic/local.py",),
    "sentence_transformers": ("mine/cross_encoder.py", "verify/peer.py"),
    "datasets": ("data/hub.py",),
    "mteb": ("data/held_out.py",),
    "ray": ("engine.py",),
    "sklearn": ("evaluate/baselines.py",),
    "lancedb": ("search", "embed/bulk.py"),
    "huggingface_hub": ("model/base.py", "data/hub.py"),
    "peft": ("train/lora.py",),
    "tensorboardX": ("train/watch.py",),
    "py3langid": ("data/language_id.py",),
    "httpx2": ("synthetic/client.py", "train/teacher_endpoint.py", "verify/server.py"),
    "fastapi": ("serve",),
    "uvicorn": ("serve",),
    "tiktoken": ("serve/token_arrays.py",),
    "numba": ("amx",),
    "llvmlite": ("amx",),
}

# Addresses of package registries, paths of one person's machine, and references into a tracker. The bracketed
# letters keep this list from matching itself.
FORBIDDEN = re.compile(
    r"py[p]i\.(?:org|python)|pythonhoste[d]|download\.pytorc[h]|index[-]url|find[-]links"
    r"|(?<![\w.:])/(?:home|root|work|farm|Users)/\w|(?i:\bissue #?\d)"
)


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([spec.operator for spec in pin.specifier] == ["=="] for pin in parsed), "constraints are exact"
    return {canonicalize_name(pin.name): Version(next(iter(pin.specifier)).version) for pin in parsed}


def requirements(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [
        line for extra in extras for line in project["optional-dependencies"][extra]
    ]
    return [Requirement(line) for line in lines]


def imported(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports anywhere in it, functions included.

    `from f2llm import recipe` counts as f2llm.recipe.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "f2llm":
            yield from (f"f2llm.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def room(dotted: str) -> str:
    """f2llm.train.sampler -> train."""
    return dotted.split(".")[1]


def height(name: str) -> int:
    found = [level for level, rooms in enumerate(HEIGHTS) if name in rooms]
    assert found, f"{name} has no place in HEIGHTS; give it one, here and in docs/architecture.md"
    return found[0]


@made_by_make
def test_torch_is_the_cpu_build() -> None:
    import torch

    assert torch.version.cuda is None, "make installed a CUDA build of torch; see CONTRIBUTING.md"


@made_by_make
def test_what_is_installed_is_what_is_pinned() -> None:
    pinned = pins()
    loose = {
        f"{name} {found.version}"
        for found in metadata.distributions()
        if (name := canonicalize_name(found.name)) not in {"f2llm", "pip", "setuptools"}
        and (name not in pinned or Version(found.version).public != pinned[name].public)
    }
    assert not loose, f"not as constraints.txt says: {sorted(loose)}"


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    pinned = pins()
    for requirement in requirements("search", "eval", "dev"):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} excludes its pin {pinned[name]}"
    assert pinned["torch"] == Version("2.13.0")


def test_every_dependency_is_explained() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text()
    unexplained = [
        requirement.name
        for requirement in requirements("search", "eval")
        if not re.search(rf"^\| {re.escape(requirement.name)} \|", table, re.MULTILINE)
    ]
    assert not unexplained, "docs/architecture.md has a table of libraries, with licence and reason"


def test_every_pip_call_of_make_is_constrained() -> None:
    calls = re.findall(r"-m pip.* install .*", (ROOT / "Makefile").read_text())
    assert len(calls) == 2
    assert all(re.search(r" -c (\$\(PEERS\)/)?constraints\.txt", call) for call in calls)


@pytest.mark.parametrize("start", ["import f2llm", "from f2llm.cli import main; main()"])
def test_starting_is_light(start: str) -> None:
    code = (
        "import atexit, sys\n"
        "sys.argv = ['f2llm', '--help']\n"
        "atexit.register(lambda: print('MODULES', *sorted(m for m in sys.modules if '.' not in m)))\n"
        f"{start}\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = result.stdout.rpartition("MODULES ")[2].split()
    assert "f2llm" in modules
    assert not {"torch", *HEAVY} & set(modules)


def test_heavy_libraries_stay_in_their_place() -> None:
    strays = [
        f"{path.relative_to(SOURCE)} imports {name}"
        for path in SOURCE.rglob("*.py")
        for name in imported(path)
        if (places := HEAVY.get(name.split(".")[0])) is not None
        and not any(path.is_relative_to(SOURCE / place) for place in places)
    ]
    assert not strays


def test_arrows_point_one_way() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        here = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if here == "__init__":  # the front door: it hands out Embedder and the version
            continue
        for name in imported(path):
            if not name.startswith("f2llm."):
                continue
            there = room(name)
            leaves = height(here) == height(there) == 0
            if there not in (here, "__version__") and not leaves and height(there) >= height(here):
                wrong.append(f"{path.relative_to(SOURCE)} imports {name}")
    assert not wrong


def test_nothing_of_one_machine_is_written() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    found = []
    for path in files:
        if not path.is_file():  # deleted in the working tree, still in the index
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if match := FORBIDDEN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found
