"""YAML that remembers its lines: text -> nodes -> plain values, and the line on which each of them stands.

Only plain data is read: no tags, no objects. Scalars follow YAML 1.2's core schema rather than 1.1, so that `1e-3`
is a number, and `no` (the language code) and `12:30` are text; digits may be grouped, as in `27_000_000`. Keys are
always text. `<<: *other` merges another mapping in; the keys written beside it win.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from f2llm.errors import UsageError

Location = tuple[str | int, ...]

MOST_VALUES = 10_000  # so that aliases of aliases cannot fill the memory
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}
CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}
INTEGER = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class Document(NamedTuple):
    """The value of a YAML file, and the line (from 1) of every key and list item in it."""

    value: Any
    lines: dict[Location, int]

    def line(self, location: Location) -> int:
        """The line of `location`, or of the nearest thing around it that the file does have."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 1)


def read_yaml(path: Path) -> Document:
    """Read one YAML document; whatever is wrong with the file is one sentence with its line."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; check the path.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give the path of a YAML file.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f":{mark.line + 1}" if mark else ""
        what = problem or str(error).splitlines()[0]
        raise UsageError(
            f"{path}{line}: not valid YAML ({what}); check indentation and quotes there."
        ) from None
    reader = _Reader(path)
    return Document(reader.value(node, (), []) if node else None, reader.lines)


class _Reader:
    """One walk over the nodes of a file, noting lines on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Location, int] = {}

    def refuse(self, node: yaml.Node, what: str) -> UsageError:
        return UsageError(f"{self.path}:{_line(node)}: {what}.")

    def value(self, node: yaml.Node, location: Location, parents: list[yaml.Node]) -> Any:
        if len(self.lines) > MOST_VALUES:
            raise self.refuse(
                node, f"the file has more than {MOST_VALUES:,} values; write fewer, or fewer aliases"
            )
        if node.tag not in PLAIN_TAGS:
            raise self.refuse(node, f"the tag {node.tag!r} is not understood; write the plain value")
        if node in parents:
            raise self.refuse(node, "this alias stands inside the very thing it repeats; write the value out")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, location, [*parents, node])
        if isinstance(node, yaml.SequenceNode):
            self.lines |= {(*location, i): _line(item) for i, item in enumerate(node.value)}
            return [self.value(item, (*location, i), [*parents, node]) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)  # the third and last sort of node
        return _scalar(node)

    def mapping(self, node: yaml.MappingNode, location: Location, parents: list[yaml.Node]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, tuple[int, yaml.Node]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.refuse(key, "a key must be a plain word")
            if key.value == "<<" and key.style is None:
                merged |= self.merge(value, location, parents)
            elif key.value in own:
                first = own[key.value][0]
                raise self.refuse(
                    key, f"the key {key.value!r} stands here and on line {first}; remove one of them"
                )
            else:
                own[key.value] = _line(key), value
        for name, (line, value) in own.items():  # after what was merged, whose values and lines they replace
            self.lines[*location, name] = line
            merged[name] = self.value(value, (*location, name), parents)
        return merged

    def merge(self, node: yaml.Node, location: Location, parents: list[yaml.Node]) -> dict[str, Any]:
        """The keys that `<<` brings in; of a list of mappings, the earlier ones win."""
        merged: dict[str, Any] = {}
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(source, yaml.MappingNode):
                raise self.refuse(
                    source, "'<<' must be followed by a mapping; write '<<: *name' with an anchor '&name'"
                )
            merged = self.value(source, location, parents) | merged
        return merged


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    text: str = node.value
    if node.style is not None:  # quoted or block text
        return text
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    if INTEGER.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(text)
    return text
