"""Prompts are files that anybody can edit: `prompts/*.md` beside this module, or of the same names in a user's folder.

A file is text with {placeholders}. Above the text, between two lines of `---`, may stand lists in YAML: for each
request one entry of each list is drawn, and fills the placeholder of the list's name. The hash of a file is part of
its prompt's id, which every row carries.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from f2llm import languages
from f2llm.errors import UsageError
from f2llm.recipe_errors import nearest
from f2llm.rng import generator

_LANGUAGE = {"language", "language_name"}  # with its codes, and without
_TASKS = _LANGUAGE | {"count", "known"}
_ROW = _LANGUAGE | {"task", "number"}
_RETRIEVAL = {"query", "document"}
# What every prompt may use, beside the names of its own lists.
PLACEHOLDERS: dict[str, set[str]] = {
    "tasks-retrieval": _TASKS | _RETRIEVAL,
    "tasks-labels": _TASKS,
    "tasks-sentences": _TASKS,
    "rows-retrieval": _ROW | _RETRIEVAL,
    "rows-labels": _ROW | {"name", "labels", "label"},
    "rows-paraphrase": _ROW,
    "rows-bitext": _ROW | {"other_language", "other_language_name"},
}
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_HEAD = re.compile(r"---\n(?P<head>.*?\n)---\n(?P<text>.*)", re.DOTALL)


@dataclass(frozen=True)
class Prompt:
    """A prompt file that was read."""

    id: str
    """`rows-bitext@` and 12 hexadecimal digits of the file's SHA-256."""
    text: str
    choices: Mapping[str, list[str]]

    def fill(self, values: Mapping[str, str | int], seed: int, *keys: str | int) -> str:
        """The text with `values` in place; what is drawn from the lists depends on (seed, keys) alone."""
        rng = generator(seed, "prompt", *keys)
        drawn = {name: options[rng.integers(len(options))] for name, options in self.choices.items()}
        filled: dict[str, str] = {**{name: str(value) for name, value in values.items()}, **drawn}
        # In one go, so that braces in a task or label are left alone.
        return _PLACEHOLDER.sub(lambda found: filled[found[1]], self.text)


def load_prompts(folder: Path | None = None) -> dict[str, Prompt]:
    """All prompts by name: those of `folder` where it has them, ours where not.

    Raises UsageError where a file of `folder` is no prompt of ours by name, or uses what nobody fills in.
    """
    ours = resources.files("f2llm.synthetic") / "prompts"
    own = {path.stem: path for path in sorted(folder.glob("*.md"))} if folder else {}
    if folder and not own:
        raise UsageError(f"{folder} has no prompt; put files such as rows-retrieval.md there.")
    for name, path in own.items():
        if name not in PLACEHOLDERS:
            raise UsageError(f"{path} is no prompt: {nearest(name, list(PLACEHOLDERS), 'name')}.")
    return {
        name: _parse(name, own[name].read_bytes(), str(own[name]))
        if name in own
        else _parse(name, (ours / f"{name}.md").read_bytes(), f"{name}.md")
        for name in PLACEHOLDERS
    }


def language_with_codes(tag: str) -> str:
    """A language so that it cannot be mistaken: `Serbian (ISO 639-3: srp, script: Cyrl)`."""
    code = tag.partition("_")[0]
    script = languages.script(tag)
    in_script = "" if script == "Zyyy" else f", script: {script}"
    return f"{languages.english_name(code)} (ISO 639-3: {code}{in_script})"


def _parse(name: str, data: bytes, path: str) -> Prompt:
    try:
        text = data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    choices: dict[str, list[str]] = {}
    if found := _HEAD.fullmatch(text):
        text, choices = found["text"], _choices(found["head"], path)
    known = PLACEHOLDERS[name] | choices.keys()
    for used in _PLACEHOLDER.findall(text):
        if used not in known:
            raise UsageError(f"{path} uses {{{used}}}: {nearest(used, sorted(known), 'placeholder')}.")
    return Prompt(f"{name}@{hashlib.sha256(data).hexdigest()[:12]}", text.strip() + "\n", choices)


def _choices(head: str, path: str) -> dict[str, list[str]]:
    try:
        value = yaml.load(head, yaml.BaseLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "unreadable"
        raise UsageError(f"{path}: what stands between the lines of '---' is not YAML ({problem}).") from None
    is_lists = isinstance(value, dict) and all(
        isinstance(options, list) and options and all(isinstance(one, str) and one for one in options)
        for options in value.values()
    )
    if not is_lists:
        raise UsageError(f"{path}: between the lines of '---' expected lists of texts, each under a name.")
    return {str(name): options for name, options in value.items()}
