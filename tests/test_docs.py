"""The documentation says what is so: recipes load, commands parse, tables name every setting and every module.

tests/test_readme.py holds every page to commands that exist. Here a page's commands go through the parser itself, and
what a page says of settings, defaults and limits is compared with the code.
"""

import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
import typer
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from torch.distributed.run import get_args_parser

from f2llm.cli import app
from f2llm.plan.stages import Machine, plan
from f2llm.recipe import load
from f2llm.recipe_train import TrainStage
from f2llm.train import memory, trainer, watchdog

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TRAINING = ROOT / "docs" / "training.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
SOURCE = ROOT / "src" / "f2llm"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]\n]*\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def commands() -> Iterator[list[str]]:
    """The words of each command of the page on training, without comments."""
    for block in blocks(TRAINING, "sh"):
        for line in block.splitlines():
            if words := shlex.split(line, comments=True):
                yield words


# --- Every page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        headings = {anchor(line) for line in target.read_text().splitlines()} if heading else {""}
        assert heading in headings, f"{page.name} links to {link}, but {target.name} has no such heading"


def anchor(line: str) -> str | None:
    """The anchor that a heading gets; None for other lines."""
    words = re.match(r"#+ (.*)", line)
    return words and re.sub(r"[^\w -]", "", words[1].lower()).replace(" ", "-")


# --- Commands and recipes of the page on training


def test_commands_parse() -> None:
    seen = []
    for words in commands():
        arguments = words[1:]
        if words[0] == "torchrun":
            started = get_args_parser().parse_args(arguments)
            assert started.module and started.training_script == "f2llm", words
            arguments = started.training_script_args
        else:
            assert words[0] == "f2llm", words
        parse(arguments)
        seen.append((words[0], arguments[0]))
    assert {("f2llm", "run"), ("f2llm", "plan"), ("torchrun", "run"), ("torchrun", "train")} <= set(seen)


def parse(arguments: list[str]) -> None:
    """Have the command line's own parser read a verb and its arguments, without running it."""
    group: Any = typer.main.get_command(app)
    with group.make_context("f2llm", list(arguments), resilient_parsing=False) as context:
        name, verb, rest = group.resolve_command(context, list(arguments))
        verb.make_context(name, rest, parent=context)


@pytest.mark.parametrize("wrong", ["run", "run a.yaml --no-such", "plan a.yaml --gpus many", "trane a.jsonl"])
def test_the_parser_is_strict(wrong: str) -> None:
    with pytest.raises(Exception, match="(?i)missing|no such|valid integer"):
        parse(wrong.split())


def test_commands_name_recipes_that_are_here_or_shown() -> None:
    shown = set(re.findall(r"Save it as `(\S+)`", TRAINING.read_text(encoding="utf-8")))
    named = {word for words in commands() for word in words if word.endswith(".yaml")}
    assert named - shown and all((ROOT / name).is_file() for name in named - shown)


def test_recipes_load(tmp_path: Path) -> None:
    recipes = blocks(TRAINING, "yaml")
    assert recipes
    for number, text in enumerate(recipes):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text, encoding="utf-8")
        assert any(isinstance(stage, TrainStage) for stage in load(path).stages.values())


def test_python_compiles() -> None:
    found = [(block, str(page)) for page in PAGES for block in blocks(page, "python")]
    assert found and all(compile(block, page, "exec") for block, page in found)


def test_the_plan_shown_is_what_is_printed(tmp_path: Path) -> None:
    (shown,) = (block for block in blocks(TRAINING, "text") if "GiB per GPU" in block)
    (command,) = (words for words in commands() if words[:3] == ["f2llm", "plan", "recipes/family/0.6B.yaml"])
    arguments = ["plan", str(ROOT / command[2]), *command[3:]]
    printed = subprocess.run(
        [sys.executable, "-m", "f2llm", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    differ = [line for line in shown.splitlines() if line not in printed.splitlines()]
    assert not differ, f"docs/training.md shows what {shlex.join(command)} does not print: {differ}"


# --- What it says of settings and limits


def test_the_table_of_settings_is_the_recipes() -> None:
    rows = dict(
        re.findall(r"^\| `([\w.]+)` \| (.+?) \|", section("All settings of a train stage"), re.MULTILINE)
    )
    assert list(rows) == list(settings(TrainStage))
    wrong = {name: cell for name, cell in rows.items() if stated(cell) != settings(TrainStage)[name]}
    assert not wrong, f"docs/training.md gives other defaults than the recipe: {wrong}"


def section(heading: str) -> str:
    """What stands under a heading of the page on training."""
    text = TRAINING.read_text(encoding="utf-8")
    assert f"\n## {heading}\n" in text
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


REQUIRED = "required"


def settings(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Defaults by dotted name, those of nested settings behind the one that holds them."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            default = default.model_dump(mode="json")
        found[prefix + name] = REQUIRED if default is PydanticUndefined else default
        if nested := nested_model(field.annotation):
            found |= settings(nested, f"{prefix}{name}.")
    return found


def nested_model(annotation: Any) -> type[BaseModel] | None:
    union = get_origin(annotation) in (Union, types.UnionType)
    options = get_args(annotation) if union else [annotation]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def stated(cell: str) -> Any:
    """The default that a cell of the table gives."""
    words = {"*required*": REQUIRED, "*none*": None}
    return words[cell] if cell in words else yaml.safe_load(cell.strip("`"))


def test_limits_are_those_of_the_code() -> None:
    text = TRAINING.read_text(encoding="utf-8")
    assert f"may take {trainer.SECONDS_OF_A_PHASE:,.0f} s" in text
    assert f"exit code {watchdog.EXIT_CODE}" in text
    assert f"every {trainer.LOOK_EVERY}th step" in text
    assert memory.SHARE_FOR_WHOLE == 1 / 4 and "more than a quarter of a rank's memory" in text
    assert memory.SHARE_OF_FREE == 1 / 2 and "half of what is free" in text
    free = "`, `".join(sorted(trainer.NOT_COMPUTED)[:-1]) + f"` and `{max(trainer.NOT_COMPUTED)}"
    assert f"`{free}` may always change" in text


def test_what_a_large_batch_takes() -> None:
    recipe = load(ROOT / "recipes" / "family" / "0.6B.yaml")
    stage = recipe.stages["stage1"]
    sizes = []
    for batch_size in (8192, 512):
        stages = {"stage1": stage.model_copy(update={"batch_size": batch_size})}
        (planned,) = plan(recipe.model_copy(update={"stages": stages}), Machine(8, "h100"))
        sizes.append(planned.memory.pop("vectors and scores") / 2**30)
        rest = planned.memory
    large, small = sizes
    assert f"says {large:.2f} GiB" in section("Memory") and f"512 takes {small:.2f}" in section("Memory")
    assert rest == {**planned.memory}


# --- Architecture


def test_architecture_names_every_module() -> None:
    """Those that are in the repository: what somebody has only begun to write need not be explained yet."""
    named = set(re.findall(r"^\| `([\w/]+\.py)` \|", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE))
    there = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if not path.name.startswith("__")}
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "."], cwd=SOURCE, capture_output=True, text=True, check=False
    )
    modules = there if listing.returncode else there & set(listing.stdout.splitlines())
    assert modules
    assert not modules - named, f"docs/architecture.md does not say what these are: {sorted(modules - named)}"
    assert not named - there, f"docs/architecture.md names what is not there: {sorted(named - there)}"
