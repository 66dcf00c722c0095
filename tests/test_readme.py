"""Commands that the documentation shows are commands that exist, and the marked blocks run as they stand.

In README.md and docs/*.md every `f2llm` line of a fenced sh block must name a verb and options that its --help
knows; every `make` line an existing target; every `python FILE` line an existing file.
A block below a line `<!-- test -->` is run as well, sh and python blocks alike: the marked blocks of one file in
order, in one temporary folder in which `recipes` is the repository's.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?P<mark><!-- test -->\n+)?^```(?P<language>sh|python)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")
INTERPRETERS = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; `line` is that of its first command."""

    page: Path
    line: int
    language: str
    marked: bool
    body: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("body")) + 1
        yield Block(page, line, found["language"], found["mark"] is not None, found["body"])


def commands(body: str) -> Iterator[list[str]]:
    """The words of each command of a sh block; comments and `$ ` prompts go, continued lines are joined."""
    for line in body.replace("\\\n", " ").splitlines():
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        if words:
            yield words


def shown() -> list[tuple[str, list[str]]]:
    return [
        (f"{block.page.name}:{block.line}", words)
        for page in PAGES
        for block in blocks(page)
        if block.language == "sh"
        for words in commands(block.body)
    ]


@cache
def help_of(*verb: str) -> str:
    """What `f2llm VERB --help` prints, on a terminal wide enough to cut nothing; empty if it fails."""
    code = "from f2llm.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, *verb, "--help"],
        env={**os.environ, "COLUMNS": "300", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if result.returncode else result.stdout


def complaint(words: list[str]) -> str | None:
    """Why this command could not work as written, or None. Values are not looked at."""
    program, arguments = words[0], words[1:]
    options = [found[0] for word in arguments if (found := OPTION.match(word))]
    names = [word for word in arguments if not OPTION.match(word)]
    if program == "f2llm":
        verb = names[:2] if names[:1] == ["data"] else names[:1]  # `data` has verbs of its own
        page = help_of(*verb)
        if not page:
            return f"f2llm has no verb {verb}"
        known = set(OPTION.findall(page)) | set(OPTION.findall(help_of()))
        return next((f"no option {option}" for option in options if option not in known), None)
    if program == "make":
        plan = subprocess.run(
            ["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return plan.stderr.strip() if plan.returncode else None
    if program in ("python", "python3") and names and names[0].endswith(".py"):
        return None if (ROOT / names[0]).is_file() else f"no file {names[0]}"
    return None


def test_readme_shows_the_way() -> None:
    programs = {
        words[0] for block in blocks(README) if block.language == "sh" for words in commands(block.body)
    }
    assert {"make", "f2llm"} <= programs, f"README.md shows no make or no f2llm command, only {programs}"


def test_every_shell_block_is_seen() -> None:
    """Fences that the pattern would overlook (indented, another name for the shell) are not used."""
    for page in PAGES:
        fences = re.findall(
            r"^[ \t]*(?:```|~~~)[ \t]*(?:sh|shell|bash|console|zsh)\b", page.read_text(), re.MULTILINE
        )
        seen = [block for block in blocks(page) if block.language == "sh"]
        assert len(fences) == len(seen), f"{page.name}: use plain ```sh fences at the start of the line"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("f2llm run recipes/quickstart.yaml", None),
        ("f2llm --help", None),
        ("f2llm jump recipes/quickstart.yaml", "no verb"),
        ("f2llm run recipes/quickstart.yaml --no-such-option", "no option --no-such-option"),
        ("make quickstart", None),
        ("make no-such-target", "no-such-target"),
        ("python benchmarks/no_such_file.py", "no file"),
    ],
)
def test_the_check_itself(command: str, expected: str | None) -> None:
    found = complaint(shlex.split(command))
    assert found is None if expected is None else expected in (found or "")


def test_every_command_shown_exists() -> None:
    wrong = [f"{where}: {shlex.join(words)}: {why}" for where, words in shown() if (why := complaint(words))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_marked_blocks_run(page: Path, tmp_path: Path) -> None:
    marked = [block for block in blocks(page) if block.marked]
    assert marked or page != README, "README.md marks no block with <!-- test -->"
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    programs = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": programs + os.pathsep + os.environ["PATH"]}
    for block in marked:
        result = subprocess.run(
            [*INTERPRETERS[block.language], block.body],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{page.name}:{block.line}: {result.stderr}"
